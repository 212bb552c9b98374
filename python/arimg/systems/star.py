"""STAR: scale-wise generation from a text, with stable sampling of the late scales (arXiv 2406.10797).

VAR's tokenizer; the last state of the text is the first token, all states come by cross-attention in each
block, without AdaLN; axial rotations whose scales all reach from 0 to 64. The tokens of a scale that VAR
draws independently disagree with each other; from scale `refined_from` on, a refiner of three blocks looks at
the backbone's features and at the tokens fixed so far, and fixes them in several passes, the first in random
order and then the most probable first. As published: 1024 x 1024 pixels (9,451 tokens in 14 scales) in 2.2 s
on an A100.

The released code takes element [0] of the cross-attention's result and so gives the text of the first row to
all rows; here every row sees its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.commit import ByRatio, Plan, arccosine
from arimg.data.images import Images
from arimg.generators.loop import ALWAYS, EachStep, Sampler, Session, Turn
from arimg.generators.scale_text import ScaleSession, ScaleText
from arimg.generators.star_parts import NAMES, Refiner, StarBlock
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.conditioning import Text
from arimg.nn.rope import rope_normalised
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import scale_tokenizer
from arimg.tokenizers import VQVAE


class Star(ScaleText, SystemModel):
    """refined_from: the first scale that is refined; steps: its passes, of which `random_steps` in random
    order.
    """

    title = "star"
    plain = "one pass a scale", {"commit": ALWAYS, "refined": False}
    tokenizer = Hidden()
    sampler = Sampler(Guidance(4.0, linear, BeyondConditional()), top_k=600, top_p=0.8)

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, *, refined_from: int = 3, refiner_depth: int = 3,
        steps: int = 8, random_steps: int = 5, **size: Any,
    ) -> None:  # fmt: skip
        layout = Layout.scales(tokenizer.scales)
        if not 1 <= refined_from <= len(layout):
            raise ValueError(f"expected refined_from of 1..{len(layout)}, got {refined_from}")
        super().__init__(layout, tokenizer.z_channels, tokenizer.vocab_size, num_classes, **size)
        self.tokenizer, self.refined_from = tokenizer, refined_from
        self.plan = Plan(ByRatio(steps, arccosine), random_steps=random_steps)
        self.refiner = Refiner(
            tokenizer.z_channels, tokenizer.vocab_size, self.width, self.heads, refiner_depth, len(layout),
            self.text.text_width,
        )  # fmt: skip

    raw_text = True

    def _block(self) -> StarBlock:
        return StarBlock(self.width, self.heads, self.text.text_width)

    def _norm(self) -> nn.Module:
        return nn.Identity()  # the refiner sees the features as they are

    def scores(self, h: Tensor) -> Tensor:
        """Logits of the backbone's own, from its features."""
        logits: Tensor = self.head(F.layer_norm(h, h.shape[-1:], eps=1e-6)).float()
        return logits

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, tokenizer: VQVAE, nothing: Tensor, **options: Any
    ) -> Star:
        """The model of released weights, in evaluation mode; sizes are read off them.

        nothing: states [T, text width] of the empty text. A condition is then a `Text` of CLIP's states. The
        scales are the tokenizer's; options: refined_from, 9 unless given, steps, random_steps.
        """
        ours = checkpoint.translated(state, NAMES, "STAR", ("class_emb.",), (".zero_k_bias",))
        kv = checkpoint.tensor_of(ours, "blocks.0.cross.mat_kv.weight", 2, "STAR")
        levels = len(checkpoint.tensor_of(ours, "lvl_embed.weight", 2, "STAR"))
        if levels != len(tokenizer.scales):
            raise ValueError(f"expected a tokenizer of {levels} scales, got {len(tokenizer.scales)}")
        if nothing.dim() != 2 or nothing.shape[1] != kv.shape[1]:
            raise ValueError(f"expected nothing [T, {kv.shape[1]}], got {list(nothing.shape)}")
        ours["text.table"] = torch.stack((torch.zeros_like(nothing), nothing)).to(kv)
        sizes = {
            "depth": checkpoint.count(ours, "blocks."),
            "width": len(kv) // 2,
            "heads": ours["blocks.0.attn.scale_mul_1H11"].shape[1],
            "refiner_depth": checkpoint.count(ours, "refiner.blocks."),
            "refined_from": 9,
            "text_width": kv.shape[1],
            "tokens": len(nothing),
        }
        return checkpoint.built(lambda: cls(tokenizer, 1, **sizes | options), ours, "STAR")

    @property
    def commit(self) -> EachStep:
        """Several passes for the refined scales, one for the others."""
        return EachStep(lambda step, n: self.plan if step >= self.refined_from else None)

    def rope(self) -> Rope:
        head_dim = self.width // self.heads
        return rope_normalised(self.layout.shapes, head_dim, device=self.lvl_embed.weight.device)

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat(self.tokenizer.encode(pixels), 1)

    def forward(self, condition: Any, maps: Tensor) -> Tensor:
        """Teacher forcing of the backbone: labels or `Text`, maps [B, L - first, z] -> logits [B, L, V]."""
        return self.scores(self.teacher_forced(condition, maps))

    def first(self, text: Text, told: Any) -> Tensor:
        """The summary of the text."""
        projected: Tensor = self.text.project(text.last)
        return self.pos_start + projected[:, None]

    def refine(
        self, h: Tensor, tokens: Tensor, final: Tensor, summary: Tensor, scale: int, rope: Rope | None = None
    ) -> Tensor:
        """Logits of the refiner for one scale: h [B, n, C], tokens int64 [B, n], final bool [B, n]."""
        codes = self.tokenizer.quantize.embedding.weight.detach()[tokens]
        start, rope = self.layout.segments[scale][0], self.rope() if rope is None else rope
        logits: Tensor = self.refiner(h, codes, final, summary, scale, rope, start)
        return logits

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of the backbone, plus that of the refiner on tokens that are not fixed. No gradient of the second
        reaches the backbone, as if it were frozen.
        """
        scales = examples.split(self.layout.sizes, 1)
        if self.training:
            labels = self.text.drop(labels, self.class_dropout)
        text = self.text(labels)
        maps = self.tokenizer.quantize.generator_input(scales)
        h = self.taught(text, maps)
        loss = F.cross_entropy(self.scores(h).flatten(0, 1), examples.flatten())
        wrong, count, rope = h.new_zeros(()), h.new_zeros(()), self.rope()
        for k in range(self.refined_from, len(scales)):
            start, end = self.layout.segments[k]
            share = torch.rand(len(examples), 1, device=h.device).arccos() * 2 / torch.pi
            open_ = torch.rand(len(examples), end - start, device=h.device) < share
            logits = self.refine(h[:, start:end].detach(), scales[k], ~open_, text.last, k, rope)
            each = F.cross_entropy(logits.flatten(0, 1), scales[k].flatten(), reduction="none")
            wrong, count = wrong + (each.view_as(open_) * open_).sum(), count + open_.sum()
        return loss + wrong / count.clamp(min=1)

    def begin(self, condition: Any, guided: bool, **options: Any) -> StarSession:
        """options: cached; refined, False for the backbone's own logits in every scale."""
        return StarSession(self, condition, guided, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        assert isinstance(session, StarSession)
        return self.tokenizer.decode_features(session.f_hat)


class StarSession(ScaleSession):
    """The backbone runs once for a scale, the refiner once for each of its passes."""

    def __init__(
        self, model: Star, condition: Any, guided: bool, refined: bool = True, **options: Any
    ) -> None:
        super().__init__(model, condition, guided, **options)
        self.star, self.refined = model, refined
        self.f_hat = model.tokenizer.quantize.empty(self.rows)

    def maps(self, turn: Turn) -> Tensor:
        return self.star.tokenizer.quantize.next_map(self.f_hat, turn.step)

    def logits(self, turn: Turn) -> Tensor:
        if turn.number == 0:
            self.h = self.features(turn)
        if not self.refined or turn.step < self.star.refined_from:
            return self.star.scores(self.h)
        tokens = torch.zeros(self.rows, self.h.shape[1], dtype=torch.int64, device=self.device)
        final = torch.zeros_like(tokens, dtype=torch.bool)
        if turn.tokens is not None and turn.final is not None:
            tokens, final = turn.tokens, turn.final
        times = len(self.h) // self.rows
        tokens, final = tokens.repeat(times, 1), final.repeat(times, 1)
        return self.star.refine(self.h, tokens, final, self.text.last, turn.step, self.rope)

    def feed(self, turn: Turn) -> None:
        if not turn.done:
            return
        quantizer = self.star.tokenizer.quantize
        self.f_hat = self.f_hat.clone()
        quantizer.accumulate_(self.f_hat, quantizer.code_map(turn.drawn, turn.step), turn.step)


def tokenizer(images: Images, folder: Path) -> VQVAE:
    """The bundled one, whatever the images are."""
    return scale_tokenizer()


def make(tokenizer: Any, classes: int) -> Star:
    return Star(tokenizer, classes, depth=6, width=192, heads=3, refiner_depth=2)


SYSTEM = System(
    "star",
    "STAR",
    "next-scale",
    "arXiv 2406.10797",
    "next-scale from a text by cross-attention; late scales are fixed token by token, most probable first",
    tokenizer,
    make,
    "The caption is the class, as four learned states (states of a text encoder are taken as they come, the "
    "last one as the summary); the refiner has two blocks, works on the last two of five scales and trains "
    "together with the backbone, to which it sends no gradient; guidance rises over all scales (released: "
    "full in refinement); every row sees its own text, where the released code shows all rows that of "
    "the first.",
    released=True,
)
