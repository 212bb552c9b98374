"""Which systems there are, and their trained models on disk."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arimg.data.images import Images
from arimg.systems.base import System, SystemModel

MODULES = (
    "var",
    "flexvar",
    "mvar",
    "hmar",
    "nfig",
    "star",
    "tokenflow",
    "infinity",
    "llamagen",
    "nar",
    "jpeg_lm",
    "token_shuffle",
    "lumina_mgpt",
    "meissonic",
    "detailflow",
    "elm",
    "ctf",
    "vf_prompt",
    "speculative",
    "dd1",
)
MODEL_FILE = "model.safetensors"


@cache
def systems() -> dict[str, System]:
    """All systems by name, in the order of the list."""
    found = [s for m in MODULES for s in _of(import_module(f"arimg.systems.{m}"))]
    return {system.name: system for system in found}


def _of(module: Any) -> tuple[System, ...]:
    """A module has one SYSTEM or several SYSTEMS."""
    return getattr(module, "SYSTEMS", None) or (module.SYSTEM,)


def find(name: str) -> System:
    """The system of this name. Raises ValueError with the nearest names."""
    if name in systems():
        return systems()[name]
    near = difflib.get_close_matches(name, systems(), n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`arimg systems list` lists them"
    raise ValueError(f"unknown system {name!r}; {hint}")


@dataclass(frozen=True)
class Trained:
    """A model with the names of its classes."""

    system: System
    model: SystemModel
    classes: tuple[str, ...]


def save(trained: Trained, folder: Path) -> None:
    """Writes the model; its tokenizer lies in the same folder already."""
    about = {"system": trained.system.name, "classes": json.dumps(trained.classes)}
    tensors = {name: t.contiguous() for name, t in trained.model.state_dict().items()}
    save_file(tensors, folder / MODEL_FILE, about)


def load(folder: str | Path) -> Trained:
    """Reads what `save` wrote. Raises FileNotFoundError, and ValueError for weights that do not fit."""
    folder = Path(folder)
    path = folder / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"no trained model in {folder}: `arimg systems train NAME --out {folder}` makes one"
        )
    with safe_open(str(path), framework="pt") as file:
        about = dict(file.metadata() or {})
    system, classes = find(about["system"]), tuple(json.loads(about["classes"]))
    model = system.make(system.tokenizer(_no_images(classes), folder), len(classes))
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit {system.name}: {' '.join(str(error).split())[:200]}"
        ) from error
    return Trained(system, model.eval(), classes)


def _no_images(classes: tuple[str, ...]) -> Images:
    """For a tokenizer that is read, not made."""
    import numpy as np

    return Images(np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int64), (), classes)
