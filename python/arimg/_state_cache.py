"""State of constant size: linear attention, state-space models, and tails of causal convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class StateCache:
    """Named tensors per row that recurrent layers overwrite at each step; memory is taken once.

    shapes: name -> shape without the batch, such as {"state": (heads, key_dim, value_dim), "tail": (channels,
    3)}; dtypes: of single tensors, where they differ. A recurrent state cannot be shortened: rewinding goes
    back to a copy that was saved, and `checkpoints` is how many there is room for.
    """

    def __init__(
        self,
        batch: int,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
        checkpoints: int = 0,
    ) -> None:
        if batch < 0 or checkpoints < 0:
            raise ValueError(f"expected a batch and checkpoints of 0 or more, got {batch} and {checkpoints}")
        unknown = set(dtypes or ()) - set(shapes)
        if unknown:
            raise ValueError(f"expected dtypes of {sorted(shapes)}, got {sorted(unknown)}")
        self.batch, self.room = batch, checkpoints
        kinds = {name: (dtypes or {}).get(name, dtype) for name in shapes}
        # slot 0 is the present, slots 1 .. are saved copies
        self._memory = {
            name: torch.zeros((1 + checkpoints, batch, *shape), dtype=kinds[name], device=device)
            for name, shape in shapes.items()
        }
        self._saved = [0] * batch

    def __getitem__(self, name: str) -> Tensor:
        """The present state [batch, ...]: a view, which kernels may write in place."""
        return self._memory[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._memory.values())

    @property
    def saved(self) -> tuple[int, ...]:
        """Checkpoints of each row."""
        return tuple(self._saved)

    def update(self, **states: Tensor) -> None:
        """Overwrites the named states, [batch, ...] each."""
        for name, value in states.items():
            if name not in self._memory:
                raise ValueError(f"expected states of {sorted(self._memory)}, got {name!r}")
            now = self[name]
            if value.shape != now.shape:
                raise ValueError(f"expected {name} {list(now.shape)}, got {list(value.shape)}")
            if value.dtype != now.dtype:
                raise TypeError(f"expected {name} of {now.dtype}, got {value.dtype}")
            if value.device != now.device:
                raise ValueError(f"expected {name} on {now.device}, got {value.device}")
        for name, value in states.items():
            self[name].copy_(value)

    def save(self) -> None:
        """Keeps a copy of the present state of every row."""
        if max(self._saved, default=0) >= self.room:
            raise ValueError(f"expected at most {self.room} checkpoints, got one more")
        for b, n in enumerate(self._saved):
            for t in self._memory.values():
                t[1 + n, b] = t[0, b]
        self._saved = [n + 1 for n in self._saved]

    def rewind(self, counts: int | Sequence[int] = 1) -> None:
        """Back to the counts[b]-th newest checkpoint, which is used up with those after it; 0: no change."""
        wanted = [counts] * self.batch if isinstance(counts, int) else [int(n) for n in counts]
        if len(wanted) != self.batch:
            raise ValueError(f"expected counts for {self.batch} rows, got {len(wanted)}")
        for n, saved in zip(wanted, self._saved):
            if not 0 <= n <= saved:
                raise ValueError(f"expected to rewind 0..{saved} checkpoints, got {n}")
        for b, n in enumerate(wanted):
            if n:
                for t in self._memory.values():
                    t[0, b] = t[1 + self._saved[b] - n, b]
        self._saved = [saved - n for saved, n in zip(self._saved, wanted)]

    def forget(self) -> None:
        """Drops all checkpoints and keeps the present."""
        self._saved = [0] * self.batch

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Zero states, and no checkpoints, in all rows or the given ones."""
        chosen = range(self.batch) if rows is None else self._rows(rows)
        for b in chosen:
            for t in self._memory.values():
                t[0, b] = 0
            self._saved[b] = 0

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes what row rows[b] was, checkpoints included; rows may repeat."""
        source = self._rows(rows)
        if len(source) != self.batch:
            raise ValueError(f"expected {self.batch} rows, got {len(source)}")
        index = torch.tensor(source, dtype=torch.long)
        for t in self._memory.values():
            t.copy_(t[:, index.to(t.device, non_blocking=True)])
        self._saved = [self._saved[r] for r in source]

    def fork(self, rows: Sequence[int] | None = None) -> StateCache:
        """A copy, checkpoints included, of all rows or of the given ones, which may repeat."""
        source = list(range(self.batch)) if rows is None else self._rows(rows)
        other = object.__new__(StateCache)
        other.batch, other.room = len(source), self.room
        index = torch.tensor(source, dtype=torch.long)
        other._memory = {
            name: t[:, index.to(t.device, non_blocking=True)] for name, t in self._memory.items()
        }
        other._saved = [self._saved[r] for r in source]
        return other

    def _rows(self, rows: Sequence[int]) -> list[int]:
        chosen = [int(r) for r in rows]
        for r in chosen:
            if not 0 <= r < self.batch:
                raise ValueError(f"expected rows of 0..{self.batch - 1}, got {r}")
        return chosen
