"""The frequency bands of next-frequency prediction (NFIG, arXiv 2503.07076). See docs/ops/pyramid.md.

A composition: products with the orthonormal real Fourier basis of each axis, which torch differentiates. A
band depends on |frequency| along each axis alone, so in that basis its mask is a factor for each coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from arimg.ops._common import expect_floating
from arimg.reference.pyramid_bands import band_masks

__all__ = ["band_masks", "frequency_bands"]


def frequency_bands(x: Tensor, scales: Sequence[tuple[int, int]]) -> Tensor:
    """The parts of x [B, C, H, W] in the bands of `band_masks((H, W), scales)`: -> [bands, B, C, H, W].

    Their sum is x up to rounding. float32, bfloat16 or float16 with arithmetic in float32; the result has x's
    dtype. Raises ValueError or TypeError for shapes or dtypes that do not fit, and ValueError for more bands
    than the grid has radii.
    """
    expect_floating("x", x)
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"expected x [B, C, H, W] with H, W > 0, got {list(x.shape)}")
    if not scales:
        raise ValueError("expected at least one scale, got none")
    B, C, H, W = x.shape
    # A compiler traces the making of the tables and keeps what comes out: it has no use for a cache.
    tables = _tables if torch.compiler.is_compiling() else _cached_tables
    rows, columns, masks = tables(H, W, tuple((h, w) for h, w in scales), x.device)
    spectrum = rows.T @ (x.float().reshape(B * C * H, W) @ columns).view(B * C, H, W)
    parts = (spectrum * masks[:, None]).view(-1, W) @ columns.T
    return (rows @ parts.view(-1, H, W)).view(len(scales), B, C, H, W).to(x.dtype)


def _tables(
    H: int, W: int, scales: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of both axes and the masks of the bands by coefficient."""
    masks = band_masks((H, W), scales)
    rows, columns = (torch.tensor([_frequency(n, i) for i in range(n)]) for n in (H, W))
    by_coefficient = masks[:, rows][:, :, columns].float()
    return _basis(H).to(device), _basis(W).to(device), by_coefficient.to(device)


_cached_tables = lru_cache(maxsize=16)(_tables)


def _frequency(n: int, column: int) -> int:
    """Of the basis below: 0, 1, 1, 2, 2, ..."""
    return (column + 1) // 2


def _basis(n: int) -> Tensor:
    """[n, n], orthonormal columns: cosine 0, then cosine and sine of each frequency (for even n the last one
    has a cosine only).
    """
    columns = []
    for i in range(n):
        frequency, wave = _frequency(n, i), math.sin if i % 2 == 0 else math.cos
        if i == 0:
            wave = math.cos
        scale = math.sqrt((1 if 2 * frequency % n == 0 else 2) / n)
        columns.append([scale * wave(2 * math.pi * frequency * t / n) for t in range(n)])
    return torch.tensor(columns).T.contiguous()
