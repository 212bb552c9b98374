"""Scalar codes in plain torch: the oracle and the fallback of `arimg.ops.quantize_codes`."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from arimg.reference.precision import wide


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """z [..., d] -> (codes [..., d] in [-1, 1], of z's dtype; indices int64 [...]), d = len(levels).

    code = round(tanh(z + shift) half - offset) / floor(L / 2), index = sum of digit_c basis_c with the first
    dimension the fastest. The gradient goes through the bound and not through the rounding. A NaN gives the
    code NaN and the digit 0.
    """
    shift, half, offset, width, _ = _constants(levels, z.device)
    x = wide(z)
    bounded = torch.tanh(x + shift.to(x.dtype)) * half.to(x.dtype) - offset.to(x.dtype)
    k = bounded.detach().round()
    basis = torch.tensor([prod(levels[:c]) for c in range(len(levels))], device=z.device)
    digits = torch.where(k.isnan(), 0.0, k + width.to(x.dtype)).long()
    if z.requires_grad:
        k = k + (bounded - bounded.detach())  # adds an exact zero; bounded + (k - bounded) would round
    return (k / width.to(x.dtype)).to(z.dtype), (digits * basis).sum(-1)


def fsq_codes(indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes of indices (taken modulo the number of codes): int64 [...] -> [..., d]."""
    rest, digits = indices, []
    for level in levels:
        digits.append(rest.remainder(level))
        rest = rest.div(level, rounding_mode="floor")
    width = _constants(levels, indices.device)[3]
    return ((torch.stack(digits, -1) - width) / width).float().to(dtype)


def _constants(levels: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """shift, half, offset, floor(L / 2) and half / floor(L / 2) in float64."""
    L = torch.tensor(levels, dtype=torch.float64, device=device)
    half = (L - 1) * (1 + 1e-3) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).to(L)
    width = (L / 2).floor()
    return torch.atanh(offset / half), half, offset, width, half / width
