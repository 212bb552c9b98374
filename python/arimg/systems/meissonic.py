"""Meissonic (github.com/viiika/Meissonic, arXiv 2410.08261): a masked generator, all tokens in every pass.

Training hides a share cos(pi t / 2) of the tokens, t uniform, and asks for them. Sampling starts with all of
them hidden; each pass draws all, and keeps the most confident (log p with Gumbel noise that fades). The
network sees the text, micro-conditions (width, height, crop, score) and how much is hidden: 1000 times the
hidden share in training, and here in sampling, where the released sampler tells it the number of the pass, a
mismatch that `released_timestep` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.commit import ByCounts, ByRatio, LinearNoise, Plan
from arimg.generators.loop import EachStep, Sampler, Session, Turn
from arimg.generators.meissonic_parts import (
    COMPRESS,
    EPS,
    NAMES,
    JointBlock,
    SingleBlock,
    Told,
    as_matrices,
    mlp,
    waves,
)  # fmt: skip
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.conditioning import Conditioner, Text
from arimg.nn.linear import Linear
from arimg.nn.rope import rope_axes
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import SIZE, grid_tokenizer
from arimg.tokenizers import VQVAE

MICRO = (SIZE, SIZE, 0.0, 0.0, 6.0)  # width, height, crop (top, left), score
TIME = 1000.0  # of everything hidden


def hidden_share(t: Tensor) -> Tensor:
    """How much is hidden at a time t in [0, 1]."""
    return torch.cos(math.pi / 2 * t)


def _one_by_one(step: int, n: int) -> Plan:
    return Plan(ByCounts((1,) * n), "gumbel", noise=LinearNoise(2.0))


class MeissonicModel(SystemModel):
    """Full attention over text and map: joint blocks, then single ones. compress: 2 x 2 tokens are one input.

    A text is its states, all of which count, and behind them the vector that sums it up: text_tokens + 1. The
    sum, the micro-conditions and the time make the vector that modulates the blocks.
    """

    title = "Meissonic"
    plain = "one token per pass", {"commit": EachStep(_one_by_one)}
    tokenizer = Hidden()
    sampler = Sampler(Guidance(4.0))

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, steps: int = 16, text_tokens: int = 4,
        compress: bool = False, *, joint: int = 2, single: int = 4, width: int = 192, heads: int = 3,
        text_width: int | None = None, class_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise ValueError(f"expected a width that {heads} heads divide into multiples of 8, got {width}")
        self.mask, self.grid = tokenizer.vocab_size, tokenizer.scales[-1][0]
        self.tokenizer, self.steps, self.text_tokens, self.compress = tokenizer, steps, text_tokens, compress
        self.width, self.heads, self.class_dropout = width, heads, class_dropout
        self.conditioner = Conditioner(num_classes, text_tokens + 1, width, text_width, raw=True)
        text_width = self.conditioner.text_width
        self.time, self.summary = mlp(256, width), mlp(width, width)
        self.numbers = mlp(256 * len(MICRO) + text_width, width, bias=False)
        self.words_norm = nn.RMSNorm(width, eps=EPS)
        self.tok_embeddings = nn.Embedding(self.mask + 1, width)
        self.embed_norm, self.embed_out = nn.RMSNorm(width, eps=EPS), Linear(width, width, bias=False)
        self.to_hidden_norm, self.to_hidden = nn.RMSNorm(width, eps=EPS), Linear(width, width, bias=False)
        self.joint = nn.ModuleList(JointBlock(width, heads) for _ in range(joint))
        self.single = nn.ModuleList(SingleBlock(width, heads) for _ in range(single))
        self.from_hidden_norm, self.from_hidden = (
            nn.RMSNorm(width, eps=EPS), Linear(width, width, bias=False)
        )  # fmt: skip
        if compress:
            self.down_norm, self.up_norm = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)
            self.down = nn.Conv2d(width, width, 2, stride=2, bias=False)
            self.up = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)
        self.head, self.head_norm = Linear(width, width, bias=False), nn.RMSNorm(width, eps=EPS)
        self.output = Linear(width, self.mask, bias=False)
        for weight in (self.tok_embeddings.weight, self.output.weight):
            nn.init.normal_(weight, std=0.02)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, tokenizer: VQVAE, nothing: Tensor, **options: Any
    ) -> MeissonicModel:
        """The model of released weights, in evaluation mode; sizes are read off them.

        nothing: what the empty text is, [T + 1, text width]: states of CLIP, and its projected summary. A
        condition is then a `Text` of as many. heads: where they are not 128 wide.
        """
        theirs = as_matrices(state)
        compress = any(name.startswith("down_block.") for name in theirs)
        ours = checkpoint.translated(theirs, {**NAMES, **(COMPRESS if compress else {})}, "Meissonic")
        table = ours["tok_embeddings.weight"]  # the mask is the last of its rows, some are not used
        ours["tok_embeddings.weight"] = torch.cat((table[: tokenizer.vocab_size], table[-1:]))
        text = ours["conditioner.project.weight"].shape[1]
        if nothing.dim() != 2 or nothing.shape[1] != text:
            raise ValueError(f"expected nothing [T + 1, {text}], got {list(nothing.shape)}")
        ours["conditioner.table"] = torch.stack((torch.zeros_like(nothing), nothing)).to(table)
        width = len(ours["to_hidden.weight"])
        sizes = {
            "joint": checkpoint.count(ours, "joint."),
            "single": checkpoint.count(ours, "single."),
            "width": width,
            "heads": width // 128,
            "text_width": text,
            "text_tokens": len(nothing) - 1,
            "compress": compress,
            "steps": 64,
        }
        return checkpoint.built(lambda: cls(tokenizer, 1, **sizes | options), ours, "Meissonic")

    @property
    def layout(self) -> Layout:
        return Layout.scales([self.grid])

    @property
    def commit(self) -> EachStep:
        plan = Plan(ByRatio(self.steps), "gumbel", noise=LinearNoise(2.0))
        return EachStep(lambda step, n: plan)

    def rope(self) -> Rope:
        """Three axes: one that is not used, and row and column of the map; the text stands at 0."""
        side, dim = self.grid // (2 if self.compress else 1), self.width // self.heads
        axis = torch.arange(side).float()
        places = F.pad(torch.cartesian_prod(axis, axis).view(-1, 2), (1, 0, self.text_tokens, 0))
        plane = 2 * (7 * dim // 32)
        dims = (dim - 2 * plane, plane, plane)
        return rope_axes(places, dims, device=self.tok_embeddings.weight.device)

    def told(self, text: Text, micro: Tensor | None = None) -> Told:
        """What `predict` needs of a text and of micro-conditions, float [B, 5], once for all passes."""
        summary, words = text.last, self.words_norm(self.conditioner.project(text.states[:, :-1]))
        given = summary.new_tensor(MICRO).expand(len(summary), -1) if micro is None else micro
        numbers = self.numbers(torch.cat((summary, waves(given).to(summary)), 1))
        return Told(words, self.summary(numbers), self.rope())

    def predict(self, told: Told, tokens: Tensor, time: Tensor) -> Tensor:
        """Logits [B, n, V] of all tokens from those that are not hidden. time: float [B], 0 to 1000."""
        vector = self.time(waves(time[:, None] * TIME).to(told.vector)) + told.vector
        h = self.embed_out(self.embed_norm(self.tok_embeddings(tokens)))
        if self.compress:
            h = self.down(self._map(self.down_norm(h), self.grid)).flatten(2).transpose(1, 2)
        h = self.mix(told.words, self.to_hidden(self.to_hidden_norm(h)), vector, told.rope)
        h = self.from_hidden(self.from_hidden_norm(h))
        if self.compress:
            h = self.up(self._map(self.up_norm(h), self.grid // 2)).flatten(2).transpose(1, 2)
        logits: Tensor = self.output(self.head_norm(self.head(h))).float()
        return logits

    def mix(self, words: Tensor, h: Tensor, vector: Tensor, rope: Rope) -> Tensor:
        """All blocks: words [B, T, C], the map's inputs [B, n, C], vector [B, C] -> the map's [B, n, C]."""
        for block in self.joint:
            words, h = block(words, h, vector, rope)
        both = torch.cat((words, h), 1)
        for block in self.single:
            both = block(both, vector, rope)
        return both[:, words.shape[1] :]

    @staticmethod
    def _map(h: Tensor, side: int) -> Tensor:
        return h.transpose(1, 2).unflatten(2, (side, side))

    def encode(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer.encode(pixels)[-1]
        return tokens

    def hide(self, tokens: Tensor, share: Tensor) -> Tensor:
        """Which tokens are hidden: of each row the given share at random, one or more. bool [B, n]."""
        count = (share * tokens.shape[1]).ceil().clamp(min=1)
        order = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        return order < count[:, None]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        hidden = self.hide(examples, hidden_share(torch.rand(len(examples), device=examples.device)))
        said = self.conditioner.drop(labels, self.class_dropout) if self.training else labels
        time = TIME * hidden.float().mean(1)
        told = self.told(self.conditioner(said))
        logits = self.predict(told, examples.masked_fill(hidden, self.mask), time)
        return F.cross_entropy(logits[hidden], examples[hidden])

    def begin(  # type: ignore[override]
        self, condition: Any, guided: bool, released_timestep: bool = False, micro: Tensor | None = None
    ) -> MeissonicSession:
        """condition: labels [B]. micro: float [B, 5] of width, height, crop and score."""
        rows = self.conditioner.rows(condition)
        if micro is not None and tuple(micro.shape) != (rows, len(MICRO)):
            raise ValueError(f"expected micro [{rows}, {len(MICRO)}], got {list(micro.shape)}")
        text = self.conditioner.beside_nothing(condition) if guided else self.conditioner(condition)
        if text.lengths.tolist() != [self.text_tokens + 1] * len(text.lengths):
            raise ValueError(f"expected texts of {self.text_tokens + 1}, got {text.lengths.tolist()}")
        if micro is not None and guided:
            micro = micro.repeat(2, 1)
        return MeissonicSession(self, self.told(text, micro), rows, released_timestep)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        pictures: Tensor = self.tokenizer.decode(tokens)
        return pictures


class MeissonicSession(Session):
    """Nothing is carried but what the text says: each pass sees the tokens that are final and none of the
    others.
    """

    def __init__(self, model: MeissonicModel, told: Told, rows: int, released: bool) -> None:
        self.model, self.told, self.rows, self.released = model, told, rows, released
        self.layout, self.device = model.layout, told.words.device
        self.vocabulary = model.mask

    def logits(self, turn: Turn) -> Tensor:
        model, n = self.model, self.layout.length
        tokens = torch.full((self.rows, n), model.mask, device=self.device)
        if turn.final is not None:
            tokens = torch.where(turn.final, turn.drawn, tokens)
        time = TIME * (tokens == model.mask).float().mean(1)
        if self.released:
            time = torch.full_like(time, float(turn.number))
        copies = 1 if turn.guidance is None else 2
        told = self.told.first(copies * self.rows)
        return model.predict(told, tokens.repeat(copies, 1), time.repeat(copies))


def make(tokenizer: Any, classes: int) -> MeissonicModel:
    return MeissonicModel(tokenizer, classes)


SYSTEM = System(
    "meissonic",
    "Meissonic",
    "any-order",
    "arXiv 2410.08261",
    "all tokens in every pass, the most confident stay; 16 passes for 64 tokens, full attention",
    grid_tokenizer,
    make,
    deviations="the text is four learned vectors per class and one more as their sum; convolutions that "
    "halve the map are an option; the time is the hidden share in sampling, too (released: the number of the "
    "pass)",
    released=True,
)
