"""STAR: scale-wise generation from a text, with stable sampling of the late scales (arXiv 2406.10797).

VAR's tokenizer; the mean of the text is the first token, its states come by cross-attention in each block,
without AdaLN; axial rotations whose scales all reach from 0 to 64. The tokens of a scale that VAR draws
independently disagree with each other; from scale `refined_from` on, a refiner of three blocks looks at the
backbone's features and at the tokens fixed so far, and fixes them in several passes, the first in random
order and then the most probable first. As published: 1024 x 1024 pixels (9,451 tokens in 14 scales) in 2.2 s
on an A100.

The released code takes element [0] of the cross-attention's result and so gives the text of the first row to
all rows; here every row sees its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.commit import ByRatio, Plan, arccosine
from arimg.data.images import Images
from arimg.generators.loop import ALWAYS, EachStep, Sampler, Session, Turn, generate
from arimg.generators.scale_text import ScaleBlock, ScaleSession, ScaleText, masked
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.layout import Layout, Visibility
from arimg.nn.linear import Linear
from arimg.nn.rope import rope_normalised
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import scale_tokenizer
from arimg.tokenizers import VQVAE


class Refiner(nn.Module):
    """Logits of a scale's tokens given the backbone's features and the tokens that are fixed.

    A token sees its own scale and the first token of the picture (a sink, whose token is never told).
    """

    def __init__(self, channels: int, outputs: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.fixed, self.open = Linear(channels, width), nn.Parameter(torch.randn(width) * 0.02)
        self.join = Linear(2 * width, width)
        self.blocks = nn.ModuleList(ScaleBlock(width, heads, 4 * width, cross=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), Linear(width, outputs)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self, h: Tensor, codes: Tensor, final: Tensor, seen: Visibility, rope: Rope, at: Tensor
    ) -> Tensor:
        """h [B, L, C], codes [B, L, channels] of the tokens, of which final, bool [B, L], are fixed; at: rows
        of the rope, int64 [1, L].
        """
        told = torch.where(final[..., None], self.fixed(codes.to(h.dtype)), self.open)
        x = self.join(torch.cat((h, told), -1))
        for block in self.blocks:
            assert isinstance(block, ScaleBlock)

            def attend(qkv: Tensor, block: ScaleBlock = block) -> Tensor:
                return masked(block, qkv, seen, rope, at)

            x = block(x, attend, _no_text)
        out: Tensor = self.head(self.norm(x)).float()
        return out


def _no_text(*_: Any) -> Tensor:
    raise AssertionError("a refiner has no cross-attention")


class Star(ScaleText, SystemModel):
    """refined_from: the first scale that is refined; steps: its passes, of which `random_steps` in random
    order.
    """

    tokenizer = Hidden()
    sampler = Sampler(Guidance(4.0, linear, BeyondConditional()), top_k=600, top_p=0.8)

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, *, refined_from: int = 3, refiner_depth: int = 3,
        steps: int = 8, random_steps: int = 5, **size: Any,
    ) -> None:  # fmt: skip
        layout = Layout.scales(tokenizer.scales)
        if not 1 <= refined_from <= len(layout):
            raise ValueError(f"expected refined_from of 1..{len(layout)}, got {refined_from}")
        if layout.sizes[0] != 1:
            raise ValueError(f"expected a first scale of 1 token, the sink, got {layout.sizes[0]}")
        super().__init__(layout, tokenizer.z_channels, tokenizer.vocab_size, num_classes, **size)
        self.tokenizer, self.refined_from = tokenizer, refined_from
        self.plan = Plan(ByRatio(steps, arccosine), random_steps=random_steps)
        self.refiner = Refiner(
            tokenizer.z_channels, tokenizer.vocab_size, self.width, self.heads, refiner_depth
        )

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
        logits: Tensor = self.head(self.teacher_forced(condition, maps)).float()
        return logits

    def refine_all(self, h: Tensor, tokens: Tensor, final: Tensor) -> Tensor:
        """Logits of the refiner for all scales side by side: h [B, L, C], tokens int64 [B, L], final bool."""
        codes = self.tokenizer.quantize.embedding.weight.detach()[tokens]
        final = final & (self.layout.level(h.device) > 0)
        seen = self.layout.visibility("level-diagonal", sinks=1, device=h.device)
        at = torch.arange(self.layout.length, device=h.device)[None]
        out: Tensor = self.refiner(h, codes, final, seen, self.rope(), at)
        return out

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of the backbone, plus that of the refiner on tokens that are not fixed. No gradient of the second
        reaches the backbone, as if it were frozen.
        """
        maps = self.tokenizer.quantize.generator_input(examples.split(self.layout.sizes, 1))
        h = self.teacher_forced(labels, maps)
        loss = F.cross_entropy(self.head(h).float().flatten(0, 1), examples.flatten())
        progress = torch.rand(len(examples), len(self.layout), device=h.device)
        masked_share = (progress.arccos() * 2 / torch.pi)[:, self.layout.level(h.device)]
        open_ = torch.rand(examples.shape, device=h.device) < masked_share
        open_ = open_ & (self.layout.level(h.device) >= self.refined_from)
        logits = self.refine_all(h.detach(), examples, ~open_)
        each = F.cross_entropy(logits.flatten(0, 1), examples.flatten(), reduction="none").view_as(open_)
        return loss + (each * open_).sum() / open_.sum().clamp(min=1)

    def begin(self, condition: Any, guided: bool, **options: Any) -> StarSession:
        """options: cached; refined, False for the backbone's own logits in every scale."""
        return StarSession(self, condition, guided, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        assert isinstance(session, StarSession)
        return self.tokenizer.decode_features(session.f_hat)

    def ways(self) -> dict[str, Callable[[Tensor, int], Iterator[Turn]]]:
        return {
            "star": lambda labels, seed: generate(self, labels, seed=seed),
            "one pass a scale": lambda labels, seed: generate(
                self, labels, seed=seed, commit=ALWAYS, refined=False
            ),
        }


class StarSession(ScaleSession):
    """The backbone runs once for a scale, the refiner once for each of its passes."""

    def __init__(
        self, model: Star, condition: Any, guided: bool, refined: bool = True, **options: Any
    ) -> None:
        super().__init__(model, condition, guided, **options)
        self.star, self.refined = model, refined
        self.f_hat = model.tokenizer.quantize.empty(self.rows)
        self.turns_by = model.rope()

    def maps(self, turn: Turn) -> Tensor:
        return self.star.tokenizer.quantize.next_map(self.f_hat, turn.step)

    def logits(self, turn: Turn) -> Tensor:
        if turn.number == 0:
            self.h = self.features(turn)
            if turn.step == 0:
                self.sink = self.h[:, :1]
        if not self.refined or turn.step < self.star.refined_from:
            return self.star.head(self.h).float()  # type: ignore[no-any-return]
        return self._refine(turn)

    def _refine(self, turn: Turn) -> Tensor:
        n, device = turn.shape[0] * turn.shape[1], self.device
        tokens = torch.zeros(self.rows, n, dtype=torch.int64, device=device)
        final = torch.zeros(self.rows, n, dtype=torch.bool, device=device)
        if turn.tokens is not None and turn.final is not None:
            tokens, final = turn.tokens, turn.final
        tokens, final = (F.pad(t, (1, 0)) for t in (tokens, final))  # the sink in front
        times = len(self.h) // self.rows
        codes = self.star.tokenizer.quantize.embedding.weight[tokens].repeat(times, 1, 1)
        end = torch.full((n + 1,), n + 1, dtype=torch.int32, device=device)
        end[0] = 1
        seen = Visibility(torch.zeros_like(end), end, n + 1)
        at = torch.cat((torch.zeros(1, dtype=torch.int64), turn.start + torch.arange(n)))[None].to(device)
        h = torch.cat((self.sink, self.h), 1)
        logits: Tensor = self.star.refiner(h, codes, final.repeat(times, 1), seen, self.turns_by, at)
        return logits[:, 1:]

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
    "The caption is the class, as four learned states (states of a text encoder are taken as they come); the "
    "refiner has two blocks, works on the last two of five scales and trains together with the backbone, to "
    "which it sends no gradient; every row sees its own text, where the released code shows all rows that of "
    "the first.",
)
