"""Token-Shuffle: s x s neighbouring tokens go through the layers as one (arXiv 2504.17789).

An MLP narrows each token to 1 / s^2 of the width, the tokens of a window stand side by side, and a few
residual MLPs mix them. Behind the layers the inverse gives s^2 tokens for one classifier, so a pass draws s^2
tokens, independently of each other, and the caches hold n / s^2 entries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.generators.llamagen import Attend, Decoder, LlamaSession, drop
from arimg.generators.loop import Sampler, Turn
from arimg.guidance import Guidance, half_linear
from arimg.layout import Layout
from arimg.nn.rope import rope_2d
from arimg.reference.kv_cache import Rope
from arimg.systems.base import System, Way, way
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import grid_tokenizer
from arimg.tokenizers import VQVAE

BLOCKS = 2  # residual MLPs on either side


class ResidualMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class TokenShuffleModel(GridModel):
    """A LlamaGen over windows of s x s tokens. Sequences stand window by window, rows first within one."""

    title = "Token-Shuffle"
    sampler = Sampler(Guidance(2.0, half_linear))

    def __init__(self, tokenizer: VQVAE, num_classes: int, s: int = 2, **size: Any) -> None:
        super().__init__(tokenizer, num_classes, **size)
        n, width = s * s, self.width
        if self.grid % s or width % n:
            raise ValueError(
                f"expected a window whose side divides the {self.grid} tokens of a row and its square the "
                f"width {width}, got {s}"
            )
        self.s = s
        inner = width // n
        self.narrow = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))
        self.fuse = nn.Sequential(*(ResidualMLP(width) for _ in range(BLOCKS)))
        self.split = nn.Sequential(*(ResidualMLP(width) for _ in range(BLOCKS)))
        self.widen = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        raster = torch.arange(self.grid**2)[None, :, None]
        self.order = ops.token_shuffle(raster, s, (self.grid, self.grid)).flatten()  # raster indices

    @property
    def layout(self) -> Layout:
        return Layout.scales([self.s] * (self.grid // self.s) ** 2)

    def rope(self) -> Rope:
        side, device = self.grid // self.s, self.tok_embeddings.weight.device
        return rope_2d(side, side, self.width // self.heads, self.rope_base, prefix=1, device=device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens of k windows [B, k s^2] -> [B, k, C]. One above the other they are a picture."""
        narrow = self.narrow(self.tok_embeddings(tokens))
        fused: Tensor = self.fuse(ops.token_shuffle(narrow, self.s, (tokens.shape[1] // self.s, self.s)))
        return fused

    def unfold(self, h: Tensor) -> Tensor:
        """What the layers say of k windows, [B, k, C] -> of their tokens [B, k s^2, C]."""
        tall = h.shape[1] * self.s
        tokens: Tensor = self.widen(ops.token_unshuffle(self.split(h), self.s, (tall, self.s)))
        return tokens

    def decoder(self) -> Decoder:
        return ShuffleDecoder(self)

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels)[:, self.order]

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        known = examples[:, : -self.s * self.s]
        return F.cross_entropy(self(labels, known).flatten(0, 1), examples.flatten())

    def decode(self, session: Any, tokens: list[Tensor]) -> Tensor:
        return super().decode(session, [torch.cat(tokens, 1)[:, self.order.argsort()]])

    def begin(self, condition: Any, guided: bool, **options: Any) -> ShuffleSession:
        labels = self.labels(condition)
        prefix = self.prefix(self.with_unconditional(labels, guided))
        return ShuffleSession(self, prefix, len(labels), **options)

    def ways(self) -> dict[str, Way]:
        """Its own, and windows of one token: a network of the same size with weights of its own."""
        taken = ("vocab_size", "num_classes", "grid")
        size: dict[str, Any] = {n: v for n, v in self.config().items() if n not in taken}
        plain = type(self)(self.tokenizer, self.num_classes, s=1, **size).eval()
        return {self.title: way(self), "a token a pass (s = 1, untrained)": way(plain)}


class ShuffleSession(LlamaSession):
    def inputs(self) -> int:
        return len(self.layout) - 1

    def logits(self, turn: Turn) -> Tensor:
        n = turn.shape[0] * turn.shape[1]
        return self.run(turn)[:, -n:]


class ShuffleDecoder(Decoder):
    def __init__(self, model: TokenShuffleModel) -> None:
        super().__init__(model)
        self.unfold = model.unfold

    def run(self, x: Tensor, attend: Attend, dropout: float = 0.0) -> Tensor:
        h = self.hidden(drop(x.float(), dropout), x.dtype, attend, dropout)
        return self.head(self.unfold(h.to(x.dtype)).float())


def make(tokenizer: Any, classes: int) -> TokenShuffleModel:
    return TokenShuffleModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "token-shuffle",
    "Token-Shuffle",
    "raster",
    "arXiv 2504.17789",
    "windows of s x s tokens go through the layers as one and are drawn at once",
    grid_tokenizer,
    make,
    "a class token in place of a text vocabulary; no z-loss, which the paper adds at 2048 px; the plain "
    "method is a network with windows of one token and untrained weights, for its time alone",
)
