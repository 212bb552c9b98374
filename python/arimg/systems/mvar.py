"""M-VAR: scale-wise generation with the two kinds of dependence apart (arXiv 2411.10433).

A block is attention within each scale, Mamba-2 over all scales from coarse to fine, and a feed-forward part.
Generation carries the state of Mamba-2 from scale to scale: nothing grows, and no prefix is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.cache import KVCache
from arimg.generators.loop import Turn
from arimg.generators.var import VAR, VarSession, uncached
from arimg.layout import Layout
from arimg.nn.adaln import AdaLNBlock, Attend, HeadModulation
from arimg.nn.linear import Linear
from arimg.nn.state_mixers import Carried, Mamba2
from arimg.systems.base import System
from arimg.systems.var import VarModel, tokenizer

Mix = Callable[[int, Tensor], Tensor]  # (block, [B, L, C]) -> [B, L, C]


class NineVectors(NamedTuple):
    """Modulation of a block's three branches, each [B, 1, C]."""

    gate1: Tensor
    gate2: Tensor
    gate3: Tensor
    scale1: Tensor
    scale2: Tensor
    scale3: Tensor
    shift1: Tensor
    shift2: Tensor
    shift3: Tensor


class MambaBlock(AdaLNBlock):
    """Weights of a block: `attn`, `mamba`, `ffn`, and the projection to nine vectors."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, l2_norm: bool, drop_path: float, head_dim: int
    ) -> None:
        super().__init__(width, heads, hidden, shared=False, l2_norm=l2_norm, drop_path=drop_path)
        self.mamba = Mamba2(width, head_dim=head_dim)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 9 * width))

    def modulation(self, condition: Tensor) -> Any:
        return NineVectors(*self.ada_lin(condition).unflatten(-1, (1, 9, -1)).unbind(2))


def run_mixed(
    blocks: list[MambaBlock],
    x: Tensor,
    modulations: list[NineVectors],
    last: HeadModulation,
    attend: Attend,
    mix: Mix,
    eps: float = 1e-6,
) -> Tensor:
    """All blocks and the norm before the head: x [B, L, C] -> [B, L, C]."""
    m = [NineVectors(*(t.to(x.dtype) for t in v)) for v in modulations]
    ends = [(v.scale1, v.shift1) for v in m[1:]] + [(last.scale.to(x.dtype), last.shift.to(x.dtype))]
    h = ops.norm_modulate(x, m[0].scale1, m[0].shift1, eps=eps)
    for i, (block, v, end) in enumerate(zip(blocks, m, ends)):
        y = block.drop(block.attn.proj(attend(i, block.attn.qkv(h))))
        x, h = ops.gated_residual_norm(x, y.to(x.dtype), v.gate1, v.scale2, v.shift2, eps=eps)
        y = block.drop(mix(i, h))
        x, h = ops.gated_residual_norm(x, y.to(x.dtype), v.gate2, v.scale3, v.shift3, eps=eps)
        y = block.drop(block.ffn(h))
        x, h = ops.gated_residual_norm(x, y.to(x.dtype), v.gate3, *end, eps=eps)
    return h


class MVAR(VarModel):
    """A VAR of level-diagonal attention whose scales are joined by Mamba-2."""

    title = "M-VAR"
    plain = "prefix run again", {"carried": False}
    rule = "level-diagonal"
    mamba_head_dim: int

    def __init__(self, *args: Any, mamba_head_dim: int = 64, **size: Any) -> None:
        self.__dict__["mamba_head_dim"] = mamba_head_dim  # before the blocks are made
        VAR.__init__(self, *args, **size)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "mamba_head_dim": self.mamba_head_dim}

    def _block(self, hidden: int, drop_path: float) -> MambaBlock:
        if self.shared_adaln:
            raise ValueError("expected shared_adaln=False, got True: each block has its own nine vectors")
        return MambaBlock(
            self.width, self.heads, hidden, l2_norm=self.attn_l2_norm, drop_path=drop_path,
            head_dim=self.mamba_head_dim,
        )  # fmt: skip

    def _score(self, x: Tensor, condition: Any, drop: Any = None, scales: int | None = None) -> Tensor:
        layout = self.layout if scales is None else Layout(self.layout.shapes[:scales])
        blocks = cast(list[MambaBlock], self._blocks)
        attend = uncached(blocks, layout.visibility(self.rule, device=x.device))
        h = run_mixed(blocks, x, condition.blocks, condition.head, attend, lambda i, h: blocks[i].mamba(h)[0])
        return self.head(h)

    def begin(self, condition: Any, guided: bool, **options: Any) -> MvarSession:
        """Opens a generation for class labels [B]; options: carried=False runs Mamba-2 over the whole prefix
        at each scale, as the released code does.
        """
        return MvarSession(self, self.labels(condition), guided, **options)


class MvarSession(VarSession):
    """One generation: what each Mamba-2 carries, of constant size (or, not carried, its inputs so far)."""

    def __init__(self, model: MVAR, labels: Tensor, guided: bool, carried: bool = True) -> None:
        super().__init__(model, labels, guided)
        self.states: list[Carried | None] = [None] * len(self.blocks)
        self.inputs: list[Tensor] | None = None if carried else [torch.empty(0)] * len(self.blocks)

    def _new_caches(self) -> list[KVCache]:
        return []

    def logits(self, turn: Turn) -> Tensor:
        x = self._input(turn.step, self.f_hat)
        seen = Layout.scales([turn.shape]).visibility("full", device=x.device)
        blocks = cast(list[MambaBlock], self.blocks)
        modulations = cast(list[NineVectors], self.condition.blocks)
        h = run_mixed(blocks, x, modulations, self.condition.head, uncached(blocks, seen), self._mix)
        return self.model.head(h)

    def _mix(self, i: int, h: Tensor) -> Tensor:
        mamba = cast(MambaBlock, self.blocks[i]).mamba
        if self.inputs is not None:
            before = self.inputs[i]
            self.inputs[i] = torch.cat((before, h), 1) if before.numel() else h
            return mamba(self.inputs[i])[0][:, -h.shape[1] :]
        out, self.states[i] = mamba(h, self.states[i])
        return out

    @property
    def nbytes(self) -> int:
        """Of what is carried from scale to scale."""
        held = [*(t for s in self.states if s is not None for t in s), *(self.inputs or ())]
        return sum(t.nbytes for t in held)


def make(tokenizer: Any, classes: int) -> MVAR:
    return MVAR(tokenizer, classes, depth=4, width=128, heads=2, attn_l2_norm=False)


SYSTEM = System(
    "mvar",
    "M-VAR",
    "next-scale",
    "arXiv 2411.10433",
    "attention within a scale, Mamba-2 across scales with a carried state",
    tokenizer,
    make,
    deviations="the released code runs Mamba-2 over the whole prefix at each scale (carried=False); parameter"
    " names inside a block are this package's, as the code has no licence, so released weights do not load;"
    " formula and schedule of the guidance are assumed to be VAR's, with the published strength of 1.5",
)
