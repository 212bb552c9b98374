"""Tables of rotary position embeddings for `ops.append_`: what each family of systems rotates by.

Everything is one formula. A token has a coordinate on each axis, an axis owns a run of d channels, and pair j
of the axis turns by coordinate x theta^(-2 j / d). The variants differ in coordinates and in the order of the
axes. Angles are computed in float64 and cos and sin rounded to float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from arimg.reference.kv_cache import Rope

__all__ = ["rope_1d", "rope_2d", "rope_axes", "rope_lumina", "rope_normalised", "rope_scales"]

Shape = int | Sequence[int]


def rope_axes(
    coordinates: Tensor,
    dims: Sequence[int],
    theta: float = 10000.0,
    *,
    interleaved: bool = True,
    device: torch.device | str = "cpu",
) -> Rope:
    """coordinates [P, axes], dims: channels of each axis, even, head_dim in all -> tables [P, head_dim / 2].

    As in Meissonic (arXiv 2410.08261; dims 16, 56, 56) and Lumina-Image 2.0 (arXiv 2503.21758).
    """
    if coordinates.dim() != 2 or coordinates.shape[1] != len(dims):
        raise ValueError(f"expected coordinates [P, {len(dims)}], got {list(coordinates.shape)}")
    if not dims or any(d < 0 or d % 2 for d in dims):
        raise ValueError(f"expected even numbers of channels, got {tuple(dims)}")
    parts = []
    for coordinate, d in zip(coordinates.double().unbind(1), dims):
        frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / max(d, 1))
        parts.append(coordinate[:, None] * frequency.to(coordinate.device))
    angle = torch.cat(parts, 1)
    return Rope(angle.cos().float().to(device), angle.sin().float().to(device), interleaved)


def rope_1d(
    length: int,
    dim: int,
    theta: float = 10000.0,
    *,
    scale: float = 1.0,
    interleaved: bool = True,
    device: torch.device | str = "cpu",
) -> Rope:
    """Position i turns by i / scale (RoFormer, arXiv 2104.09864; D-AR, X-Omni, Lumina-mGPT).

    scale > 1 stretches trained positions over longer sequences (arXiv 2306.15595). Chameleon and Llama in the
    layout of Hugging Face pair channels by halves: interleaved=False.
    """
    positions = torch.arange(length, dtype=torch.float64)[:, None] / scale
    return rope_axes(positions, (dim,), theta, interleaved=interleaved, device=device)


def rope_2d(
    height: int,
    width: int,
    dim: int,
    theta: float = 10000.0,
    *,
    prefix: int = 0,
    device: torch.device | str = "cpu",
) -> Rope:
    """A raster grid: the first half of the channels turns by the row, the second by the column (LlamaGen).

    `prefix` tokens in front (class, text) have cos = sin = 0 as in the released code: their queries and keys
    become zero, while their values still count.
    """
    table = rope_axes(_grid(height, width), (dim // 2, dim // 2), theta, device=device)
    zeros = table.cos.new_zeros(prefix, dim // 2)
    return Rope(torch.cat((zeros, table.cos)), torch.cat((zeros, table.sin)))


def rope_scales(
    scales: Sequence[Shape],
    dim: int,
    theta: float = 10000.0,
    *,
    offset: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
) -> Rope:
    """A pyramid: token (i, j) of scale (h, w) stands at (round(i H / h), round(j W / w)), (H, W) the last
    scale; rows turn the first half of the channels (Infinity, arXiv 2412.04431).

    offset is added to all coordinates: VAREdit's source features stand at (H, W) (arXiv 2508.15772). Halves
    round to even.
    """
    H, W = _pair(scales[-1])
    grids = []
    for h, w in map(_pair, scales):
        stretch = torch.tensor([H / h, W / w], dtype=torch.float64)
        grids.append((_grid(h, w) * stretch).round())
    coordinates = torch.cat(grids) + torch.tensor(offset, dtype=torch.float64)
    return rope_axes(coordinates, (dim // 2, dim // 2), theta, device=device)


def rope_normalised(
    scales: Sequence[Shape],
    dim: int,
    extent: float = 64.0,
    theta: float = 10000.0,
    *,
    device: torch.device | str = "cpu",
) -> Rope:
    """A pyramid whose scales all reach from 0 to `extent`: token (i, j) of (h, w) stands at
    (j / (w - 1), i / (h - 1)) x extent, at 0 where a side is 1; columns turn the first half of the channels
    (STAR, arXiv 2406.10797).
    """
    grids = []
    for h, w in map(_pair, scales):
        largest = torch.tensor([max(h - 1, 1), max(w - 1, 1)], dtype=torch.float64)
        grids.append((_grid(h, w) / largest * extent).flip(1))
    return rope_axes(torch.cat(grids), (dim // 2, dim // 2), theta, device=device)


def rope_lumina(
    text: int,
    height: int,
    width: int,
    dims: Sequence[int] = (32, 32, 32),
    theta: float = 10000.0,
    *,
    device: torch.device | str = "cpu",
) -> Rope:
    """Text token i stands at (i, 0, 0), picture token (y, x) behind it at (text, y, x) (Lumina-Image 2.0)."""
    words = torch.zeros(text, 3, dtype=torch.float64)
    words[:, 0] = torch.arange(text)
    grid = _grid(height, width)
    picture = torch.cat((torch.full_like(grid[:, :1], text), grid), 1)
    return rope_axes(torch.cat((words, picture)), dims, theta, device=device)


def _grid(height: int, width: int) -> Tensor:
    """(row, column) of each token in raster order, float64 [height * width, 2]."""
    axes = [torch.arange(n, dtype=torch.float64) for n in (height, width)]
    return torch.cartesian_prod(*axes).reshape(-1, 2)


def _pair(shape: Shape) -> tuple[int, int]:
    return (shape, shape) if isinstance(shape, int) else (int(shape[0]), int(shape[1]))
