"""Token shuffle and two-level token sequences from their definitions: oracles of `arimg.ops.pyramid_tokens`.

Two-level sequences are made element by element in Python: slow, and plain to read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_shuffle(x: Tensor, s: int, grid: tuple[int, int]) -> Tensor:
    """x [B, H * W, C] -> [B, H W / s^2, s * s * C]: the tokens of each s x s window one after the other."""
    B, _, C = x.shape
    maps = x.transpose(1, 2).reshape(B, C, *grid)
    windows = F.unfold(maps.float(), s, stride=s)  # [B, C * s * s, windows]
    return windows.view(B, C, s * s, -1).permute(0, 3, 2, 1).flatten(2).to(x.dtype)


def token_unshuffle(x: Tensor, s: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `token_shuffle`; grid is (H, W) of the result."""
    B = x.shape[0]
    C = x.shape[2] // (s * s)
    windows = x.float().view(B, -1, s * s, C).permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(windows, grid, s, stride=s).flatten(2).transpose(1, 2).to(x.dtype)


def merge_two_levels(coarse: Tensor, fine: Tensor, is_fine: Tensor) -> Tensor:
    """coarse [B, C, h, w], fine [B, C, 2h, 2w], is_fine [B, h, w] -> [B, C, 2h, 2w]."""
    mask = is_fine.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    return torch.where(mask, fine, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))


def pack_two_levels(
    coarse: Tensor, fine: Tensor, is_fine: Tensor, pad: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """codes and positions [B, 4 h w] (padded) and lengths [B, 2] of coarse and fine codes."""
    B, h, w = is_fine.shape
    codes, positions = torch.full((2, B, 4 * h * w), pad).unbind()
    lengths = torch.zeros(B, 2, dtype=torch.int64)
    for b in range(B):
        level: list[list[tuple[int, int]]] = [[], []]
        for i in range(h):
            for j in range(w):
                if not is_fine[b, i, j]:
                    level[0].append((int(coarse[b, i, j]), i * w + j))
                    continue
                for y, x in ((2 * i, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j), (2 * i + 1, 2 * j + 1)):
                    level[1].append((int(fine[b, y, x]), y * 2 * w + x))
        for place, (code, position) in enumerate(level[0] + level[1]):
            codes[b, place], positions[b, place] = code, position
        lengths[b, 0], lengths[b, 1] = len(level[0]), len(level[1])
    return codes, positions, lengths


def unpack_two_levels(
    codes: Tensor, positions: Tensor, lengths: Tensor, grid: tuple[int, int], pad: int = -1
) -> tuple[Tensor, Tensor]:
    """The map of codes [B, 2h, 2w] and which of its pixels are fine: fine codes before coarse ones, and pad
    where there is neither.
    """
    (h, w), B = grid, len(codes)
    out = torch.full((B, 2 * h, 2 * w), pad)
    is_fine = torch.zeros(B, 2 * h, 2 * w, dtype=torch.bool)
    for b in range(B):
        first = int(lengths[b, 0])
        for place in range(first):
            i, j = divmod(int(positions[b, place]), w)
            out[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = codes[b, place]
        for place in range(first, first + int(lengths[b, 1])):
            y, x = divmod(int(positions[b, place]), 2 * w)
            out[b, y, x], is_fine[b, y, x] = codes[b, place], True
    return out, is_fine
