"""CUDA graphs of the steps of a generator: one launch for the kernels of all layers.

`GraphedStep` does the bookkeeping, a `Backend` the capture; `Graphs` is what one call of `accelerate` shares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from arimg.accelerate.swap import Mixin

Outputs = Sequence[Tensor]


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in lists and tuples."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Backend(Protocol):
    """What records a function's launches and runs them again."""

    def refusal(self) -> str:
        """Why nothing can be captured here, or nothing."""

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """The function's outputs, and what runs it again on the same memory."""


class CudaBackend:
    """torch.cuda.graph; the graphs of a device share a pool of memory, for they run one after another."""

    def __init__(self) -> None:
        # by device: the stream of captures, and the graphs in use
        self._devices: dict[torch.device, tuple[Any, WeakSet[Any]]] = {}

    def refusal(self) -> str:
        return "" if torch.cuda.is_available() else "no CUDA device here"

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        device = function()[0].device  # libraries set up what they need in a thread at its first use
        with torch.cuda.device(device):
            if device not in self._devices:
                self._devices[device] = torch.cuda.Stream(), WeakSet()
            stream, graphs = self._devices[device]
            pool = next((g.pool() for g in graphs), None)  # a pool ends with the last graph in it
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # thread_local: another thread may decode, and allocate, meanwhile (arimg.pipelined)
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = function()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
        graphs.add(graph)
        return outputs, graph.replay

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaBackend, ()


@dataclass
class Counts:
    """What has happened so far, and why steps ran without a graph."""

    captures: int = 0
    replays: int = 0
    reasons: dict[str, None] = field(default_factory=dict)  # a set that keeps its order


class _Captured(NamedTuple):
    inputs: tuple[Tensor, ...]
    outputs: Outputs
    replay: Callable[[], None]


class GraphedStep:
    """A function of tensors that is captured at the second call of a shape and replayed from then on.

    function(*inputs, **settings) -> tensors; what it reads beside its inputs must stay at its place in
    memory: `watched` gives those tensors that may move, and when one has, everything is captured anew. Inputs
    are copied in and outputs out, so that a result stays as it is. A shape is the inputs' shapes and types
    with the settings, which are constants of a graph. Where a capture fails, the function runs as it is, and
    `reason` says why.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        backend: Backend,
        watched: Callable[[], Iterable[Tensor]] = tuple,
        counts: Counts | None = None,
    ) -> None:
        self.function, self.backend, self.watched = function, backend, watched
        self.counts = counts or Counts()
        self.reason = backend.refusal()
        self._graphs: dict[Hashable, _Captured | None] = {}  # None: seen once
        self._places: tuple[int, ...] = ()

    def __call__(self, *inputs: Tensor, **settings: Hashable) -> Outputs:
        if self.reason:
            return self.function(*inputs, **settings)
        places = tuple(map(Tensor.data_ptr, self.watched()))
        if places != self._places:
            self.reset()
            self._places = places
        shapes = tuple((t.shape, t.dtype, t.device) for t in inputs)
        key = (shapes, tuple(sorted(settings.items())))
        if key not in self._graphs:
            self._graphs[key] = None
            return self.function(*inputs, **settings)
        graph = self._graphs[key]
        if graph is None:
            graph = self._capture(inputs, settings)
            if graph is None:
                return self.function(*inputs, **settings)
            self._graphs[key] = graph
        for own, given in zip(graph.inputs, inputs):
            own.copy_(given)
        graph.replay()
        self.counts.replays += 1
        return tuple(t.clone() for t in graph.outputs)

    def _capture(self, inputs: tuple[Tensor, ...], settings: dict[str, Hashable]) -> _Captured | None:
        with torch.inference_mode(False):  # memory that calls outside inference mode may write, too
            own = tuple(t.detach().clone() for t in inputs)
        try:
            outputs, replay = self.backend.capture(partial(self.function, *own, **settings))
        except RuntimeError as error:  # of the device, its memory too; others are the function's own
            self.reset()
            self.reason = f"capture failed: {_text(error)}"
            if isinstance(error.__context__, RuntimeError):
                self.reason += f"; before it: {_text(error.__context__)}"
            self.counts.reasons[self.reason] = None
            return None
        self.counts.captures += 1
        return _Captured(own, outputs, replay)

    def reset(self) -> None:
        """Drops all graphs."""
        self._graphs.clear()


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class Graphs:
    """The graphs of one `accelerate(graphs=True)`: by module, and why some steps ran without one.

    A copy of a model starts with none.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend or CudaBackend()
        self.kept: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        self.counts = Counts()

    def step(
        self, function: Callable[..., Outputs], watched: Callable[[], Iterable[Tensor]] = tuple
    ) -> GraphedStep:
        return GraphedStep(function, self.backend, watched, self.counts)

    def usable(self, device: torch.device) -> bool:
        """Whether a step on this device may be captured now; writes down why not."""
        reason = self.backend.refusal()
        if not reason and torch.is_autocast_enabled(device.type):
            reason = "under autocast: the type of its products may change between calls"
        if not reason and isinstance(self.backend, CudaBackend) and device.type != "cuda":
            reason = f"the model is on {device.type}"
        if not reason and torch.compiler.is_compiling():
            reason = "inside torch.compile"
        if reason:
            self.counts.reasons[reason] = None
        return not reason

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.backend,)

    def __str__(self) -> str:
        refusal = self.backend.refusal()
        if refusal:
            return f"not used: {refusal}"
        done = f"{self.counts.captures} captured, {self.counts.replays} replayed so far"
        text = f"captured at the second step of a shape ({done})"
        return f"{text}; not used: {'; '.join(self.counts.reasons)}" if self.counts.reasons else text


class Graphed(Mixin):
    """Base of a replacement whose steps may have graphs, which end with it."""

    graphs: Graphs | None

    def _arimg_release(self) -> None:
        module: Any = self
        super()._arimg_release()
        if module.graphs is not None:
            module.graphs.kept.pop(module, None)
