"""Resampling in plain torch: the oracle of `arimg.ops.pyramid_resize`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide


def resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`F.interpolate` with corners not aligned, in float32: x [B, C, H, W] with "area", "bilinear" or
    "bicubic", or x [B, C, T, H, W] with "area" or "trilinear". Equal sizes copy.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x.clone()
    return F.interpolate(wide(x), size=tuple(size), mode=mode).to(x.dtype)


def area_down(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the cell of each output pixel: x [B, C, H, W] -> [B, C, h, w]."""
    return resize(x, size, "area")


def bicubic_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resampling (a = -0.75, corners not aligned): x [B, C, h, w] -> [B, C, H, W]."""
    return resize(x, size, "bicubic")


def bilinear_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling (corners not aligned): x [B, C, h, w] -> [B, C, H, W]."""
    return resize(x, size, "bilinear")


def pool_tokens(
    x: Tensor, grid: tuple[int, int], size: tuple[int, int], start: int = 0, mode: str = "area"
) -> Tensor:
    """Tokens start .. start + h w of x [B, H, L, D], a grid (h, w), resampled: -> [B, H, h_k w_k, D]."""
    (h, w), (B, H, _, D) = grid, x.shape
    maps = x[:, :, start : start + h * w].reshape(B * H, h, w, D).permute(0, 3, 1, 2)
    return resize(maps, size, mode).flatten(2).transpose(1, 2).reshape(B, H, -1, D)
