"""NAR: all tokens of equal distance to the top left corner at once (arXiv 2503.10696).

A token (h, w) is predicted by its two neighbours: the mean of what (h, w - 1) says is on its right and of
what (h - 1, w) says is below it. A square of n x n tokens takes 2 n - 1 passes. The sequence stands in the
order of the diagonals, so a diagonal is appended to the caches as it is and no position is scattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from arimg.cache import KVCache
from arimg.generators.llamagen import Attend, Decoder, Layer, LlamaSession, drop, norm_scale
from arimg.generators.loop import Sampler, Turn
from arimg.guidance import Guidance
from arimg.layout import Layout, diagonal_order
from arimg.nn.linear import narrow_linear
from arimg.reference.kv_cache import Rope
from arimg.systems.base import System
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE


class NarModel(GridModel):
    """A LlamaGen with a second head, which stands behind one more layer. Parameter names are the released
    ones.
    """

    title = "NAR"
    plain = "token by token", {"raster": True}
    sampler = Sampler(Guidance(2.0))

    def __init__(self, tokenizer: VQVAE, num_classes: int, **size: Any) -> None:
        super().__init__(tokenizer, num_classes, **size)
        self.layers.append(Layer(self.width, self.heads, self.kv_heads, self.hidden))
        self.medusa_norm = nn.RMSNorm(self.width)
        self.medusa_output = nn.Linear(self.width, self.vocab_size, bias=False)
        self._initialise()

    @staticmethod
    def _sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        sizes = GridModel._sizes(state, heads)
        return {**sizes, "depth": sizes["depth"] - 1}  # the last layer is that of the second head

    @cached_property
    def order(self) -> Tensor:
        """The raster index of each token of the sequence."""
        return diagonal_order(self.grid, self.grid)

    @property
    def layout(self) -> Layout:
        return Layout.diagonals(self.grid, self.grid)

    def rope(self) -> Rope:
        return in_order(super().rope(), self.order)

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        seen = self.layout.visibility("level-causal", prefix=1, device=device)
        return seen.row_start[:length], seen.row_end[:length]

    def decoder(self) -> Decoder:
        return TwoHeads(self)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Labels [B], all tokens but the last [B, length - 1] in the order of the diagonals -> [B, length,
        V].
        """
        if indices.shape[1:] != (self.length - 1,):
            wanted = [len(labels), self.length - 1]
            raise ValueError(f"expected indices {wanted}, got {list(indices.shape)}")
        return mean_of(super().forward(labels, indices), sources(self.order, self.grid))

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels)[:, self.order]

    def decode(self, session: Any, tokens: list[Tensor]) -> Tensor:
        return super().decode(session, [torch.cat(tokens, 1)[:, session.order.argsort()]])

    def begin(self, condition: Any, guided: bool, **options: Any) -> NarSession:
        """Options: raster, one token after another, row by row."""
        labels = self.labels(condition)
        return NarSession(self, self.prefix(self.with_unconditional(labels, guided)), len(labels), **options)


class NarSession(LlamaSession):
    """As of LlamaGen, a diagonal at a time. raster: the same network in raster order, a token at a time, from
    the outputs of the row before.
    """

    def __init__(self, model: NarModel, prefix: Tensor, rows: int, *, raster: bool = False) -> None:
        super().__init__(model, prefix, rows)
        self.raster, self.order = raster, model.order
        if raster:
            self.order = torch.arange(model.length)
            self.layout = Layout.raster(model.grid, model.grid)
            self.rope = in_order(self.rope, model.order.argsort())
        self.sources = sources(self.order, model.grid)
        self.outputs = torch.empty(len(prefix), 0, 2, model.vocab_size, device=prefix.device)
        self.first = 0  # which input the first of them belongs to

    def logits(self, turn: Turn) -> Tensor:
        out = self.run(turn)
        kept = self.outputs if self.raster else self.outputs[:, :0]
        self.first += self.outputs.shape[1] - kept.shape[1]
        self.outputs = torch.cat((kept[: len(out)], out), 1)
        start, end = self.layout.segments[turn.step]
        return mean_of(self.outputs, self.sources[start:end] - 2 * self.first)

    def attend(self, cache: KVCache, q: Tensor) -> Tensor:
        return cache.attend(q)


class TwoHeads(Decoder):
    """What is on the right, after all layers but the last, and what is below, after the last: [B, L, 2,
    V].
    """

    def __init__(self, model: NarModel) -> None:
        super().__init__(model)
        self.below = norm_scale(model.medusa_norm), model.medusa_output.weight

    def run(self, x: Tensor, attend: Attend, dropout: float = 0.0) -> Tensor:
        h = self.hidden(drop(x.float(), dropout), x.dtype, attend, dropout, end=-1)
        last = self.hidden(h, x.dtype, attend, dropout, start=len(self.layers) - 1)
        norm, weight = self.below
        return torch.stack((self.head(h), narrow_linear(self.normed(last, norm), weight)), 2)


def sources(order: Tensor, side: int) -> Tensor:
    """Which two outputs predict each token: int64 [side^2, 2], 2 input + head of the sequence class token,
    tokens in this order (raster indices). Where there is one neighbour, it is both.
    """
    inputs = order.argsort() + 1  # of each raster index
    row, column = order // side, order % side
    right = 2 * inputs[(order - 1).clamp(min=0)]
    below = 2 * inputs[(order - side).clamp(min=0)] + 1
    right = torch.where(column == 0, below, right)
    below = torch.where(row == 0, right, below)
    corner = order == 0
    return torch.stack((torch.where(corner, 0, right), torch.where(corner, 1, below)), 1)


def mean_of(outputs: Tensor, index: Tensor) -> Tensor:
    """outputs [B, L, 2, V], index [n, 2] -> the mean of two of them each, [B, n, V]."""
    flat = outputs.flatten(1, 2)
    index = index.to(flat.device)
    return (flat[:, index[:, 0]] + flat[:, index[:, 1]]) / 2


def in_order(rope: Rope, order: Tensor) -> Rope:
    """The rows of a table behind its first one, in this order."""
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), order + 1)).to(rope.cos.device)
    return Rope(rope.cos[rows], rope.sin[rows], rope.interleaved)


def make(tokenizer: Any, classes: int) -> NarModel:
    return NarModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "nar",
    "NAR",
    "raster",
    "arXiv 2503.10696",
    "all tokens of a diagonal at once, the mean of two heads: on the right and below",
    grid_tokenizer,
    make,
    "video is left out",
    released=True,
)
