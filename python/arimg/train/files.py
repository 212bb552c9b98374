"""Files that are written whole or not at all, and results that are kept in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Replaces the file at once, so that a kill at any moment leaves what was there before."""
    partial = path.with_suffix(".part")
    torch.save(content, partial)
    os.replace(partial, path)


def kept(path: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives (tensors, numbers), read from the file where it was made under the same key."""
    if path.exists():
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        if saved["key"] == key:
            return saved
    content = {"key": key, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(content, path)
    return content
