"""Meissonic (github.com/viiika/Meissonic, arXiv 2410.08261): a masked generator, all tokens in every pass.

Training hides a share cos(pi t / 2) of the tokens, t uniform, and asks for them. Sampling starts with all of
them hidden; each pass draws all, and keeps the most confident (log p with Gumbel noise that fades). The
network sees the text, micro-conditions (width, height, crop, score) and how much is hidden: 1000 times the
hidden share in training, and here in sampling, where the released sampler tells it the number of the pass, a
mismatch that `released_timestep` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.commit import ByCounts, ByRatio, LinearNoise, Plan
from arimg.generators.llamagen import Decoder, LlamaGen
from arimg.generators.loop import EachStep, Sampler, Session, Turn, generate
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn.conditioning import Conditioner, Text
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


class MeissonicModel(LlamaGen, SystemModel):
    """Full attention over text, one token of numbers, and the map. compress: 2 x 2 tokens are one input."""

    tokenizer = Hidden()
    sampler = Sampler(Guidance(4.0))

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, steps: int = 16, text_tokens: int = 4,
        compress: bool = False, **size: Any,
    ) -> None:  # fmt: skip
        self.mask, self.text_tokens, self.compress = tokenizer.vocab_size, text_tokens, compress
        super().__init__(tokenizer.vocab_size + 1, num_classes, grid=tokenizer.scales[-1][0], **size)
        self.tokenizer, self.steps = tokenizer, steps
        self.conditioner = Conditioner(num_classes, text_tokens, self.width)
        self.numbers = nn.Sequential(
            nn.Linear(32 * (1 + len(MICRO)), self.width), nn.SiLU(), nn.Linear(self.width, self.width)
        )
        if compress:
            self.down = nn.Conv2d(self.width, self.width, 2, stride=2)
            self.up = nn.Linear(self.width, 4 * self.width)
        del self.cls_embedding

    @property
    def layout(self) -> Layout:
        return Layout.scales([self.grid])

    @property
    def commit(self) -> EachStep:
        plan = Plan(ByRatio(self.steps), "gumbel", noise=LinearNoise(2.0))
        return EachStep(lambda step, n: plan)

    def rope(self) -> Rope:
        """Three axes: the place in the text, and row and column of the map."""
        side, dim = self.grid // (2 if self.compress else 1), self.width // self.heads
        said = torch.zeros(self.text_tokens + 1, 3)
        said[:, 0] = torch.arange(len(said))
        axis = torch.arange(side).float()
        places = F.pad(torch.cartesian_prod(axis, axis), (1, 0), value=float(len(said)))
        plane = 8 * round(7 * dim / 16 / 8)
        dims = (dim - 2 * plane, plane, plane)
        return rope_axes(torch.cat((said, places)), dims, device=self.tok_embeddings.weight.device)

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Everything sees everything."""
        start = torch.zeros(length, dtype=torch.int32, device=device)
        return start, torch.full_like(start, length)

    def decoder(self) -> Decoder:
        return _Decoder(self)

    def predict(self, text: Text, tokens: Tensor, time: Tensor, micro: Tensor | None = None) -> Tensor:
        """Logits [B, n, V] of all tokens from those that are not hidden. time: float [B], 0 to 1000."""
        h = self.embed(tokens)
        if self.compress:
            h = self.down(h.transpose(1, 2).unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)
        given = h.new_tensor(MICRO).expand(len(tokens), -1) if micro is None else micro
        waves = _waves(torch.cat((time[:, None], given), 1))
        return self.teach(torch.cat((text.states, self.numbers(waves)[:, None], h), 1))

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
        logits = self.predict(self.conditioner(said), examples.masked_fill(hidden, self.mask), time)
        return F.cross_entropy(logits[hidden], examples[hidden])

    def begin(  # type: ignore[override]
        self, condition: Any, guided: bool, released_timestep: bool = False, micro: Tensor | None = None
    ) -> MeissonicSession:
        """condition: labels [B]. micro: float [B, 5] of width, height, crop and score."""
        rows = self.conditioner.rows(condition)
        if micro is not None and tuple(micro.shape) != (rows, len(MICRO)):
            raise ValueError(f"expected micro [{rows}, {len(MICRO)}], got {list(micro.shape)}")
        text = self.conditioner.beside_nothing(condition) if guided else self.conditioner(condition)
        return MeissonicSession(self, text, rows, released_timestep, micro)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        pictures: Tensor = self.tokenizer.decode(tokens)
        return pictures

    def ways(self) -> dict[str, Callable[[Tensor, int], Iterator[Turn]]]:
        single = EachStep(lambda step, n: Plan(ByCounts((1,) * n), "gumbel", noise=LinearNoise(2.0)))
        return {
            "Meissonic": lambda labels, seed: generate(self, labels, seed=seed),
            "one token per pass": lambda labels, seed: generate(self, labels, seed=seed, commit=single),
        }


class _Decoder(Decoder):
    """Logits of the map alone, without the mask."""

    def __init__(self, model: MeissonicModel) -> None:
        super().__init__(model)
        self.model = model

    def head(self, h: Tensor) -> Tensor:
        h = h[:, self.model.text_tokens + 1 :]
        if self.model.compress:
            side = self.model.grid // 2
            h = self.model.up(h).view(len(h), side, side, 2, 2, -1).transpose(2, 3).flatten(1, 4)
        return super().head(h)[..., : self.model.mask]


class MeissonicSession(Session):
    """Nothing is carried but the text: each pass sees the tokens that are final and none of the others."""

    def __init__(
        self, model: MeissonicModel, text: Text, rows: int, released: bool, micro: Tensor | None
    ) -> None:
        self.model, self.text, self.rows, self.released, self.micro = model, text, rows, released, micro
        self.layout, self.device = model.layout, text.states.device
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
        text = Text(*(t[: copies * self.rows] for t in self.text))
        micro = None if self.micro is None else self.micro.repeat(copies, 1)
        return model.predict(text, tokens.repeat(copies, 1), time.repeat(copies), micro)


def _waves(numbers: Tensor) -> Tensor:
    """Sines and cosines of 16 frequencies of each number: [B, n] -> [B, 32 n]."""
    frequency = 10000.0 ** (-torch.arange(16, device=numbers.device) / 16)
    angle = numbers[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(1)


def make(tokenizer: Any, classes: int) -> MeissonicModel:
    return MeissonicModel(tokenizer, classes, depth=6, width=192, heads=3, dropout=0.0)


SYSTEM = System(
    "meissonic",
    "Meissonic",
    "any-order",
    "arXiv 2410.08261",
    "all tokens in every pass, the most confident stay; 16 passes for 64 tokens, full attention",
    grid_tokenizer,
    make,
    deviations="the text is four learned vectors per class, and the numbers are one more input, in the same "
    "blocks as the map (paper: 14 joint and 28 single blocks with AdaLN), so released weights do not load; "
    "convolutions that halve the map are an option; the time is the hidden share in sampling, too (released: "
    "the number of the pass)",
)
