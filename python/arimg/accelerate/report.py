"""What an acceleration did, and its way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from arimg.accelerate import swap
from arimg.accelerate.graphs import Graphs
from arimg.accelerate.swap import Mixin
from arimg.accelerate.view import bytes_of_code


@dataclass(frozen=True)
class Entry:
    """One part: where it is, what it is, and what takes its place or why nothing does."""

    path: str
    part: str
    note: str


@dataclass
class Report:
    """What was replaced, what was not and why. `restore()` undoes it; so does the end of a `with` block."""

    model: str
    replaced: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    dtype: torch.dtype | None = None  # of the weights of large matrix products; None: their own
    graphs: Graphs | None = None  # of a generator's steps, where asked for
    weights: str | None = None  # "int8" or "int4": what the products of decoding read; None: dtype's
    memory: int = 0  # bytes beyond the original's
    _modules: list[Any] = field(default_factory=list, repr=False)

    def swap(self, module: Any, mixin: type[Mixin], path: str, note: str, **options: Any) -> None:
        """Replaces the methods of a module, or of a pipeline's scheduler, and writes it down."""
        self.replaced.append(Entry(path, type(module).__name__, note))
        swap.swap(module, mixin, **options)
        self._modules.append(module)
        has_weights = isinstance(module, nn.Module)
        if has_weights and self.weights and options.get("weights_storage") != self.weights:
            self.kept.append(Entry(path, type(module).__name__, f"its weights: no {self.weights} here"))

    def swap_generator(
        self,
        module: nn.Module,
        mixin: type[Mixin],
        path: str,
        note: str,
        packed: Callable[[str], int] | None = None,
    ) -> None:
        """`swap` for a generator, which may run on a copy of its weights (`dtype`, or `weights`).

        packed: the bytes of its weights in a storage of codes, for one that can run on them.
        """
        if self.weights and packed is not None:
            self.memory += packed(self.weights)
            note = f"{note}; weights {self.weights}"
            self.swap(module, mixin, path, note, weights_storage=self.weights, graphs=self.graphs)
            return
        self.swap(module, mixin, path, note, weights_storage=self.dtype, graphs=self.graphs)
        if self.dtype is not None:
            self.memory += self.dtype.itemsize * sum(p.numel() for p in module.parameters())

    def swap_copied(
        self,
        module: nn.Module,
        mixin: type[Mixin],
        path: str,
        note: str,
        weights: Iterable[Tensor],
        turned: bool = False,
        **options: Any,
    ) -> None:
        """`swap` for a module that multiplies by copies of these weights: codes (`weights`), or another type
        of those that are float32 (`dtype`). turned: they are [I, O]. There are no copies on a GPU.
        """
        weights = list(weights)
        if any(w.device.type != "cpu" for w in weights):
            if self.dtype is not None:
                self.keep(module, path, "its weights: copies are for the CPU")
            self.swap(module, mixin, path, note, weights_storage=None, **options)
            return
        if self.weights is not None:
            self.memory += sum(bytes_of_code(w.t() if turned else w, self.weights) for w in weights)
            note = f"{note}; weights {self.weights}"
            self.swap(module, mixin, path, note, weights_storage=self.weights, **options)
            return
        self.swap(module, mixin, path, note, weights_storage=self.dtype, **options)
        if self.dtype is not None:
            copied = sum(w.numel() for w in weights if w.dtype == torch.float32)
            self.memory += self.dtype.itemsize * copied

    def keep(self, module: Any, path: str, reason: str) -> None:
        """Writes down why a known part is left as it is."""
        self.kept.append(Entry(path, type(module).__name__, reason))

    def restore(self) -> None:
        """The model as it was. A second call does nothing."""
        for module in self._modules:
            swap.restore(module)
        self._modules.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"arimg.accelerate: {self.model}"]
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            lines += [f"  {title}:" if entries else f"  {title}: nothing"]
            lines += [f"    {path}: {part}: {note}" for path, part, note in _grouped(entries)]
        extra = f"{self.memory / 2**20:.0f} MiB" if self.memory else "nothing"
        lines += [f"  memory beyond the original's: {extra}"]
        return "\n".join(lines if self.graphs is None else [*lines, f"  CUDA graphs: {self.graphs}"])


def _grouped(entries: list[Entry]) -> list[tuple[str, str, str]]:
    """One line for equal entries: the first and last path, and how many."""
    groups: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        groups.setdefault((e.part, e.note), []).append(e.path or "(the model)")
    return [
        (paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]} ({len(paths)})", part, note)
        for (part, note), paths in groups.items()
    ]
