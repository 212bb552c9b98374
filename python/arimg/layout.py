"""Where the tokens of an image stand in a sequence, and which of them see which.

A layout is a list of steps, each a grid of positions that is generated at once. Every visibility rule is one
interval of keys per query row, so a mask is two int32 vectors and never an L x L matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RULES = ("level-causal", "level-diagonal", "token-causal", "full")


@dataclass(frozen=True)
class Layout:
    """Steps of the given (height, width), laid one after another."""

    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def scales(cls, shapes: Sequence[int | Sequence[int]]) -> "Layout":
        """A pyramid: one step per scale, each (h, w) or the side of a square."""
        pairs = tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in shapes)
        if not pairs or any(h < 1 or w < 1 for h, w in pairs):
            raise ValueError(f"expected at least one scale, all of positive size, got {tuple(shapes)}")
        return cls(pairs)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each step."""
        return tuple(h * w for h, w in self.shapes)

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each step."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return tuple((e - n, e) for e, n in zip(ends, self.sizes))

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def __len__(self) -> int:
        return len(self.shapes)

    def level(self, device: torch.device | str = "cpu") -> Tensor:
        """The step of each token, int64 [L]."""
        sizes = torch.tensor(self.sizes)
        return torch.arange(len(self)).repeat_interleave(sizes, output_size=self.length).to(device)

    def intervals(self, rule: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(row_start, row_end), int32 [L]: token i sees the tokens row_start[i] <= j < row_end[i].

        "level-causal": its own and all earlier steps; "level-diagonal": its own step; "token-causal": itself
        and all earlier tokens; "full": everything.
        """
        starts, ends = torch.tensor(self.segments, dtype=torch.int32)[self.level()].unbind(1)
        i = torch.arange(self.length, dtype=torch.int32)
        zero = torch.zeros_like(i)
        known = {
            "level-causal": (zero, ends),
            "level-diagonal": (starts, ends),
            "token-causal": (zero, i + 1),
            "full": (zero, torch.full_like(i, self.length)),
        }
        if rule not in known:
            raise ValueError(f"expected a rule of {RULES}, got {rule!r}")
        row_start, row_end = known[rule]
        return row_start.contiguous().to(device), row_end.contiguous().to(device)
