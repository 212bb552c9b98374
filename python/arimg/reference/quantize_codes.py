"""Scalar codes in plain torch: the oracle and the fallback of `arimg.ops.quantize_codes`."""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide
from arimg.reference.sampling import Drawn
from arimg.reference.sampling_bits import sample_bits


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


def sign_codes(z: Tensor, scale: float | None = None, *, msb_first: bool = True) -> tuple[Tensor, Tensor]:
    """z [..., d] -> (codes [..., d], indices int64 [...]): a bit is z > 0, its code scale or -scale.

    scale None is BSQ: 1 / sqrt(d) and the gradient of z / |z|; a number is LFQ: the gradient of z itself.
    """
    bits = z.detach() > 0
    value = z.shape[-1] ** -0.5 if scale is None else scale
    codes = torch.where(bits, value, -value).to(z.dtype)
    if z.requires_grad:
        x = z if scale is not None else F.normalize(wide(z), dim=-1).to(z.dtype)
        codes = codes + (x - x.detach())  # adds an exact zero
    return codes, pack_bits(bits, msb_first=msb_first)


def pack_bits(bits: Tensor, *, msb_first: bool = True) -> Tensor:
    """Bits [..., d] -> int64 [...]; the first bit is the highest of d (msb_first) or the lowest."""
    return (bits.ne(0).long() << _places(bits.shape[-1], msb_first, bits.device)).sum(-1)


def unpack_bits(indices: Tensor, d: int, *, msb_first: bool = True) -> Tensor:
    """The way back: int64 [...] -> bool [..., d]."""
    return (indices[..., None] >> _places(d, msb_first, indices.device) & 1).bool()


def unpack_signs(
    indices: Tensor,
    d: int,
    scale: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    msb_first: bool = True,
) -> Tensor:
    """Codes of `sign_codes` from their indices: int64 [...] -> [..., d]."""
    value = d**-0.5 if scale is None else scale
    return torch.where(unpack_bits(indices, d, msb_first=msb_first), value, -value).to(dtype)


def bernoulli_bits(x: Tensor, *, seed: int | Tensor | None = None, position: int = 0) -> Tensor:
    """Logits x [R, ..., d] -> bits 0 or 1: sigmoid(x) > 1/2, or with seeds a draw of that probability, which
    is `sample_bits` of the pairs (0, x). The gradient is that of sigmoid(x).
    """
    p = torch.sigmoid(wide(x))
    if seed is None:
        drawn: Tensor | Drawn = p.detach() > 0.5
    else:
        value = x.detach()
        drawn = sample_bits(torch.stack((torch.zeros_like(value), value), -1), seed=seed, position=position)
    assert isinstance(drawn, Tensor)
    bits = drawn.to(x.dtype)
    return bits + (p - p.detach()).to(x.dtype) if x.requires_grad else bits


def _places(d: int, msb_first: bool, device: torch.device) -> Tensor:
    return torch.arange(d - 1, -1, -1, device=device) if msb_first else torch.arange(d, device=device)


def _constants(levels: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """shift, half, offset, floor(L / 2) and half / floor(L / 2) in float64."""
    L = torch.tensor(levels, dtype=torch.float64, device=device)
    half = (L - 1) * (1 + 1e-3) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).to(L)
    width = (L / 2).floor()
    return torch.atanh(offset / half), half, offset, width, half / width
