"""Token windows and sequences of two levels of detail. See docs/ops/pyramid.md.

These move elements and compute nothing, so they work for every dtype and device, and gradients pass through
them. All but `merge_two_levels` are compositions of torch operations. No host synchronisation: sequences have
a fixed length and say how much of it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, fake, kernels

__all__ = ["merge_two_levels", "pack_two_levels", "token_shuffle", "token_unshuffle", "unpack_two_levels"]


def token_shuffle(x: Tensor, s: int, grid: tuple[int, int]) -> Tensor:
    """s x s neighbouring tokens become one: x [B, H * W, C], grid (H, W) -> [B, H W / s^2, s * s * C].

    The channels of a window are its tokens', row by row (Token-Shuffle). One copy.
    Raises ValueError for shapes that do not fit.
    """
    H, W = _windows(s, grid)
    if x.dim() != 3 or x.shape[1] != H * W:
        raise ValueError(f"expected x [B, {H * W}, C], got {list(x.shape)}")
    B, _, C = x.shape
    windows = x.reshape(B, H // s, s, W // s, s * C).transpose(2, 3)
    return windows.reshape(B, (H // s) * (W // s), s * s * C)


def token_unshuffle(x: Tensor, s: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `token_shuffle`: x [B, H W / s^2, s * s * C], grid (H, W) -> [B, H * W, C].

    Raises ValueError for shapes that do not fit.
    """
    H, W = _windows(s, grid)
    if x.dim() != 3 or x.shape[1] * s * s != H * W or x.shape[2] % (s * s) != 0:
        raise ValueError(f"expected x [B, {H * W // (s * s)}, {s * s} C], got {list(x.shape)}")
    B, C = x.shape[0], x.shape[2] // (s * s)
    rows = x.reshape(B, H // s, W // s, s, s * C).transpose(2, 3)
    return rows.reshape(B, H * W, C)


def merge_two_levels(coarse: Tensor, fine: Tensor, is_fine: Tensor) -> Tensor:
    """Feature maps of two levels as one: coarse [B, C, h, w], fine [B, C, 2h, 2w] -> [B, C, 2h, 2w].

    Regions where is_fine [B, h, w] (bool) is set have the fine pixels, the others their coarse pixel four
    times (DQ-VAE). Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    B, C, h, w = coarse.shape if coarse.dim() == 4 else (0, 0, 0, 0)
    if coarse.dim() != 4 or tuple(fine.shape) != (B, C, 2 * h, 2 * w):
        raise ValueError(
            f"expected coarse [B, C, h, w] and fine [B, C, 2h, 2w], got {list(coarse.shape)} and "
            f"{list(fine.shape)}"
        )
    if fine.dtype != coarse.dtype:
        raise TypeError(f"expected fine of coarse's dtype {coarse.dtype}, got {fine.dtype}")
    _expect_mask(is_fine, (B, h, w))
    for name, t in (("fine", fine), ("is_fine", is_fine)):
        if t.device != coarse.device:
            raise ValueError(f"expected {name} on coarse's device {coarse.device}, got {t.device}")
    needs_grad = torch.is_grad_enabled() and (coarse.requires_grad or fine.requires_grad)
    plain = coarse.is_complex() or (needs_grad and coarse.dtype not in FLOATING)
    if plain or kernels(coarse.detach()) is None:
        return reference.merge_two_levels(coarse, fine, is_fine)
    if needs_grad:
        return _Merge.apply(coarse, fine, is_fine)
    return _merge(coarse, fine, is_fine)


def _merge(coarse: Tensor, fine: Tensor, is_fine: Tensor) -> Tensor:
    ops = kernels(coarse.detach())
    assert ops is not None
    return ops.merge_two_levels(coarse.contiguous(), fine.contiguous(), is_fine.contiguous())


class _Merge(torch.autograd.Function):
    """Linear in both maps; the gradient of its gradient is the merge again."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, fine: Tensor, is_fine: Tensor) -> Tensor:
        ctx.save_for_backward(is_fine)
        return _merge(coarse, fine, is_fine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Split.apply(grad, ctx.saved_tensors[0]), None


class _Split(torch.autograd.Function):
    """The gradient of `_Merge`: what goes to the coarse and to the fine map."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, is_fine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(is_fine)
        ops = kernels(grad.detach())
        assert ops is not None
        coarse, fine = ops.merge_two_levels_backward(grad.contiguous(), is_fine.contiguous())
        return coarse, fine

    @staticmethod
    def backward(ctx: Any, coarse: Tensor, fine: Tensor) -> tuple[Tensor, None]:
        return _Merge.apply(coarse, fine, ctx.saved_tensors[0]), None


@fake("merge_two_levels")
def _merge_fake(coarse: Tensor, fine: Tensor, is_fine: Tensor) -> Tensor:
    return torch.empty_like(fine)


@fake("merge_two_levels_backward")
def _merge_backward_fake(grad: Tensor, is_fine: Tensor) -> tuple[Tensor, Tensor]:
    B, C, H, W = grad.shape
    return grad.new_empty(B, C, H // 2, W // 2), torch.empty_like(grad)


def pack_two_levels(
    coarse: Tensor, fine: Tensor, is_fine: Tensor, pad: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of two levels as ragged sequences: all coarse ones, then all fine ones (DQ-Transformer).

    coarse [B, h, w] and fine [B, 2h, 2w] (int64), is_fine [B, h, w] (bool): a region gives one coarse code,
    or its four fine ones row by row; regions are taken row by row. Returns codes and positions, [B, 4 h w]
    with `pad` beyond the end, and lengths [B, 2] of both parts. A position counts the cells of its own
    level's grid, row by row. Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    if coarse.dim() != 3 or fine.dim() != 3:
        raise ValueError(
            f"expected coarse [B, h, w] and fine [B, 2h, 2w], got {list(coarse.shape)} and {list(fine.shape)}"
        )
    B, h, w = coarse.shape
    for name, t in (("coarse", coarse), ("fine", fine)):
        if t.dtype != torch.int64:
            raise TypeError(f"expected {name} of int64, got {t.dtype}")
    if tuple(fine.shape) != (B, 2 * h, 2 * w):
        raise ValueError(f"expected fine {[B, 2 * h, 2 * w]}, got {list(fine.shape)}")
    _expect_mask(is_fine, (B, h, w))
    n = h * w
    mask = is_fine.reshape(B, n)
    lengths = torch.stack([(~mask).sum(1), 4 * mask.sum(1)], 1)
    # Where each code goes; those that are not used go to one place beyond the end, which is cut off.
    coarse_at = torch.where(mask, 4 * n, (~mask).cumsum(1) - 1)
    first = lengths[:, :1] + 4 * (mask.cumsum(1) - 1)
    four = torch.arange(4, device=mask.device)
    fine_at = torch.where(mask[:, :, None], first[:, :, None] + four, 4 * n)
    at = torch.cat([coarse_at, fine_at.flatten(1)], 1)
    cells = torch.arange(4 * n, device=mask.device).view(1, 2 * h, 2 * w)
    positions = torch.cat([cells.view(-1)[:n], _by_region(cells)[0]]).expand(B, -1)
    codes = torch.cat([coarse.reshape(B, n), _by_region(fine)], 1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_full((B, 4 * n + 1), pad).scatter(1, at, values)[:, : 4 * n]

    return scatter(codes), scatter(positions), lengths


def unpack_two_levels(
    codes: Tensor, positions: Tensor, lengths: Tensor, grid: tuple[int, int], pad: int = -1
) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_two_levels`, for any order of positions: what a generator has drawn.

    codes and positions [B, L] (int64), lengths [B, 2], grid (h, w) -> the map of codes [B, 2h, 2w] and which
    of its pixels have a fine code (bool). A fine code counts before the coarse one, which stands for its four
    pixels; pixels with neither are `pad`. Positions of one level must differ.
    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    if codes.dim() != 2 or positions.shape != codes.shape:
        raise ValueError(
            f"expected codes and positions [B, L], got {list(codes.shape)} and {list(positions.shape)}"
        )
    B, L = codes.shape
    if tuple(lengths.shape) != (B, 2):
        raise ValueError(f"expected lengths {[B, 2]}, got {list(lengths.shape)}")
    for name, t in (("codes", codes), ("positions", positions), ("lengths", lengths)):
        if t.dtype != torch.int64:
            raise TypeError(f"expected {name} of int64, got {t.dtype}")
    h, w = grid
    place = torch.arange(L, device=codes.device)
    coarse_end, fine_end = lengths[:, :1], lengths.sum(1, keepdim=True)

    def level(cells: int, used: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.where(used, positions, cells)
        found = torch.zeros(B, cells + 1, dtype=torch.bool, device=codes.device)
        values = codes.new_full((B, cells + 1), pad).scatter(1, at, codes)
        return values[:, :cells], found.scatter(1, at, used)[:, :cells]

    coarse, _ = level(h * w, place < coarse_end)
    fine, is_fine = level(4 * h * w, (place >= coarse_end) & (place < fine_end))
    up = coarse.view(B, h, 1, w, 1).expand(B, h, 2, w, 2).reshape(B, 4 * h * w)
    out = torch.where(is_fine, fine, up).view(B, 2 * h, 2 * w)
    return out, is_fine.view(B, 2 * h, 2 * w)


def _by_region(fine: Tensor) -> Tensor:
    """[B, 2h, 2w] -> [B, 4 h w]: the four cells of each region together."""
    B, H, W = fine.shape
    return fine.reshape(B, H // 2, 2, W // 2, 2).transpose(2, 3).reshape(B, H * W)


def _windows(s: int, grid: tuple[int, int]) -> tuple[int, int]:
    H, W = grid
    if s <= 0 or H % s != 0 or W % s != 0:
        raise ValueError(f"expected a window that divides the grid {tuple(grid)}, got {s}")
    return H, W


def _expect_mask(is_fine: Tensor, shape: tuple[int, int, int]) -> None:
    if is_fine.dtype != torch.bool:
        raise TypeError(f"expected is_fine of bool, got {is_fine.dtype}")
    if tuple(is_fine.shape) != shape:
        raise ValueError(f"expected is_fine {list(shape)}, got {list(is_fine.shape)}")
