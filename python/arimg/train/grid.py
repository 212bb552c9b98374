"""Image grids and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def make_grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> one picture [3, H', W'], row by row, on light grey."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [B, 3, H, W], got {list(images.shape)}")
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    batch, _, height, width = images.shape
    columns = max(1, min(columns, batch))
    rows = -(-batch // columns)
    page = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 0.9)
    for i, image in enumerate(images.float().cpu()):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = image
    return page


def save_png(image: Tensor, path: str | Path) -> None:
    """Writes [3, H, W] in [0, 1]."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
