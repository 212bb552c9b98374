"""TokenFlow: one index into a semantic and a pixel codebook, drawn scale by scale (arXiv 2412.03069).

The text stands before the picture as a causal prefix; the tokens of a scale see the text, the scales before
and each other. Each scale is drawn several times, with fewer candidates each time (top-k 1200, 100, 1): the
network sees its own last draft of the scale, whose keys and values take the place of those before. As
published: GenEval 0.55 at 256 px with 32,768 codes of 32 + 8 channels.

The released sampler calls the network without a cache; `cached=False` does so, with the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops
from arimg.data.images import Images
from arimg.generators.loop import EachStep, Repeat, Sampler, Session, Turn
from arimg.generators.scale_text import ScaleSession, ScaleText
from arimg.guidance import Guidance, linear
from arimg.layout import Layout
from arimg.nn.dual_quantizer import DualQuantizer
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import quantizer_tokenizer, scale_tokenizer
from arimg.tokenizers import VQVAE

TOP_K = (1200, 100, 1)  # of the drafts of a scale


def _top_k(turn: Turn) -> int:
    """The last draft of a scale takes the most probable tokens."""
    return TOP_K[min(turn.number, len(TOP_K) - 1)]


class TokenFlow(ScaleText, SystemModel):
    """drafts: how often each scale is drawn."""

    title = "tokenflow"
    plain = "without a cache", {"cached": False}
    tokenizer = Hidden()
    sampler = Sampler(Guidance(7.5, linear), top_k=_top_k, top_p=0.8)
    turns = False

    def __init__(self, tokenizer: VQVAE, num_classes: int, *, drafts: int = 3, **size: Any) -> None:
        if not isinstance(tokenizer.quantize, DualQuantizer):
            kind = type(tokenizer.quantize).__name__
            raise ValueError(f"expected a tokenizer with a DualQuantizer, got one with a {kind}")
        if drafts < 1:
            raise ValueError(f"expected 1 draft or more, got {drafts}")
        layout, quantizer = Layout.scales(tokenizer.scales), tokenizer.quantize
        super().__init__(layout, quantizer.channels, quantizer.vocab_size, num_classes, cross=False, **size)
        self.tokenizer, self.drafts = tokenizer, drafts

    @property
    def quantizer(self) -> DualQuantizer:
        assert isinstance(self.tokenizer.quantize, DualQuantizer)
        return self.tokenizer.quantize

    @property
    def commit(self) -> EachStep:
        """Every scale is drawn `drafts` times."""
        return EachStep(lambda step, n: Repeat(self.drafts))

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat(self.tokenizer.encode(pixels), 1)

    def forward(self, condition: Any, maps: Tensor) -> Tensor:
        """Teacher forcing: labels or `Text`, maps [B, L - first, C] -> logits [B, L, V]."""
        logits: Tensor = self.head(self.teacher_forced(condition, maps)).float()
        return logits

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        maps = self.quantizer.generator_input(examples.split(self.layout.sizes, 1))
        return F.cross_entropy(self(labels, maps).flatten(0, 1), examples.flatten())

    def begin(self, condition: Any, guided: bool, **options: Any) -> TokenFlowSession:
        """options: cached."""
        return TokenFlowSession(self, condition, guided, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        assert isinstance(session, TokenFlowSession)
        return self.tokenizer.decode_features(session.f_hat)


class TokenFlowSession(ScaleSession):
    """f_hat is the sum of the scales that are over; a further draft also sees the one before it."""

    def __init__(self, model: TokenFlow, condition: Any, guided: bool, **options: Any) -> None:
        super().__init__(model, condition, guided, **options)
        self.flow = model
        self.f_hat = torch.zeros(self.rows, model.quantizer.channels, *self.layout.shapes[-1]).to(self.device)

    def maps(self, turn: Turn) -> Tensor:
        seen = self.f_hat if turn.number == 0 else self._with(turn)
        return self.flow.quantizer.next_map(seen, turn.step)

    def logits(self, turn: Turn) -> Tensor:
        logits: Tensor = self.flow.head(self.features(turn)).float()
        return logits

    def feed(self, turn: Turn) -> None:
        if turn.done:
            self.f_hat = self._with(turn)

    def _with(self, turn: Turn) -> Tensor:
        """f_hat with the tokens of this turn."""
        f_hat = self.f_hat.clone()
        ops.accumulate_(f_hat, self.flow.quantizer.code_map(turn.drawn, turn.step).contiguous())
        return f_hat


def tokenizer(images: Images, folder: Path) -> VQVAE:
    source = scale_tokenizer()
    half = source.z_channels // 2
    torch.manual_seed(0)
    quantizer = DualQuantizer(source.vocab_size, half, half, source.scales)
    return quantizer_tokenizer(images, folder, quantizer, steps=200)


def make(tokenizer: Any, classes: int) -> TokenFlow:
    return TokenFlow(tokenizer, classes, depth=6, width=192, heads=3)


SYSTEM = System(
    "tokenflow",
    "TokenFlow",
    "next-scale",
    "arXiv 2412.03069",
    "one index into two codebooks; each scale is drawn three times, each time seeing its last draft",
    tokenizer,
    make,
    "Both parts come from one encoder, 8 + 8 channels and 1024 codes, without the teacher's semantic loss; "
    "the prefix is the class, as four learned states; blocks with VAR's attention, not Llama's, "
    "so released weights do not load; the cache that the released sampler does not use is used.",
)
