"""Codebook lookup in plain torch: the oracle and the fallback of `arimg.ops.quantize`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide

_ROWS_PER_BLOCK = 4096  # bounds the distance matrix to this many rows


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "l2", allowed: Tensor | None = None) -> Tensor:
    """Index of the code nearest to each row: x [N, D], codebook [K, D] -> int64 [N].

    metric "l2" minimises |x - e|^2, "cosine" and "dot" maximise the similarity. Ties go to the lowest index,
    a row with a NaN gets index 0 and a code with a NaN is never chosen. Distances are taken in float32
    (float64 for float64 input); no gradient.
    allowed: bool [K], or [B, K] for N / B rows each: the codes to choose from. The lowest allowed one takes
    the place of index 0, and -1 where none is allowed.
    """
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for i in range(0, len(x), _ROWS_PER_BLOCK):
        scores = code_scores(x[i : i + _ROWS_PER_BLOCK], codebook, metric)
        if allowed is None:
            index[i : i + _ROWS_PER_BLOCK] = scores.argmin(-1)  # the first of equals
            continue
        sets = allowed.reshape(-1, len(codebook))
        rows = torch.arange(i, i + len(scores), device=x.device)
        ours = sets[rows // (len(x) // len(sets))]
        first = torch.where(ours.any(-1), ours.int().argmax(-1), -1)
        best, at = scores.masked_fill(~ours, torch.inf).min(-1)
        index[i : i + _ROWS_PER_BLOCK] = torch.where(best < torch.inf, at, first)
    return index


def code_scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """What a search minimises, [N, K]: for "l2" half the squared distance without the |x|^2 that all codes
    share, for "dot" and "cosine" minus the product of x with the (normalised) codes. NaN becomes infinity.
    """
    x, codes = wide(x.detach()), wide(codebook.detach())
    if metric == "cosine":  # the length of x does not change the order
        codes = F.normalize(codes, dim=-1)
    offset = 0.5 * codes.square().sum(-1) if metric == "l2" else codes.new_zeros(len(codes))
    scores = offset - x @ codes.T
    return scores.masked_fill_(scores.isnan(), torch.inf)


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """Rows of the codebook: indices [...], codebook [K, D] -> [..., D]. Differentiable in the codebook."""
    return F.embedding(indices, codebook)


def quantize(x: Tensor, codebook: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Nearest codes and their indices: x [..., D] -> (z_q [..., D], indices [...]).

    Straight-through: the gradient of z_q passes to x unchanged and the codebook gets none.
    """
    indices = nearest_code(x.reshape(-1, x.shape[-1]), codebook, metric).reshape(x.shape[:-1])
    z_q = lookup(indices, codebook.detach()).to(x.dtype)
    if x.requires_grad:
        z_q = z_q + (x - x.detach())  # adds an exact zero; x + (z_q - x) would round
    return z_q, indices
