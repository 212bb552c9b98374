"""VAR: next-scale prediction (arXiv 2404.02905), the generator of `arimg.generators.VAR` as a system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.data.images import Images
from arimg.generators import VAR
from arimg.generators.loop import Session
from arimg.generators.var import VarSession
from arimg.systems.base import System, SystemModel
from arimg.systems.tokenizer import scale_tokenizer
from arimg.tokenizers import VQVAE


class VarModel(VAR, SystemModel):
    """A VAR that trains on the indices of all scales side by side, int64 [B, L]."""

    title = "VAR"
    plain = "without a cache", {"cached": False}

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat(self.tokenizer.encode(pixels), 1)

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        x = self.tokenizer.quantize.generator_input(examples.split(self.layout.sizes, 1))
        return F.cross_entropy(self(labels, x).flatten(0, 1), examples.flatten())

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        assert isinstance(session, VarSession)
        return self.tokenizer.decode_features(session.f_hat)


def tokenizer(images: Images, folder: Path) -> VQVAE:
    """The bundled one, whatever the images are."""
    return scale_tokenizer()


def make(tokenizer: Any, classes: int) -> VarModel:
    return VarModel(tokenizer, classes, depth=6, width=192, heads=3, shared_adaln=True)


SYSTEM = System(
    "var",
    "VAR",
    "next-scale",
    "arXiv 2404.02905",
    "all tokens of a scale at once, from the sum of the scales before",
    tokenizer,
    make,
    released=True,
)
