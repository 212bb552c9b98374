"""JPEG-LM: a language model of the bytes of JPEG files (arXiv 2408.08459).

Published: 256 px, quality 25, 4:2:0, a restart marker behind each of 256 MCUs, about 5,000 tokens of a
vocabulary of 320, Llama-2 7B from scratch; top-k 50, top-p 0.9; FID 31 % below a VQ baseline.

Here: 32 px (4 MCUs, about 160 bytes, at most 288). Tokens are the bytes themselves, without BPE; the headers
and tables, the same for all pictures of a size, are no tokens; a class stands in front. The published sampler
repairs what is no JPEG afterwards; ours draws only bytes that the grammar allows, so that every picture
decodes (`grammar=False`: as published).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.generators.llamagen import LlamaGen, LlamaSession
from arimg.generators.loop import Sampler, Session, Turn
from arimg.layout import Layout
from arimg.nn.rope import rope_1d
from arimg.reference.kv_cache import Rope
from arimg.systems.base import System, SystemModel
from arimg.tokenizers.jpeg import PAD, VOCABULARY, Jpeg, Place


class JpegModel(LlamaGen, SystemModel):
    """A Llama over bytes with 1-D positions; a picture has `bytes` of them at most."""

    title = "grammar"
    plain = "any byte", {"grammar": False}
    sampler = Sampler(top_k=50, top_p=0.9)

    def __init__(self, num_classes: int, size: int = 32, longest: int = 288, **options: Any) -> None:
        self.codec, self.longest = Jpeg(size), longest
        super().__init__(VOCABULARY, num_classes, **options)

    @property
    def layout(self) -> Layout:
        return Layout.groups([1] * self.longest)

    def rope(self) -> Rope:
        device = self.tok_embeddings.weight.device
        return rope_1d(1 + self.longest, self.width // self.heads, self.rope_base, device=device)

    def encode(self, pixels: Tensor) -> Tensor:
        tokens = self.codec.encode(pixels)
        if tokens.shape[1] > self.longest:
            raise ValueError(f"expected pictures of at most {self.longest} bytes, got {tokens.shape[1]}")
        return F.pad(tokens, (0, self.longest - tokens.shape[1]), value=PAD)

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of the bytes alone: the first place behind the end stands for nothing."""
        examples = examples[:, : int((examples != PAD).sum(1).max())]
        logits = self(labels, examples[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), examples.flatten(), ignore_index=PAD)

    def begin(self, condition: Any, guided: bool, **options: Any) -> JpegSession:
        labels = self.labels(condition)
        return JpegSession(self, self.prefix(self.with_unconditional(labels, guided)), len(labels), **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        return self.codec.decode(torch.cat(tokens, 1))


class JpegSession(LlamaSession):
    """Knows at which place of the grammar each row is; ends when all pictures have."""

    def __init__(
        self, model: JpegModel, prefix: Tensor, rows: int, grammar: bool = True, **options: Any
    ) -> None:
        super().__init__(model, prefix, rows, **options)
        self.grammar, self.constrained = model.codec.grammar, grammar
        self.places = [Place()] * rows
        self.ended = torch.zeros(rows, dtype=torch.bool, device=self.device)

    def processors(self, turn: Turn) -> dict[str, Any]:
        allowed = np.ones((self.rows, 1, VOCABULARY), bool)
        budget = len(self.layout) - turn.step
        for b, place in enumerate(self.places):
            ended = bool(self.ended[b])
            allowed[b, 0, PAD] = ended
            if ended:
                allowed[b, 0, :PAD] = False
            elif self.constrained:
                allowed[b, 0, :PAD] = self.grammar.allowed(place, budget)
        return {"allowed": torch.from_numpy(allowed).to(self.device)}

    def feed(self, turn: Turn) -> None:
        before, now = self.last.tolist(), turn.drawn[:, 0].tolist()
        for b, byte in enumerate(now):
            if byte != PAD and self.constrained:
                self.places[b] = self.grammar.step(self.places[b], byte)
        end = [a == 0xFF and b == 0xD9 for a, b in zip(before, now)]
        self.ended |= torch.tensor(end, device=self.device) & (turn.step > 0)
        self.finished = bool(self.ended.all())
        super().feed(turn)


def make(tokenizer: None, classes: int) -> JpegModel:
    return JpegModel(classes, depth=6, width=192, heads=3, dropout=0.0)


SYSTEM = System(
    "jpeg-lm",
    "JPEG-LM",
    "raster",
    "arXiv 2408.08459",
    "the bytes of a JPEG scan with restart markers, drawn under the grammar of JPEG",
    lambda images, folder: None,
    make,
    "Bytes without BPE (so released weights do not load), the constant header is no token, 32 px; the "
    "grammar makes every picture decodable, "
    "which the published sampler's repair does not.",
    image_size=32,
    batch_size=16,
)
