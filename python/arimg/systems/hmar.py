"""HMAR: hierarchical masked autoregression (arXiv 2506.04421), a Markov chain of scales whose tokens become
final in several passes.

The input of a scale is the reconstruction so far, averaged down, and its tokens see their own scale alone: no
cache. The first pass of a scale runs the base and the next-scale blocks; further ones run the base and the
mask blocks on the same input plus the codes that are final already, or a mask vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import commit, ops
from arimg.cache import KVCache
from arimg.generators.loop import ALWAYS, EachStep, Sampler, Turn
from arimg.generators.var import VAR, VarSession, uncached
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.adaln import AdaLNBlock, run_blocks
from arimg.nn.labels import with_unconditional
from arimg.systems.base import System
from arimg.systems.var import VarModel, tokenizer

# Share of each of the ten scales in the loss: the values that the published log-normal curve takes.
WEIGHTS = (0.0247, 0.0642, 0.115, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709)
RELEASED_STRENGTH = 1e-6  # of guidance in the refinement passes of the released code

_SEVERAL_PASSES = {side * side: p for side, p in zip((1, 2, 3), commit.HMAR) if p.steps > 1}


def scale_weights(scales: int) -> Tensor:
    """The weights of so many scales, float32 of sum 1: for other than ten, of the same curve."""
    curve = torch.tensor(WEIGHTS)[None, None]
    weights = F.interpolate(curve, scales, mode="linear", align_corners=True).flatten()
    return weights / weights.sum()


def plan(step: int, n: int) -> commit.Plan | None:
    """HMAR's passes for scales of 1, 4 and 9 tokens; others are final at once."""
    return _SEVERAL_PASSES.get(n)


class HMAR(VarModel):
    """A VAR of level-diagonal attention with a second set of last blocks for masked tokens.

    branch: how many of the last blocks there are twice (8 as published).
    """

    title = "HMAR"
    plain = "one pass per scale", {"commit": ALWAYS}
    sampler = Sampler(Guidance(1.6, linear, BeyondConditional()), top_k=650, top_p=0.99)
    commit = EachStep(plan)
    rule = "level-diagonal"

    def __init__(self, *args: Any, branch: int = 8, **size: Any) -> None:
        VAR.__init__(self, *args, **size)
        if not 0 < branch < self.depth:
            raise ValueError(f"expected a branch of 1..{self.depth - 1} blocks, got {branch}")
        self.branch = branch
        self.mask_blocks = copy.deepcopy(nn.ModuleList(list(self.blocks)[-branch:]))
        self.mask_head_nm, self.mask_head = copy.deepcopy(self.head_nm), copy.deepcopy(self.head)
        self.mask_embed = nn.Parameter(torch.randn(self.width) * self.width**-0.5)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "branch": self.branch}

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        return {**super()._sizes(state, heads), "branch": checkpoint.count(state, "mask_blocks.")}

    @property
    def _masked_chain(self) -> list[AdaLNBlock]:
        """Base and mask blocks."""
        return [*self._blocks[: -self.branch], *cast(list[AdaLNBlock], list(self.mask_blocks))]

    def own(self, tokens: Tensor, final: Tensor) -> Tensor:
        """What refinement adds to the input: codes of final tokens, the mask vector elsewhere, [B, n, C]."""
        codes = ops.lookup(tokens, self.tokenizer.quantize.embedding.weight)
        embedded = self.word_embed(codes.to(self.word_embed.weight.dtype))
        return torch.where(final[..., None], embedded, self.mask_embed.to(embedded.dtype))

    def masked(self, labels: Tensor, x: Tensor, tokens: Tensor, final: Tensor) -> Tensor:
        """Teacher forcing of refinement: x as for `forward`, tokens int64 [B, L], final bool [B, L] -> logits
        [B, L, V].
        """
        chain = self._masked_chain
        condition = self._condition(self.dropped(self.labels(labels)), chain, self.mask_head_nm)
        embedded = torch.cat((condition.first, self.word_embed(x.to(self.word_embed.weight.dtype))), 1)
        h = embedded + self._positions() + self.own(tokens, final)
        attend = uncached(chain, self.layout.visibility(self.rule, device=x.device))
        return self.mask_head(run_blocks(chain, h, condition.blocks, condition.head, attend)).float()

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of all tokens by the weights of their scales, and of the masked ones."""
        x = self.tokenizer.quantize.generator_input(examples.split(self.layout.sizes, 1))
        each = F.cross_entropy(self(labels, x).flatten(0, 1), examples.flatten(), reduction="none")
        per_scale = torch.stack([t.mean() for t in each.view_as(examples).split(self.layout.sizes, 1)])
        final = torch.rand(self.layout.length, device=x.device) >= torch.rand((), device=x.device)
        if bool(final.all()):
            final[-1] = False
        logits = self.masked(labels, x, examples, final.expand_as(examples))
        refined = F.cross_entropy(logits[:, ~final].flatten(0, 1), examples[:, ~final].flatten())
        return (per_scale * scale_weights(len(self.layout)).to(x.device)).sum() + refined

    def begin(self, condition: Any, guided: bool, **options: Any) -> HmarSession:
        """Opens a generation for class labels [B]; options: released, the guidance of the released code,
        which is as good as none in refinement passes.
        """
        return HmarSession(self, self.labels(condition), guided, **options)


class HmarSession(VarSession):
    """One generation: f_hat and the constants of the labels. Nothing grows."""

    def __init__(self, model: HMAR, labels: Tensor, guided: bool, released: bool = False) -> None:
        super().__init__(model, labels, guided)
        self.released, self.masked = released, model._masked_chain
        rows = with_unconditional(labels, model.num_classes, guided)
        self.mask_condition = model._condition(rows, self.masked, model.mask_head_nm)

    def _new_caches(self) -> list[KVCache]:
        return []

    def logits(self, turn: Turn) -> Tensor:
        model, x = cast(HMAR, self.model), self._input(turn.step, self.f_hat)
        tokens, final = turn.tokens, turn.final
        seen = Layout.scales([turn.shape]).visibility("full", device=x.device)
        if tokens is None or final is None:
            attend, c = uncached(self.blocks, seen), self.condition
            return model.head(run_blocks(self.blocks, x, c.blocks, c.head, attend))
        if self.released and turn.guidance is not None:
            turn.guidance = 1.0 + RELEASED_STRENGTH
        x = x + self._both(model.own(tokens, final))
        attend, c = uncached(self.masked, seen), self.mask_condition
        return model.mask_head(run_blocks(self.masked, x, c.blocks, c.head, attend))

    def feed(self, turn: Turn) -> None:
        if turn.done:
            super().feed(turn)


def refine(counts: Sequence[int]) -> Callable[[int, int], commit.Plan | None]:
    """Plans by the number of passes of each scale, for `EachStep`: most probable first, cosine amounts."""
    return lambda step, n: commit.Plan(commit.ByRatio(min(counts[step], n))) if counts[step] > 1 else None


def make(tokenizer: Any, classes: int) -> HMAR:
    return HMAR(tokenizer, classes, depth=6, width=192, heads=3, shared_adaln=True, branch=2)


SYSTEM = System(
    "hmar",
    "HMAR",
    "next-scale",
    "arXiv 2506.04421",
    "a Markov chain of scales without a cache, refined by confidence in mask blocks",
    tokenizer,
    make,
    deviations="next-scale and mask blocks are trained together instead of one after the other with a frozen"
    " base; guidance rises linearly over the scales as in released code, by a formula that is assumed to be"
    " VAR's, and is applied in refinement, too, where that code has 1e-6 (released=True); parameter names of"
    " the mask blocks are this package's, as the code was not read, so released weights do not load",
)
