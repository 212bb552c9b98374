"""The softmax over a codebook in plain torch: the oracle and the fallback of `arimg.ops.quantize_flow`."""

import torch
from torch import Tensor

from arimg.reference.precision import wide

_ROWS_PER_BLOCK = 4096  # bounds the matrix of exponents to this many rows


def codebook_softmax_mean(
    x: Tensor, codebook: Tensor, logits: Tensor, scale: Tensor, sigma: Tensor
) -> Tensor:
    """sum_j w_j c_j with w = softmax_j(logits_j - |x - s c_j|^2 / (2 sigma^2)): x [N, D] -> [N, D].

    codebook [K, D], logits [N, K] or [1, K], scale s and sigma [N]. Sums in float32 (float64 for float64
    input). A row whose exponents are all -inf gives 0, one with a NaN or +inf gives NaN.
    """
    x, codes, a = wide(x), wide(codebook), wide(scale) / wide(sigma).square()
    half = 0.5 * codes.square().sum(-1)
    parts = []
    for i in range(0, len(x), _ROWS_PER_BLOCK):
        rows = slice(i, i + _ROWS_PER_BLOCK)
        prior = logits if len(logits) == 1 else logits[rows]
        a_i, s = a[rows, None], wide(scale)[rows, None]
        exponents = wide(prior) + a_i * (x[rows] @ codes.T) - a_i * s * half
        nothing = (exponents == -torch.inf).all(-1, keepdim=True)
        weights = torch.where(nothing, 0.0, exponents.masked_fill(nothing, 0.0).softmax(-1))
        parts.append(weights @ codes)
    return torch.cat(parts) if parts else torch.zeros_like(x)
