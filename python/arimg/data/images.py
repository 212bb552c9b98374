"""Images with classes from any folder or tar: the folder a file lies in is its class.

All images are decoded once to one uint8 array (64 px: 12 KiB each, 100,000 of them 1.2 GB). Transparent
images are laid on white. Splits depend on names alone: a file falls on the same side on every machine and in
any collection, and files whose stem agrees up to a `~` (`cook~woman.png`, `cook~man.png`) stay together.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class Entry(NamedTuple):
    """One file: its path inside the collection and its bytes."""

    path: PurePosixPath
    data: bytes


def read_entries(source: Path) -> Iterator[Entry]:
    """Yields the image files of a folder or tar, sorted by path."""
    if not source.exists():
        raise FileNotFoundError(f"no such folder or tar of images: {source}")
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            yield Entry(PurePosixPath(path.relative_to(source).as_posix()), path.read_bytes())
        return
    if not tarfile.is_tarfile(source):
        raise ValueError(f"expected a folder or a tar of images, got {source}")
    with tarfile.open(source) as archive:
        members = {PurePosixPath(m.name): m for m in archive.getmembers() if m.isfile()}
        for name in sorted(members):
            if name.suffix.lower() in SUFFIXES:
                file = archive.extractfile(members[name])
                assert file is not None
                yield Entry(name, file.read())


def open_image(file: Path | io.BytesIO, size: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 [size, size, 3]: on white, centre-cropped, resized (None: as it is).

    Raises ValueError where the file is no image.
    """
    try:
        image: Image.Image = Image.open(file)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"not a readable image: {getattr(file, 'name', file)} ({error})") from error
    if image.mode == "P" or "A" in image.getbands():
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        image = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.moveaxis(pixels, -1, -3).copy()).float() / 255


def group_of(name: str) -> str:
    """The part of a file's stem before `~`: the unit that splits keep together."""
    return PurePosixPath(name).stem.split("~")[0]


@dataclass(frozen=True)
class Images:
    """Decoded images: `pixels` uint8 [N, S, S, 3], `labels` int64 [N] into `classes`, `names` the paths."""

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        return int(self.pixels.shape[1])

    def subset(self, indices: Sequence[int] | np.ndarray) -> Images:
        keep = np.asarray(indices, dtype=np.int64)
        return Images(self.pixels[keep], self.labels[keep], tuple(self.names[i] for i in keep), self.classes)

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[Images, Images]:
        """(training, held out): a name is held out if its hash falls below the fraction `held_out`."""
        if not 0 <= held_out < 1:
            raise ValueError(f"expected a held-out fraction in [0, 1), got {held_out}")
        side = np.array(
            [_unit_hash(f"{seed}:{group_of(name)}") < held_out for name in self.names], dtype=bool
        )
        return self.subset(np.flatnonzero(~side)), self.subset(np.flatnonzero(side))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1]."""
        return to_tensor(self.pixels[np.asarray(indices)])


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def load_images(source: str | Path, size: int, classes: Sequence[str] | None = None) -> Images:
    """Reads a folder or tar. `classes`: the order of classes (default: the folders found, sorted).

    Raises FileNotFoundError, and ValueError for an empty collection, unreadable images or unknown folders.
    """
    if size < 1:
        raise ValueError(f"expected a positive image size, got {size}")
    pixels, folders, names = [], [], []
    for entry in read_entries(Path(source)):
        try:
            pixels.append(open_image(io.BytesIO(entry.data), size))
        except ValueError as error:
            raise ValueError(f"{entry.path} in {source}: {error}") from error
        folders.append(entry.path.parent.as_posix() if entry.path.parent.name else "all")
        names.append(entry.path.as_posix())
    if not names:
        raise ValueError(f"expected images ({', '.join(sorted(SUFFIXES))}) in {source}, found none")
    known = tuple(classes) if classes is not None else tuple(sorted(set(folders)))
    index = {name: i for i, name in enumerate(known)}
    unknown = sorted(set(folders) - set(known))
    if unknown:
        raise ValueError(
            f"expected folders among the {len(known)} known classes, got {unknown[:3]} in {source}"
        )
    labels = np.array([index[folder] for folder in folders], dtype=np.int64)
    return Images(np.stack(pixels), labels, tuple(names), known)


def augment(images: Tensor, generator: torch.Generator, shift: int = 0, flip: bool = False) -> Tensor:
    """Shifts each image [B, 3, S, S] by up to `shift` pixels (edges repeated) and mirrors half of them."""
    if shift:
        size = images.shape[-1]
        padded = torch.nn.functional.pad(images, (shift,) * 4, mode="replicate")
        offsets = torch.randint(0, 2 * shift + 1, (len(images), 2), generator=generator).tolist()
        images = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, offsets)])
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
    return images
