"""LlamaGen: token by token in raster order (arXiv 2406.06525), the generator of
`arimg.generators.LlamaGen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.generators import LlamaGen
from arimg.generators.loop import Session
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE


class GridModel(LlamaGen, SystemModel):
    """A LlamaGen over the tokens of a tokenizer of one map, int64 [B, h * w]."""

    title = "LlamaGen"
    plain = "without a cache", {"cached": False}
    tokenizer = Hidden()

    def __init__(self, tokenizer: VQVAE, num_classes: int, **size: Any) -> None:
        super().__init__(tokenizer.vocab_size, num_classes, grid=tokenizer.scales[-1][0], **size)
        self.tokenizer = tokenizer

    @staticmethod
    def _sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        """As of LlamaGen; the tokenizer, an option of `from_state_dict`, says how many tokens there are."""
        sizes = LlamaGen._sizes(state, heads)
        return {name: n for name, n in sizes.items() if name != "vocab_size"}

    def encode(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer.encode(pixels)[-1]
        return tokens

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(labels, examples[:, :-1]).flatten(0, 1), examples.flatten())

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        pictures: Tensor = self.tokenizer.decode([torch.cat(tokens, 1)])
        return pictures


SIZE: dict[str, Any] = {"depth": 6, "width": 192, "heads": 3, "dropout": 0.0}


def make(tokenizer: Any, classes: int) -> GridModel:
    return GridModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "llamagen",
    "LlamaGen",
    "raster",
    "arXiv 2406.06525",
    "token by token in raster order, a Llama with 2-D RoPE",
    grid_tokenizer,
    make,
    released=True,
)
