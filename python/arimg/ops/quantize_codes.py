"""Codes without a codebook: finite scalars (FSQ). See docs/ops/quantize.md."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, expect_floating, fake, kernels

__all__ = ["fsq", "fsq_codes"]

MAX_LEVEL = 1000  # beyond, the margin of 1e-3 in the bound would reach the next level
MAX_CODES = 2**62


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
    if kernels(z.detach()) is None:
        return reference.fsq(z, levels)
    codes, indices = _FSQ.apply(z.reshape(-1, len(levels)), levels)
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
    return ops.fsq_codes(indices.reshape(-1).contiguous(), levels, dtype).view(*indices.shape, len(levels))


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
