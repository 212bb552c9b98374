"""CUDA graphs of VAR's steps: one for each scale, over memory that lasts from generation to generation."""

from typing import Any
from weakref import proxy

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate.graphs import Graphs
from arimg.generators.loop import Turn
from arimg.generators.var import VAR, VarSession


class _GraphedSession(VarSession):
    """A session whose constants and caches stay at their place in memory, so that its steps can be replayed.

    How many tokens the caches hold follows from the scale alone and is a constant of its graph.
    """

    def __init__(self, model: VAR, labels: Tensor, guided: bool, graphs: Graphs) -> None:
        with torch.inference_mode(False), torch.no_grad():
            super().__init__(model, labels, guided)
        own = proxy(self)  # no cycle: the memory goes with the last use
        self.graphed = graphs.step(lambda f_hat, k: own._replayable(f_hat, k), watched=model.parameters)

    def restart(self, labels: Tensor) -> None:
        """The next generation: its constants go where those before were."""
        self.f_hat = self.model.tokenizer.quantize.empty(self.rows)
        own = self._constants()
        kept = self.condition, self.positions, self.q_scales
        self._start(labels)
        torch._foreach_copy_(own, self._constants())
        self.condition, self.positions, self.q_scales = kept

    def _constants(self) -> list[Tensor]:
        parts = [self.condition.first, *self.condition.head, self.positions]
        parts += [t for modulation in self.condition.blocks for t in modulation]
        return parts + [t for t in self.q_scales if t is not None]

    def logits(self, turn: Turn) -> Tensor:
        return self.graphed(self.f_hat, k=turn.step)[0]

    def _replayable(self, f_hat: Tensor, k: int) -> tuple[Tensor]:
        self.segment = self.model.layout.segments[k]
        return (self._step(k, f_hat),)

    def _attend(self, i: int, qkv: Tensor) -> Tensor:
        attn, cache, (start, end) = self.blocks[i].attn, self.caches[i], self.segment
        q = ops.append_qk_norm_(cache.k, cache.v, qkv, start, self.q_scales[i], attn.l2_norm)
        out = ops.cached_attention(q, cache.k, cache.v, end, scale=attn.softmax_scale)
        return out.transpose(1, 2).flatten(2)


class Sessions:
    """What the generations of one view start with. A session is in use by one generation at a time; the last
    one that has ended is kept for the next.
    """

    def __init__(self, module: nn.Module, graphs: Graphs) -> None:
        self.module, self.graphs = module, graphs
        self.used: tuple[Any, _GraphedSession] | None = None

    def begin(self, view: VAR, labels: Tensor, guided: bool, more_smooth: bool = False) -> VarSession:
        if not self.graphs.usable(labels.device):
            return VarSession(view, labels, guided, more_smooth)
        p = view.pos_1LC
        kind = (id(view), len(labels), guided, p.dtype, p.device)
        known, session = self.graphs.kept.pop(self.module, (None, None))
        if known == kind:
            session.restart(labels)
        else:
            del session  # its memory goes before there is more
            session = _GraphedSession(view, labels, guided, self.graphs)
        session.more_smooth = more_smooth
        self.used = kind, session
        return session

    def end(self) -> None:
        """The generation has ended: its memory serves the next."""
        if self.used is not None:
            self.graphs.kept[self.module] = self.used
