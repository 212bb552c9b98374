"""Codes without a codebook: finite scalars (FSQ), signs (LFQ, BSQ) and bits. See docs/ops/quantize.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, StraightThrough, expect_floating, fake, kernels
from arimg.ops._sampling_rows import check_integers
from arimg.ops.sampling_bits import bits_of_odds

__all__ = ["bernoulli_bits", "fsq", "fsq_codes", "pack_bits", "sign_codes", "unpack_bits", "unpack_signs"]

MAX_LEVEL = 1000  # beyond, the margin of 1e-3 in the bound would reach the next level
MAX_CODES = 2**62
MAX_BITS = 64


def fsq(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Finite scalar quantization: z [..., d] -> (codes [..., d] in [-1, 1], indices int64 [...]).

    Dimension c has L = levels[c] levels: code = round(tanh(z + shift) half - offset) / floor(L / 2), halves
    to even; half = (L - 1)(1 + 1e-3) / 2, offset = 1/2 if L is even else 0, shift = atanh(offset / half).
    index = sum of (code floor(L / 2) + floor(L / 2)) times the product of the levels before.
    The gradient goes through the bound and not through the rounding. A NaN gives the code NaN, the digit 0.
    Levels are 2 to 1000, their product at most 2^62. Raises ValueError or TypeError for what does not fit.
    """
    expect_floating("z", z)
    levels = _checked_levels(levels)
    if z.dim() == 0 or z.shape[-1] != len(levels):
        raise ValueError(f"expected z [..., {len(levels)}], got {list(z.shape)}")
    ops = kernels(z.detach())
    if ops is None:
        return reference.fsq(z, levels)
    rows = z.reshape(-1, len(levels))
    if torch.is_grad_enabled() and z.requires_grad:
        codes, indices = _FSQ.apply(rows, levels)
    else:
        codes, indices = ops.fsq(rows.contiguous(), levels)
    return codes.view(z.shape), indices.view(z.shape[:-1])


def fsq_codes(indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The way back: indices int64 [...] -> codes [..., d] of `dtype`, as `fsq` gives them.

    An index outside [0, product of the levels) is taken modulo that product.
    """
    _expect_int64("indices", indices)
    levels = _checked_levels(levels)
    if dtype not in FLOATING:
        raise TypeError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
    ops = kernels(indices)
    if ops is None:
        return reference.fsq_codes(indices, levels, dtype=dtype)
    if indices.dim() == 1:  # two views less, which show in a call of microseconds
        return ops.fsq_codes(indices.contiguous(), levels, dtype)
    return ops.fsq_codes(indices.reshape(-1).contiguous(), levels, dtype).view(*indices.shape, len(levels))


def sign_codes(z: Tensor, scale: float | None = None, *, msb_first: bool = True) -> tuple[Tensor, Tensor]:
    """Binary codes: z [..., d] -> (codes [..., d] of z's dtype, indices int64 [...]), d at most 64.

    A bit is z > 0 (0 and NaN give 0), its code scale or -scale; indices are the bits packed by `pack_bits`.
    scale None is BSQ: 1 / sqrt(d), with the gradient of z / |z| (straight-through on the sphere).
    A number is LFQ: the gradient passes to z unchanged.
    Raises ValueError or TypeError for what does not fit.
    """
    expect_floating("z", z)
    if z.dim() == 0 or not 1 <= z.shape[-1] <= MAX_BITS:
        raise ValueError(f"expected z [..., d] with d of 1 to {MAX_BITS}, got {list(z.shape)}")
    ops = kernels(z.detach())
    if ops is None:
        return reference.sign_codes(z, scale, msb_first=msb_first)
    d = z.shape[-1]
    value = d**-0.5 if scale is None else scale
    codes, indices = ops.sign_codes(z.detach().reshape(-1, d).contiguous(), value, msb_first)
    codes = codes.view(z.shape)
    if torch.is_grad_enabled() and z.requires_grad:
        codes = StraightThrough.apply(z if scale is not None else F.normalize(z.float(), dim=-1), codes)
    return codes, indices.view(z.shape[:-1])


def pack_bits(bits: Tensor, *, msb_first: bool = True) -> Tensor:
    """Bits [..., d] (bool, or uint8 where any value but 0 is a set bit) -> int64 [...], d of 1 to 64.

    msb_first: the first bit is the highest, of value 2^(d - 1) (ELM, vector-quantize-pytorch); otherwise it
    is the lowest (Open-MAGVIT2). With d = 64 the highest bit is the sign of the int64.
    """
    if not isinstance(bits, Tensor):
        raise TypeError(f"expected bits to be a tensor, got {type(bits).__name__}")
    if bits.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"expected bits of bool or uint8 (for signs: x > 0), got {bits.dtype}")
    if bits.dim() == 0 or not 1 <= bits.shape[-1] <= MAX_BITS:
        raise ValueError(f"expected bits [..., d] with d of 1 to {MAX_BITS}, got {list(bits.shape)}")
    ops = kernels(bits)
    if ops is None:
        return reference.pack_bits(bits, msb_first=msb_first)
    return ops.pack_bits(bits.reshape(-1, bits.shape[-1]).contiguous(), msb_first).view(bits.shape[:-1])


def unpack_bits(indices: Tensor, d: int, *, msb_first: bool = True) -> Tensor:
    """The way back: int64 [...] -> bool [..., d]. Bits above the d lowest are ignored."""
    return _unpack(indices, d, 0.0, 1.0, msb_first, torch.bool)


def unpack_signs(
    indices: Tensor,
    d: int,
    scale: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    msb_first: bool = True,
) -> Tensor:
    """Codes of `sign_codes` from their indices: int64 [...] -> [..., d], scale or (None) 1 / sqrt(d)."""
    if dtype not in FLOATING:
        raise TypeError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
    value = scale if scale is not None else d**-0.5 if d > 0 else 0.0
    return _unpack(indices, d, -value, value, msb_first, dtype)


def bernoulli_bits(x: Tensor, *, seed: int | Tensor | None = None, position: int = 0) -> Tensor:
    """Bits of a binary autoencoder: logits x [R, ..., d] -> 0 or 1 [R, ..., d] of x's dtype.

    seed None: sigmoid(x) > 1/2. Otherwise a draw of probability sigmoid(x), the bits that `sample_bits` gives
    for the pairs of logits (0, x): bit n of the j-th token of a row takes number n of position + j; an int s
    gives row r the seed s + r, an int64 tensor [R] each row its own (docs/random-numbers.md). NaN gives 0.
    Straight-through: the gradient is that of sigmoid(x). The quantized vector is `bits @ embedding`.
    """
    expect_floating("x", x)
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"expected x [R, ..., d], got {list(x.shape)}")
    if seed is None:
        bits = torch.sigmoid(x.detach().float()) > 0.5
    else:
        check_integers("seed", seed, x.shape[0], x)
        bits = bits_of_odds(x, seed, position)
    if torch.is_grad_enabled() and x.requires_grad:
        return StraightThrough.apply(torch.sigmoid(x.float()), bits.to(x.dtype))
    return bits.to(x.dtype)


def _unpack(indices: Tensor, d: int, low: float, high: float, msb_first: bool, dtype: torch.dtype) -> Tensor:
    _expect_int64("indices", indices)
    if not 1 <= d <= MAX_BITS:
        raise ValueError(f"expected d of 1 to {MAX_BITS}, got {d}")
    ops = kernels(indices)
    if ops is None:
        bits = reference.unpack_bits(indices, d, msb_first=msb_first)
        return bits if dtype == torch.bool else torch.where(bits, high, low).to(dtype)
    flat = indices.reshape(-1).contiguous()
    return ops.unpack_bits(flat, d, low, high, msb_first, dtype).view(*indices.shape, d)


class _FSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
        ops = kernels(z.detach())
        assert ops is not None
        z = z.detach().contiguous()
        codes, indices = ops.fsq(z, levels)
        ctx.save_for_backward(z)
        ctx.levels = levels
        ctx.mark_non_differentiable(indices)
        return codes, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        ops = kernels(z)
        assert ops is not None
        return ops.fsq_backward(grad.detach().contiguous(), z, ctx.levels), None


def _checked_levels(levels: Sequence[int]) -> list[int]:
    levels = [int(level) for level in levels]
    if not levels or any(not 2 <= level <= MAX_LEVEL for level in levels):
        raise ValueError(f"expected levels of 2 to {MAX_LEVEL}, got {levels}")
    if prod(levels) > MAX_CODES:
        raise ValueError(f"expected levels with a product of at most 2^62, got {levels}")
    return levels


def _expect_int64(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"expected {name} to be an int64 tensor, got {getattr(x, 'dtype', type(x))}")


@fake("fsq")
def _fsq_fake(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[0], dtype=torch.int64)


@fake("fsq_backward")
def _fsq_backward_fake(grad: Tensor, z: Tensor, levels: list[int]) -> Tensor:
    return torch.empty_like(z)


@fake("fsq_codes")
def _fsq_codes_fake(index: Tensor, levels: list[int], dtype: torch.dtype) -> Tensor:
    return index.new_empty((index.shape[0], len(levels)), dtype=dtype)


@fake("sign_codes")
def _sign_codes_fake(z: Tensor, scale: float, msb_first: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[0], dtype=torch.int64)


@fake("pack_bits")
def _pack_bits_fake(bits: Tensor, msb_first: bool) -> Tensor:
    return bits.new_empty(bits.shape[0], dtype=torch.int64)


@fake("unpack_bits")
def _unpack_bits_fake(
    index: Tensor, bits: int, low: float, high: float, msb_first: bool, dtype: torch.dtype
) -> Tensor:
    return index.new_empty((index.shape[0], bits), dtype=dtype)
