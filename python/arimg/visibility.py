"""Which tokens see which: one interval of keys per query row, and what the kernels are told about it.

Every mask of the supported systems is an interval per row, with two additions: the first keys of all (sinks:
a prefix, a source image, a start token) and the row's own key. A mask is two int32 vectors, never an L x L
matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from arimg import reference
from arimg.ops.attention import KEY_ROWS, TilePlan

CPU_TILE, GPU_TILE = 192, 64  # rows of the kernels' longest tiles, csrc/attention
CPU_GROUP = 12  # rows that share the registers of the CPU kernel


@dataclass(frozen=True, eq=False)
class Visibility:
    """Row i sees the keys row_start[i] <= j < row_end[i], the keys j < sinks, and with self_key its own.

    row_start, row_end: int32 [L] for every batch entry, or [B, L].
    """

    row_start: Tensor
    row_end: Tensor
    keys: int
    sinks: int = 0
    self_key: bool = False

    @property
    def length(self) -> int:
        return self.row_start.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.row_start.device

    def to(self, device: torch.device | str) -> Visibility:
        if torch.device(device) == self.device:
            return self
        return replace(self, row_start=self.row_start.to(device), row_end=self.row_end.to(device))

    def mask(self) -> Tensor:
        """bool [L, keys] or [B, 1, L, keys], for torch's attention and for pictures."""
        return reference.visible(
            self.row_start, self.row_end, self.keys, sinks=self.sinks, self_key=self.self_key
        )

    @cached_property
    def pairs(self) -> int:
        """How many (row, key) pairs are seen; of the batch entry that sees most, where they differ."""
        start = self.row_start.long().clamp(0, self.keys)
        end = self.row_end.long().clamp(0, self.keys).maximum(start)
        sinks = min(self.sinks, self.keys)
        seen = end - start + sinks - (end.clamp(max=sinks) - start.clamp(max=sinks))
        if self.self_key:
            own = torch.arange(self.length, device=start.device) + (self.keys - self.length)
            seen = seen + ~((own >= start) & (own < end) | (own < sinks))
        return int(seen.sum(-1).max())

    @property
    def density(self) -> float:
        """The share of all pairs that is seen."""
        return self.pairs / max(self.length * self.keys, 1)

    @cached_property
    def kind(self) -> str:
        """ "full", "causal" (both: what torch's attention knows without a mask) or "mask"."""
        if self.row_start.dim() == 2 or bool((self.row_start > 0).any()):
            return "mask"
        end = self.row_end.cpu()
        if bool((end >= self.keys).all()):
            return "full"
        own = torch.arange(1, self.length + 1, dtype=end.dtype)
        return "causal" if self.length == self.keys and self.sinks <= 1 and torch.equal(end, own) else "mask"

    @cached_property
    def plan(self) -> TilePlan:
        """Tiles for the kernels of this device, made on the host."""
        cpu = self.device.type == "cpu"
        tiles = row_tiles(self.row_start.cpu(), self.row_end.cpu(), CPU_TILE if cpu else GPU_TILE)
        longest = int((tiles[1:] - tiles[:-1]).max()) if len(tiles) > 1 else 1
        return TilePlan(tiles.to(self.device), longest, self._key_rows().to(self.device))

    def _key_rows(self) -> Tensor:
        """For each KEY_ROWS keys the range of the rows that see one of them; 0, 0 for none."""
        start, end = (
            self.row_start.cpu().reshape(-1, self.length),
            self.row_end.cpu().reshape(-1, self.length),
        )
        first = torch.arange(0, self.keys, KEY_ROWS)[:, None, None]
        seen = (start < end) & (start < first + KEY_ROWS) & (end > first) | (first < self.sinks)
        row = torch.arange(self.length)
        if self.self_key:
            own = row + (self.keys - self.length)
            seen = seen | (own >= first) & (own < first + KEY_ROWS)
        seen = seen.any(1)  # of any batch entry
        low = torch.where(seen, row, self.length).amin(1) if self.length else torch.zeros(len(first))
        high = torch.where(seen, row + 1, 0).amax(1) if self.length else torch.zeros(len(first))
        return torch.stack((low.minimum(high), high), 1).to(torch.int32).contiguous()

    def tiles_visited(self, tile: int = KEY_ROWS) -> tuple[int, int]:
        """(visited, all) squares of tile x tile pairs; a square is visited when one of its pairs is seen."""
        mask = self.mask()
        mask = mask if mask.dim() == 2 else mask.any(0)[0]
        rows, columns = -(-self.length // tile), -(-self.keys // tile)
        padded = torch.zeros(rows * tile, columns * tile, dtype=torch.bool)
        padded[: self.length, : self.keys] = mask.cpu()
        visited = padded.view(rows, tile, columns, tile).any(3).any(1)
        return int(visited.sum()), visited.numel()

    def cut(self, lengths: Tensor) -> Visibility:
        """The same for batch entries of which only the first lengths[b] tokens exist: int [B] -> [B, L].

        Rows that do not exist see nothing, but for sinks and their own key.
        """
        lengths = lengths.to(device=self.device, dtype=torch.int32)[:, None]
        row = torch.arange(self.length, device=self.device) + (self.keys - self.length)
        end = torch.where(row < lengths, self.row_end.minimum(lengths), 0)
        start = self.row_start.expand_as(end)
        return replace(self, row_start=start.contiguous(), row_end=end.to(torch.int32).contiguous())


def row_tiles(row_start: Tensor, row_end: Tensor, longest: int) -> Tensor:
    """Cuts rows into tiles of at most `longest`: int32 [tiles + 1], rising from 0 to L.

    Rows of one level stay together: a long level is cut into equal tiles, short ones share a tile.
    """
    start, end = row_start.reshape(-1, row_start.shape[-1]), row_end.reshape(-1, row_end.shape[-1])
    length = start.shape[-1]
    changes = ((start[:, 1:] != start[:, :-1]) | (end[:, 1:] != end[:, :-1])).any(0).nonzero()[:, 0] + 1
    borders = [0, *changes.tolist(), length]
    cuts = [0]
    for low, high in pairwise(borders):
        size = high - low
        if size > longest // 2:  # a level of its own
            if cuts[-1] < low:
                cuts.append(low)
            step = -(-size // -(-size // longest))
            step = min(-(-step // CPU_GROUP) * CPU_GROUP, longest) if longest == CPU_TILE else longest
            cuts.extend(range(low + step, high, step))
            cuts.append(high)
        elif high - cuts[-1] > longest:
            cuts.append(low)
    if cuts[-1] < length:
        cuts.append(length)
    return torch.tensor(cuts, dtype=torch.int32)


def pack(parts: Sequence[Visibility]) -> Visibility:
    """Sequences one after another in one row, none of which sees another (sequence packing)."""
    if not parts or any(p.row_start.dim() == 2 or p.keys != p.length for p in parts):
        raise ValueError("expected at least one visibility with as many keys as rows, shared over the batch")
    if any(p.sinks for p in parts) or len({p.self_key for p in parts}) > 1:
        raise ValueError("expected visibilities without sinks, all or none with self_key")
    starts, ends, first = [], [], 0
    for p in parts:
        empty = p.row_start >= p.row_end
        starts.append(torch.where(empty, first, p.row_start.clamp(min=0) + first))
        ends.append(torch.where(empty, first, p.row_end.clamp(max=p.keys) + first))
        first += p.length
    row_start, row_end = (torch.cat(t).to(torch.int32) for t in (starts, ends))
    return Visibility(row_start, row_end, first, self_key=parts[0].self_key)
