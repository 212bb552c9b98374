"""Trained models: a tokenizer, a generator and the names of its classes, in one folder.

The folder holds `tokenizer.safetensors` and `var.safetensors`; the second has in its metadata `classes` (JSON
list) and `sampling` (JSON: arguments of `VAR.generate` that suit the model).
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from arimg import generators, tokenizers
from arimg.generators import VAR
from arimg.tokenizers import VQVAE

DEFAULT = "emoji64"
TOKENIZER_FILE, GENERATOR_FILE = "tokenizer.safetensors", "var.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A generator with its tokenizer. `classes` is empty where the files name none."""

    tokenizer: VQVAE
    var: VAR
    classes: tuple[str, ...]
    sampling: dict[str, Any]

    def label(self, name: str) -> int:
        """The label of a class name or number. Raises ValueError with the nearest names."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < self.var.num_classes:
            return int(name)
        if not self.classes:
            raise ValueError(f"expected a class number from 0 to {self.var.num_classes - 1}, got {name!r}")
        near = difflib.get_close_matches(name, self.classes, n=3, cutoff=0.3)
        near += [c for c in self.classes if name.lower() in c and c not in near][: 5 - len(near)]
        hint = f"did you mean {', '.join(near)}?" if near else "`arimg classes` lists them"
        raise ValueError(f"unknown class {name!r}; {hint}")


def load(model: str | Path = DEFAULT, tokenizer: str | Path | None = None) -> Bundle:
    """Loads a bundled model by name, a folder, or a file of generator weights with its tokenizer's file.

    Raises FileNotFoundError for missing files and ValueError for weights that do not fit.
    """
    bundled = Path(__file__).parent / str(model)
    path = bundled if bundled.is_dir() else Path(model)
    if path.is_dir():
        tokenizer, path = tokenizer or path / TOKENIZER_FILE, path / GENERATOR_FILE
    elif not path.exists():
        names = sorted(p.name for p in Path(__file__).parent.iterdir() if (p / GENERATOR_FILE).exists())
        raise FileNotFoundError(f"no model {str(model)!r}: expected a folder, a file or one of {names}")
    elif tokenizer is None:
        raise ValueError(f"{path} is a generator alone: give its tokenizer's file too")
    tok = tokenizers.load(tokenizer)
    var = generators.load(path, tok)
    about = metadata(path)
    classes = tuple(json.loads(about.get("classes", "[]")))
    if classes and len(classes) != var.num_classes:
        raise ValueError(f"expected {var.num_classes} class names in {path}, got {len(classes)}")
    return Bundle(tok, var, classes, json.loads(about.get("sampling", "{}")))


def save(bundle: Bundle, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
    """Writes both files; `dtype` of the stored weights (None: as they are)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers.save(bundle.tokenizer, folder / TOKENIZER_FILE, dtype=dtype)
    about = {"classes": json.dumps(bundle.classes), "sampling": json.dumps(bundle.sampling)}
    generators.save(bundle.var, folder / GENERATOR_FILE, dtype=dtype, **about)


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})
