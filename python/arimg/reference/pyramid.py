"""Resampling and the multi-scale residual encode in plain torch: the oracle of `arimg.ops.pyramid`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide
from arimg.reference.quantize import lookup, nearest_code


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x.clone()
    return F.interpolate(wide(x), size=tuple(size), mode=mode).to(x.dtype)


def area_down(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the cell of each output pixel: x [B, C, H, W] -> [B, C, h, w] (`F.interpolate`, mode
    "area").
    """
    return _resize(x, size, "area")


def bicubic_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resampling (a = -0.75, corners not aligned): x [B, C, h, w] -> [B, C, H, W]."""
    return _resize(x, size, "bicubic")


def residual_map(
    h: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor, ratio: float = 0.5
) -> Tensor:
    """What one scale adds to f_hat: the upsampled codes, mixed with their 3x3 convolution (phi).
    Differentiable.

    h [B, C, h, w], weight [C, C, 3, 3], bias [C] -> u = (1 - ratio) up(h) + ratio conv(up(h)) [B, C, H, W].
    """
    up = bicubic_up(h, size)
    return torch.lerp(up, F.conv2d(up, weight.to(up.dtype), bias.to(up.dtype), padding=1), ratio)


def accumulate_(
    f_hat: Tensor, h: Tensor, weight: Tensor, bias: Tensor, ratio: float = 0.5, residual: Tensor | None = None
) -> None:
    """In place f_hat += u and, where given, residual -= u, with u = `residual_map(h, ...)` in float32."""
    size = (f_hat.shape[-2], f_hat.shape[-1])
    u = residual_map(wide(h), size, wide(weight), wide(bias), ratio)
    f_hat.copy_(wide(f_hat) + u)
    if residual is not None:
        residual.copy_(wide(residual) - u)


def encode(
    f: Tensor,
    codebook: Tensor,
    weights: Tensor,
    biases: Tensor,
    scales: Sequence[tuple[int, int]],
    phi: Sequence[int],
    ratio: float = 0.5,
) -> tuple[list[Tensor], Tensor]:
    """Multi-scale residual encode of VAR (arXiv 2404.02905, algorithm 1).

    f [B, C, H, W], codebook [K, C], weights [P, C, C, 3, 3], biases [P, C], scales [(h, w), ...] from coarse
    to fine, phi[k] = the convolution that scale k uses. Returns the indices, int64 [B, h * w] per scale, and
    f_hat [B, C, H, W]. The residual is area-averaged to each scale but the last; both are
    carried in float32 whatever the dtype of f.
    """
    residual = wide(f.detach().clone())
    f_hat = torch.zeros_like(residual)
    indices = []
    for k, (h, w) in enumerate(scales):
        small = residual if k == len(scales) - 1 else area_down(residual, (h, w))
        rows = small.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        index = nearest_code(rows, codebook).reshape(len(f), h * w)
        codes = lookup(index, codebook).transpose(1, 2).reshape(len(f), -1, h, w)
        accumulate_(f_hat, codes, weights[phi[k]], biases[phi[k]], ratio, residual)
        indices.append(index)
    return indices, f_hat.to(f.dtype)
