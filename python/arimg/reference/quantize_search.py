"""Searches of `arimg.ops.quantize_search` in plain torch."""

import torch
from torch import Tensor

from arimg.reference.precision import wide
from arimg.reference.quantize import code_scores, nearest_code

_ROWS_PER_BLOCK = 4096  # bounds the distance matrix to this many rows


def nearest_codes(x: Tensor, codebook: Tensor, k: int, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The k codes nearest to each row, nearest first: x [N, D], codebook [K, D] -> (values, indices) [N, k].

    values: squared distances ("l2") or similarities ("dot", "cosine"). Equal scores: the lowest index first.
    A score that is NaN or infinite comes last and gives inf ("l2") or -inf.
    """
    values = wide(x.detach()).new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for i in range(0, len(x), _ROWS_PER_BLOCK):
        rows = wide(x.detach()[i : i + _ROWS_PER_BLOCK])
        scores, index = code_scores(rows, codebook, metric).sort(dim=-1, stable=True)
        scores, squares = scores[:, :k], rows.square().sum(-1, keepdim=True)
        if metric == "l2":
            near = (2 * scores + squares).clamp(min=0)
        else:
            near = -scores if metric == "dot" else -scores / squares.sqrt().clamp(min=1e-12)
        worst = torch.inf if metric == "l2" else -torch.inf
        values[i : i + _ROWS_PER_BLOCK] = near.masked_fill(scores == torch.inf, worst)
        indices[i : i + _ROWS_PER_BLOCK] = index[:, :k]
    return values, indices


def nearest_code_dual(
    a: Tensor, b: Tensor, codebook_a: Tensor, codebook_b: Tensor, weight: float = 1.0
) -> Tensor:
    """argmin_j |a - codebook_a[j]|^2 + weight |b - codebook_b[j]|^2 for each row, from the two distances."""
    index = torch.empty(len(a), dtype=torch.int64, device=a.device)
    for i in range(0, len(a), _ROWS_PER_BLOCK):
        rows = slice(i, i + _ROWS_PER_BLOCK)
        scores = code_scores(a[rows], codebook_a, "l2") + weight * code_scores(b[rows], codebook_b, "l2")
        index[rows] = scores.masked_fill_(scores.isnan(), torch.inf).argmin(-1)
    return index


def residual_nearest_code(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Residual quantisation: x [N, D], codebooks [Q, K, D] -> (indices [N, Q], sum of the codes [N, D]).

    Straight-through: the gradient of the sum of the codes passes to x unchanged, the codebooks get none.
    """
    codebooks = wide(codebooks.detach())
    residual = wide(x.detach())
    quantized = torch.zeros_like(residual)
    indices = []
    for codebook in codebooks:
        indices.append(nearest_code(residual, codebook))
        residual = residual - codebook[indices[-1]]
        quantized = quantized + codebook[indices[-1]]
    quantized = quantized.to(x.dtype)
    if x.requires_grad:
        quantized = quantized + (x - x.detach())
    return torch.stack(indices, dim=-1), quantized
