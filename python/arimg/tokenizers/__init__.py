"""Models that turn images into tokens and back."""

from pathlib import Path
from typing import TypeVar

from arimg.nn import checkpoint
from arimg.nn.checkpoint import save
from arimg.tokenizers.latent import LatentTokenizer
from arimg.tokenizers.vqmodel import VQModel, VQModelOutput
from arimg.tokenizers.vqvae import SCALES_256, SCALES_512, VQVAE, VQVAEOutput

__all__ = [
    "SCALES_256",
    "SCALES_512",
    "VQVAE",
    "LatentTokenizer",
    "VQModel",
    "VQModelOutput",
    "VQVAEOutput",
    "load",
    "load_vqmodel",
    "save",
]

_Tokenizer = TypeVar("_Tokenizer", VQVAE, VQModel)


def load(path: str | Path) -> VQVAE:
    """Read a tokenizer written by `save`, or a plain state dict of the released kind; in evaluation mode."""
    return _load(VQVAE, path)


def load_vqmodel(path: str | Path) -> VQModel:
    """As `load`, for LlamaGen's tokenizer."""
    return _load(VQModel, path)


def _load(kind: type[_Tokenizer], path: str | Path) -> _Tokenizer:
    state, entry = checkpoint.read(path)
    if entry is None:
        return kind.from_state_dict(state)
    if entry["kind"] != kind.__name__:
        wanted = "tokenizer" if kind is VQVAE else kind.__name__
        raise ValueError(f"expected a {wanted} in {str(path)!r}, got a {entry['kind']}")
    model = kind(**entry["config"]).eval()
    checkpoint.load_checked(model, state, kind.__name__)
    return model
