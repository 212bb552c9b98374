"""Where the tokens of an image stand in a sequence, and which of them see which.

A layout is a list of steps, each a grid of positions that is generated at once. Every visibility rule is one
interval of keys per query row, so a mask is two int32 vectors and never an L x L matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from arimg.visibility import Visibility, pack

__all__ = ["PREFIX_RULES", "RULES", "Layout", "Visibility", "diagonal_order", "pack"]

RULES = ("level-causal", "level-diagonal", "token-causal", "strictly-lower", "full")
PREFIX_RULES = ("full", "token-causal")


@dataclass(frozen=True)
class Layout:
    """Steps of the given (height, width), laid one after another."""

    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def scales(cls, shapes: Sequence[int | Sequence[int]]) -> Layout:
        """A pyramid: one step per scale, each (h, w) or the side of a square."""
        pairs = tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in shapes)
        if not pairs or any(h < 1 or w < 1 for h, w in pairs):
            raise ValueError(f"expected at least one scale, all of positive size, got {tuple(shapes)}")
        return cls(pairs)

    @classmethod
    def groups(cls, sizes: Sequence[int]) -> Layout:
        """A 1-D sequence in groups of the given sizes: groups([8] * 16), or with ones, token by token."""
        if not sizes or any(n < 1 for n in sizes):
            raise ValueError(f"expected at least one group, all of positive size, got {tuple(sizes)}")
        return cls(tuple((1, int(n)) for n in sizes))

    @classmethod
    def raster(cls, height: int, width: int) -> Layout:
        """A grid, one token per step, row by row."""
        return cls.groups([1] * (height * width))

    @classmethod
    def diagonals(cls, height: int, width: int) -> Layout:
        """A grid in steps of equal h + w; `diagonal_order` says where a token of the sequence stands."""
        if height < 1 or width < 1:
            raise ValueError(f"expected a grid of positive size, got {height} x {width}")
        return cls.groups([min(d, height - 1) - max(0, d - width + 1) + 1 for d in range(height + width - 1)])

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
        and all earlier tokens; "strictly-lower": all earlier steps (and, by `visibility`, itself); "full":
        everything.
        """
        visibility = self.visibility(rule, device=device)
        return visibility.row_start, visibility.row_end

    def visibility(
        self,
        rule: str,
        *,
        prefix: int = 0,
        prefix_rule: str = "full",
        sinks: int = 0,
        device: torch.device | str = "cpu",
    ) -> Visibility:
        """What the tokens of a sequence see: `prefix` tokens, then this layout (rules: see `intervals`).

        All tokens of the layout see the whole prefix (text, a class, a source image at level -1); its own
        tokens see each other ("full") or what stands before ("token-causal"). sinks: the first keys of the
        sequence, seen by every row, such as a start token. Made once for each layout, rule and device.
        """
        if rule not in RULES:
            raise ValueError(f"expected a rule of {RULES}, got {rule!r}")
        if prefix_rule not in PREFIX_RULES:
            raise ValueError(f"expected a prefix_rule of {PREFIX_RULES}, got {prefix_rule!r}")
        if prefix < 0 or sinks < 0:
            raise ValueError(f"expected prefix and sinks >= 0, got {prefix} and {sinks}")
        if rule == "level-diagonal" and prefix > 1 and prefix_rule == "token-causal":
            raise ValueError("expected prefix_rule 'full' with 'level-diagonal': its prefix is seen as sinks")
        return _visibility(self, rule, prefix, prefix_rule, sinks, str(device))


@lru_cache(maxsize=64)
def _visibility(
    layout: Layout, rule: str, prefix: int, prefix_rule: str, sinks: int, device: str
) -> Visibility:
    starts, ends = (torch.tensor(layout.segments, dtype=torch.int32)[layout.level()] + prefix).unbind(1)
    length = prefix + layout.length
    own = torch.arange(prefix, length, dtype=torch.int32)
    zero = torch.zeros_like(own)
    row_start, row_end = {
        "level-causal": (zero, ends),
        "level-diagonal": (starts, ends),
        "token-causal": (zero, own + 1),
        "strictly-lower": (zero, starts),
        "full": (zero, torch.full_like(own, length)),
    }[rule]
    before = torch.arange(1, prefix + 1, dtype=torch.int32)
    if prefix_rule == "full":
        before = torch.full_like(before, prefix)
    visibility = Visibility(
        torch.cat((torch.zeros_like(before), row_start)).contiguous(),
        torch.cat((before, row_end)).contiguous(),
        length,
        sinks=max(sinks, prefix) if rule == "level-diagonal" else sinks,
        self_key=rule == "strictly-lower",
    )
    return visibility.to(device)


def diagonal_order(height: int, width: int) -> Tensor:
    """int64 [h * w]: the raster index of each token of `Layout.diagonals`, rows first within a diagonal."""
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    return ((row + column) * height + row).argsort()
