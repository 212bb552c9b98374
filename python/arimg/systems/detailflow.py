"""DetailFlow (github.com/ByteFlow-AI/DetailFlow, arXiv 2505.21473): a 1-D sequence of details, from coarse to
fine, one token at a time for the first group, then a whole group per pass.

Tokens stand in groups of n, and any number of them from the first on decodes to a picture. Behind the first
group follow n - 1 learned slots; its last token and the slots predict the tokens of the second group, those
predict the third, all of a group independently of each other. Inputs of a group see each other and all before
them, so everything is appended to the caches once. As published, on ImageNet at 256 x 256: FID 2.96 with 128
tokens in 23 passes. The released group sampling runs without caches; that is the second of the ways here.

Self-correction: in training, tokens of a random step become noise for some of the rows, which learn to go on
with what the tokenizer's encoder made of the picture with that noise in sight (`LatentTokenizer.corrected`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.cache import KVCache
from arimg.data.images import Images
from arimg.generators import LlamaGen
from arimg.generators.llamagen import LlamaSession
from arimg.generators.loop import Sampler, Session, Turn
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn.rope import rope_2d
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import latent_tokenizer
from arimg.tokenizers.latent import Corrected, LatentTokenizer

GROUP, TOKENS = 8, 64


def details(group: int, tokens: int) -> Layout:
    """The first group token by token, then the other groups."""
    return Layout.groups([1] * group + [group] * (tokens // group - 1))


class _Slots(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.special_embeddings = nn.Embedding(rows, width)
        nn.init.normal_(self.special_embeddings.weight, std=0.02)


class DetailFlowModel(LlamaGen, SystemModel):
    """Inputs: class, first group, slots, second group, ..., all but the last. Parameter names are the
    released ones.

    noise: share of the rows that learn to correct, in training.
    """

    sampler = Sampler(Guidance(1.45))
    tokenizer = Hidden()
    title = "DetailFlow"
    plain = "without caches, as released", {"cached": False}

    def __init__(
        self, tokenizer: LatentTokenizer, num_classes: int, *, noise: float = 0.3, **size: Any
    ) -> None:
        sizes = tokenizer.layout.sizes
        n = sizes[-1]
        if n < 2 or len(sizes) <= n or tokenizer.layout != details(n, sum(sizes)):
            wanted = "n single tokens and groups of n"
            raise ValueError(f"expected a tokenizer of {wanted}, got one of steps of {list(sizes)}")
        super().__init__(tokenizer.vocab_size, num_classes, grid=n, **size)
        self.tokenizer, self.noise = tokenizer, noise
        self.spe_tok_embeddings = _Slots(n - 1, self.width)

    _sizes = staticmethod(GridModel._sizes)

    @property
    def layout(self) -> Layout:
        return self.tokenizer.layout

    def rope(self) -> Rope:
        """Axes: group and place in it, counted over the inputs behind the class."""
        n, head_dim, device = self.grid, self.width // self.heads, self.norm.weight.device
        return rope_2d(self.length // n, n, head_dim, self.rope_base, prefix=1, device=device)

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """There are as many inputs as tokens, and each step has one for each of its tokens."""
        start, end = self.layout.intervals("level-causal", device)
        return start[:length], end[:length]

    def slots(self, rows: int) -> Tensor:
        """[B, n - 1, C]"""
        return self.spe_tok_embeddings.special_embeddings.weight.expand(rows, -1, -1)

    def inputs(self, tokens: Tensor) -> Tensor:
        """The tokens [B, m] that are known, whole steps, with the slots behind the first group: [B, L, C]."""
        n, h = self.grid, self.embed(tokens)
        if h.shape[1] < n:
            return h
        return torch.cat((h[:, :n], self.slots(len(h)), h[:, n:]), 1)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Labels [B], all tokens but those of the last group [B, length - n] -> logits [B, length, V]."""
        wanted = [len(labels), self.length - self.grid]
        if list(indices.shape) != wanted:
            raise ValueError(f"expected indices {wanted}, got {list(indices.shape)}")
        labels = self.dropped(self.labels(labels))
        return self.teach(torch.cat((self.prefix(labels), self.inputs(indices)), 1))

    def encode(self, pixels: Tensor) -> Tensor:
        """The features, [B, z, s, s]: which tokens become noise is drawn for each step of training."""
        return self.tokenizer.source.features(pixels).float()

    @torch.no_grad()
    def taught(self, features: Tensor) -> Corrected:
        """What training sees of pictures and what it predicts, in training mode with noise in some rows."""
        clean = self.tokenizer.encode_features(features)
        noisy = torch.rand(len(clean)) < (self.noise if self.training else 0.0)
        if not noisy.any():
            return Corrected(clean, clean)
        place = int(torch.randint(self.length - self.grid, ()))  # nothing follows the last group
        group = int(self.layout.level()[place])
        taught = Corrected(clean, clean.clone())
        noisy = noisy.to(clean.device)
        for whole, part in zip(taught, self.tokenizer.correct_features(features[noisy], group)):
            whole[noisy] = part
        return taught

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        inputs, targets = self.taught(examples)
        return F.cross_entropy(self(labels, inputs[:, : -self.grid]).flatten(0, 1), targets.flatten())

    def begin(self, condition: Any, guided: bool, **options: Any) -> DetailFlowSession:
        """Options: cached=False, which runs all inputs again in each pass, as released."""
        labels = self.labels(condition)
        prefix = self.prefix(self.with_unconditional(labels, guided))
        return DetailFlowSession(self, prefix, len(labels), **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        return self.tokenizer.decode(torch.cat(tokens, 1))

    def preview(self, session: Session, tokens: list[Tensor]) -> Tensor:
        return self.tokenizer.preview(torch.cat(tokens, 1))


class DetailFlowSession(LlamaSession):
    """As of LlamaGen; the last token of the first group brings the slots along."""

    model: DetailFlowModel

    def __init__(self, model: DetailFlowModel, prefix: Tensor, rows: int, *, cached: bool = True) -> None:
        super().__init__(model, prefix, rows)
        self.cached, self.seen = cached, prefix

    def inputs(self) -> int:
        return self.layout.length - 1

    def logits(self, turn: Turn) -> Tensor:
        if self.cached:
            return self.run(turn)
        rows = len(self.seen) if turn.guidance is not None else self.rows
        return self.model.teach(self.seen[:rows])[:, -self.pending.shape[1] :]

    def feed(self, turn: Turn) -> None:
        self.last = turn.drawn[:, -1]
        self.pending = self._embed(turn.drawn)
        if turn.step + 1 == self.model.grid:
            self.pending = torch.cat((self.pending, self.model.slots(len(self.pending))), 1)
        if not self.cached:
            self.seen = torch.cat((self.seen[: len(self.pending)], self.pending), 1)

    def attend(self, cache: KVCache, q: Tensor) -> Tensor:
        return cache.attend(q)


def tokenizer(images: Images, folder: Path) -> LatentTokenizer:
    return latent_tokenizer(images, folder, details(GROUP, TOKENS), width=128, depth=3, heads=2)


def make(tokenizer: Any, classes: int) -> DetailFlowModel:
    return DetailFlowModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "detailflow",
    "DetailFlow",
    "any-order",
    "arXiv 2505.21473",
    "a 1-D sequence from coarse to fine, its first group token by token, then 8 tokens per pass: 15 passes"
    " for 64 tokens",
    tokenizer,
    make,
    deviations="the small tokenizer stands between the bundled convolutional encoder, which stays, and"
    " decoder, and learns from that encoder's features before it learns from pixels; the published one has a"
    " SigLIP2 encoder, perceptual and adversarial losses and a first token that learns the mean of SigLIP2's"
    " features; pictures of prefixes are snapped to the 8 pixels of a feature; noise in the generator's"
    " training is drawn anew in each step (released: once, when the pictures are encoded); the small"
    " tokenizer is trained too briefly to gain by it: noise harms it little, and what it encodes behind noise"
    " is as near to the picture as what was there before (smaller ones, trained for longer, do gain)",
)
