"""DetailFlow's generator (github.com/ByteFlow-AI/DetailFlow, arXiv 2505.21473): one token at a time for the
first group, then a whole group per pass.

Tokens stand in groups of n. Behind the last token before a group follow n - 1 learned slots; that token and
the slots predict the group's n tokens, independently of each other. A group and the slots behind it see each
other and all groups before them, so everything is appended to the caches once. The released group sampling
runs without caches; that is the second of the ways here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.cache import KVCache
from arimg.generators.llamagen import LlamaSession
from arimg.generators.loop import Sampler, Turn, generate
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn.rope import rope_axes
from arimg.reference.kv_cache import Rope
from arimg.systems.base import System
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE


class DetailFlowModel(GridModel):
    """Groups are the rows of the map, n = its side. Inputs: class, first row, slots, row, slots, ..., row."""

    sampler = Sampler(Guidance(1.45))

    def __init__(self, tokenizer: VQVAE, num_classes: int, **size: Any) -> None:
        super().__init__(tokenizer, num_classes, **size)
        groups = self.grid - 1
        self.slots = nn.Parameter(0.02 * torch.randn(groups, self.grid - 1, self.width))

    @property
    def layout(self) -> Layout:
        return Layout.groups([1] * self.grid + [self.grid] * (self.grid - 1))

    @property
    def levels(self) -> list[int]:
        """How many inputs each step appends, the class first: all of a level see each other."""
        n = self.grid
        return [1] * n + [n] + [2 * n - 1] * (n - 2)

    def rope(self) -> Rope:
        """Axes: group and place in it; slots stand where the tokens stand that they predict."""
        n, dim = self.grid, self.width // self.heads
        places = [(0, 0), *((0, i + 1) for i in range(n))]
        for group in range(1, n):
            places += [(group, i + 1) for i in range(1, n)]
            places += [(group, i + 1) for i in range(n)]
        at, device = torch.tensor(places), self.tok_embeddings.weight.device
        return rope_axes(at, (dim // 2, dim // 2), self.rope_base, device=device)

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor(self.levels)
        end = sizes.cumsum(0).repeat_interleave(sizes)[:length].to(device, torch.int32)
        return torch.zeros_like(end), end

    def inputs(self, tokens: Tensor) -> Tensor:
        """The tokens [B, m] that are known, whole steps, with the slots that they need: [B, L, C]."""
        n, rows, h = self.grid, len(tokens), self.embed(tokens)
        parts = [h[:, :n]]
        for group in range(1, n):
            if tokens.shape[1] < group * n:
                break
            if group > 1:
                parts.append(h[:, (group - 1) * n : group * n])
            parts.append(self.slots[group - 1].expand(rows, -1, -1))
        return torch.cat(parts, 1)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Labels [B], all tokens but those of the last group [B, length - n] -> logits [B, length, V]."""
        n = self.grid
        if indices.shape[1:] != (self.length - n,):
            wanted = [len(labels), self.length - n]
            raise ValueError(f"expected indices {wanted}, got {list(indices.shape)}")
        labels = self.dropped(self.labels(labels))
        logits = self.teach(torch.cat((self.prefix(labels), self.inputs(indices)), 1))
        groups = logits[:, 2 * n :].unflatten(1, (n - 2, 2 * n - 1))[:, :, -n:]
        return torch.cat((logits[:, : 2 * n], groups.flatten(1, 2)), 1)

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(labels, examples[:, : -self.grid]).flatten(0, 1), examples.flatten())

    def begin(self, condition: Any, guided: bool, **options: Any) -> DetailFlowSession:
        """Options: cached=False, which runs all inputs again in each pass, as released."""
        labels = self.labels(condition)
        prefix = self.prefix(self.with_unconditional(labels, guided))
        return DetailFlowSession(self, prefix, len(labels), **options)

    def ways(self) -> dict[str, Callable[[Tensor, int], Iterator[Turn]]]:
        return {
            "DetailFlow": lambda labels, seed: generate(self, labels, seed=seed),
            "without caches, as released": lambda labels, seed: generate(
                self, labels, seed=seed, cached=False
            ),
        }


class DetailFlowSession(LlamaSession):
    """As of LlamaGen; a step appends its tokens and the slots of the next group."""

    model: DetailFlowModel

    def __init__(self, model: DetailFlowModel, prefix: Tensor, rows: int, *, cached: bool = True) -> None:
        super().__init__(model, prefix, rows)
        self.cached, self.seen = cached, prefix

    def inputs(self) -> int:
        return sum(self.model.levels) - 1

    def logits(self, turn: Turn) -> Tensor:
        n = self.layout.sizes[turn.step]
        if self.cached:
            return self.run(turn)[:, -n:]
        rows = len(self.seen) if turn.guidance is not None else self.rows
        return self.model.teach(self.seen[:rows])[:, -n:]

    def feed(self, turn: Turn) -> None:
        n, step = self.model.grid, turn.step
        self.last = turn.drawn[:, -1]
        self.pending = self._embed(turn.drawn)
        group = step - n + 2  # the one that comes next
        if 1 <= group < n:
            slots = self.model.slots[group - 1].expand(len(self.pending), -1, -1)
            self.pending = torch.cat((self.pending, slots), 1)
        if not self.cached:
            self.seen = torch.cat((self.seen[: len(self.pending)], self.pending), 1)

    def attend(self, cache: KVCache, q: Tensor) -> Tensor:
        return cache.attend(q)


def make(tokenizer: Any, classes: int) -> DetailFlowModel:
    return DetailFlowModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "detailflow",
    "DetailFlow (its generator)",
    "any-order",
    "arXiv 2505.21473",
    "the first group token by token, then 8 tokens per pass from learned slots: 15 passes for 64 tokens",
    grid_tokenizer,
    make,
    deviations="the generator alone: groups are rows of a token map instead of a 1-D tokenizer's details, "
    "without its self-correction (groups of noisy tokens in training); the 1-D tokenizer is "
    "`arimg.tokenizers.LatentTokenizer`, on which this generator is not trained yet",
)
