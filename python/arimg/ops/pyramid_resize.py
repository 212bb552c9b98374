"""Resampling of feature maps and of tokens that lie on a grid. See docs/ops/pyramid.md.

float32, bfloat16 or float16; arithmetic in float32; results have the input's dtype. The gradient is the
transposed resampling by the same kernels: no atomics, the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels

__all__ = ["area_down", "bicubic_up", "bilinear_up", "pool_tokens", "resize"]

MODES = ("area", "bilinear", "bicubic")  # in the order of `Resampling` in csrc/pyramid/resample.h


def resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resampling between any two grids, as `F.interpolate(x, size, mode=mode)` with corners not aligned.

    x [B, C, H, W] with mode "area", "bilinear" or "bicubic" and size (h, w), up or down along each axis; or
    x [B, C, T, H, W] with mode "area" or "trilinear" and size (t, h, w). An axis of equal size is copied. A
    channels-last map gives a channels-last result.
    Raises ValueError or TypeError for shapes, dtypes or a mode that do not fit.
    """
    expect_floating("x", x)
    modes = {4: MODES, 5: ("area", "trilinear")}.get(x.dim())
    if modes is None or not all(n > 0 for n in x.shape[2:]):
        raise ValueError(f"expected x [B, C, H, W] or [B, C, T, H, W] with H, W, T > 0, got {list(x.shape)}")
    if mode not in modes:
        raise ValueError(f"expected a mode of {', '.join(modes)} for {x.dim() - 2} axes, got {mode!r}")
    if len(size) != x.dim() - 2 or not all(n > 0 for n in size):
        words = "two" if x.dim() == 4 else "three"
        raise ValueError(f"expected a size of {words} positive numbers, got {tuple(size)}")
    if kernels(x.detach()) is None:
        return reference.resize(x, size, mode)
    if x.dim() == 5:
        return _resize_volumes(x, (size[0], size[1], size[2]), "bilinear" if mode == "trilinear" else mode)
    return _resize_maps(x, (size[0], size[1]), mode)


def area_down(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the cell of each output pixel: x [B, C, H, W] -> [B, C, h, w], as `F.interpolate`'s "area".

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    return resize(_expect_map(x), size, "area")


def bicubic_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resampling: x [B, C, h, w] -> [B, C, H, W], as `F.interpolate(mode="bicubic")` (a = -0.75).

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    return resize(_expect_map(x), size, "bicubic")


def bilinear_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling: x [B, C, h, w] -> [B, C, H, W], as `F.interpolate(mode="bilinear")`, which is also
    what "trilinear" does to a map with a time axis of one step.

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    return resize(_expect_map(x), size, "bilinear")


def pool_tokens(
    x: Tensor, grid: tuple[int, int], size: tuple[int, int], start: int = 0, mode: str = "area"
) -> Tensor:
    """Resamples tokens that lie on a grid: x [B, H, L, D] -> [B, H, h_k * w_k, D].

    Tokens start .. start + h w - 1 are the rows of a grid (h, w), resampled to (h_k, w_k): with "area" the
    pooled keys and values of VAREdit (arXiv 2508.15772). x may be any view whose channels lie side by side,
    such as a segment of a cache; nothing is copied. Differentiable.
    Raises ValueError or TypeError for shapes, dtypes or a mode that do not fit.
    """
    expect_floating("x", x)
    if x.dim() != 4 or x.shape[3] == 0:
        raise ValueError(f"expected x [B, H, L, D] with D > 0, got {list(x.shape)}")
    for name, pair in (("grid", grid), ("size", size)):
        if len(pair) != 2 or not (pair[0] > 0 and pair[1] > 0):
            raise ValueError(f"expected a {name} of two positive numbers, got {tuple(pair)}")
    tokens = grid[0] * grid[1]
    if not (start >= 0 and start + tokens <= x.shape[2]):
        raise ValueError(f"expected tokens {start}..{start + tokens} within {x.shape[2]}")
    if mode not in MODES:
        raise ValueError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
    if kernels(x.detach()) is None:
        return reference.pool_tokens(x, grid, size, start, mode)
    rows = x[:, :, start : start + tokens]
    return _run(rows, (grid[0], grid[1]), (size[0], size[1]), mode)


def _expect_map(x: Tensor) -> Tensor:
    expect_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"expected x [B, C, H, W], got {list(x.shape)}")
    return x


def _resize_maps(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    B, C, H, W = x.shape
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return _run(x, (H, W), size, mode, planes=True)
    rows = x.permute(0, 2, 3, 1).reshape(1, B, H * W, C)  # a view
    return _run(rows, (H, W), size, mode).view(B, *size, C).permute(0, 3, 1, 2)


def _resize_volumes(x: Tensor, size: tuple[int, int, int], mode: str) -> Tensor:
    """In the plane, and then along the time axis: the weights of the three axes are a product."""
    B, C, T, H, W = x.shape
    t, h, w = size
    if t == T:
        return _resize_maps(x.reshape(B, C * T, H, W), (h, w), mode).reshape(B, C, T, h, w)
    plane = _resize_maps(x.float().reshape(B, C * T, H, W), (h, w), mode)
    return _resize_maps(plane.reshape(B, C, T, h * w), (t, h * w), mode).reshape(B, C, t, h, w).to(x.dtype)


def _run(x: Tensor, grid: tuple[int, int], size: tuple[int, int], mode: str, planes: bool = False) -> Tensor:
    """x [B, C, H, W] (planes), or rows of channels [A, B, H * W, D], by the kernel, with a gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Resize.apply(x, grid, size, MODES.index(mode), planes, False)
    return _call(x, grid, size, MODES.index(mode), planes, False)


def _call(
    x: Tensor, grid: tuple[int, int], size: tuple[int, int], mode: int, planes: bool, transposed: bool
) -> Tensor:
    ops = kernels(x.detach())
    assert ops is not None
    if planes:
        return ops.resize_planes(x.contiguous(), *size, mode, transposed)
    rows = x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()
    return ops.resize_rows(rows, *grid, *size, mode, transposed)


class _Resize(torch.autograd.Function):
    """A linear map, whose gradient is its transpose, whose gradient is the map again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        grid: tuple[int, int],
        size: tuple[int, int],
        mode: int,
        planes: bool,
        transposed: bool,
    ) -> Tensor:
        ctx.arguments = (size, grid, mode, planes, not transposed)
        return _call(x, grid, size, mode, planes, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return _Resize.apply(grad, *ctx.arguments), None, None, None, None, None


@fake("resize_planes")
def _resize_planes_fake(x: Tensor, height: int, width: int, mode: int, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], height, width)


@fake("resize_rows")
def _resize_rows_fake(
    x: Tensor, h: int, w: int, height: int, width: int, mode: int, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], height * width, x.shape[3])
