"""State that a generator carries from step to step: `KVCache`, and `StateCache` for recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from arimg import ops
from arimg._cache_pages import PagePool, indexable
from arimg._state_cache import StateCache

__all__ = ["KVCache", "StateCache"]


class KVCache:
    """Keys and values of all tokens so far. Rows have lengths of their own; memory is taken once.

    Contiguous: k, v [batch, heads, capacity, head_dim]. With page_size: k, v [pages, heads, page_size,
    head_dim] and `page_table` int32 [batch, max_pages] (-1: none); pages are handed out as rows grow, and
    forks share them until one writes. dtype int8 or float8_e4m3fn: k_scale, v_scale hold a float32 factor per
    token and head. Lengths and tables are kept on the host, so no operation waits for the device.

    Every operation either succeeds or raises ValueError or TypeError and leaves the cache as it was.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> None:
        if min(batch, heads, capacity, head_dim) < 0:
            raise ValueError(f"expected sizes of 0 or more, got {(batch, heads, capacity, head_dim)}")
        if page_size is not None and page_size < 1:
            raise ValueError(f"expected a page size of 1 or more, got {page_size}")
        if pages is not None and page_size is None:
            raise ValueError("expected a number of pages only with a page_size, got one without it")
        self.batch, self.capacity = batch, capacity
        if page_size is None:
            self._pool = PagePool(batch, heads, capacity, head_dim, dtype, torch.device(device))
        else:
            per_row = -(-capacity // page_size)
            number = batch * per_row if pages is None else pages
            self._pool = PagePool(number, heads, page_size, head_dim, dtype, torch.device(device))
        self._start(paged=page_size is not None)

    def _start(self, paged: bool) -> None:
        self._lengths = [0] * self.batch
        self._peeked = [0] * self.batch
        self._rows: list[list[int]] | None = [[] for _ in range(self.batch)] if paged else None
        self._freed = False
        device = self._pool.k.device
        self._device_lengths = torch.zeros(2, self.batch, dtype=torch.int32, device=device)
        self._device_table = None
        if paged:
            per_row = -(-self.capacity // self.page_size)
            self._device_table = torch.full((self.batch, per_row), -1, dtype=torch.int32, device=device)
        self._stale_lengths = self._stale_table = False

    # ------------------------------------------------------------------------------------------------
    # What it holds

    @property
    def k(self) -> Tensor:
        return self._pool.k

    @property
    def v(self) -> Tensor:
        return self._pool.v

    @property
    def k_scale(self) -> Tensor | None:
        return self._pool.k_scale

    @property
    def v_scale(self) -> Tensor | None:
        return self._pool.v_scale

    @property
    def dtype(self) -> torch.dtype:
        return self._pool.k.dtype

    @property
    def page_size(self) -> int:
        """Tokens of a page; the capacity if the cache is contiguous."""
        return self._pool.k.shape[2]

    @property
    def page_table(self) -> Tensor | None:
        """int32 [batch, max_pages] on the cache's device, or None if the cache is contiguous."""
        self._upload()
        return self._device_table

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int32 [batch] on the cache's device."""
        self._upload()
        return self._device_lengths[0]

    @property
    def visible_lengths(self) -> Tensor:
        """`lengths` with the tokens of a `peek` that are not committed."""
        self._upload()
        return self._device_lengths[1]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """The one length of all rows."""
        if len(set(self._lengths)) > 1:
            raise ValueError(f"expected rows of one length, got {self._lengths}")
        return self._lengths[0] if self._lengths else 0

    @property
    def nbytes(self) -> int:
        """All memory of keys, values and factors; forks of a paged cache share it."""
        return sum(t.nbytes for t in self._pool.tensors)

    @property
    def free_pages(self) -> int:
        """Pages that no row holds; 0 if the cache is contiguous."""
        return 0 if self._rows is None else self._pool.free

    # ------------------------------------------------------------------------------------------------
    # Writing

    def append(
        self,
        qkv: Tensor,
        q_scale: Tensor | None = None,
        l2_norm: bool = False,
        *,
        counts: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        """Stores the keys and values of qkv behind each row and returns its queries [B, Hq, L, D].

        qkv [B, L, 3, H, D] or [B, L, Hq + 2 H, D]. counts: of row b only the first counts[b] tokens are
        stored. l2_norm: queries and keys get length 1 per head, and the queries are then scaled by
        q_scale [Hq]; otherwise options are those of `ops.append_` (norm, q_weight, k_weight, eps, rope,
        rope_index). Rotations are by the token's position in the row unless rope_index says otherwise.
        """
        return self._append(qkv, counts, _normed(q_scale, l2_norm, options), peek=False)

    def peek(
        self,
        qkv: Tensor,
        q_scale: Tensor | None = None,
        l2_norm: bool = False,
        *,
        counts: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        """`append` on probation: the tokens lie behind the rows (`visible_lengths`) but belong to them only
        after `commit`. Any other writing operation drops them.
        """
        return self._append(qkv, counts, _normed(q_scale, l2_norm, options), peek=True)

    def commit(self, counts: int | Sequence[int] | None = None) -> None:
        """Keeps the first counts[b] tokens of the last `peek` (all of them by default) and drops the rest."""
        self._expect_alive()
        wanted = self._peeked if counts is None else self._per_row("commit counts", counts)
        for n, peeked in zip(wanted, self._peeked):
            if not 0 <= n <= peeked:
                raise ValueError(f"expected to commit 0..{peeked} tokens, got {n}")
        self._finish([length + n for length, n in zip(self._lengths, wanted)])

    def append_at(
        self, qkv: Tensor, positions: Sequence[int] | Sequence[Sequence[int]] | Tensor, **options: Any
    ) -> Tensor:
        """Stores token t of row b at positions[b][t] (or positions[t] in all rows) and returns the queries.

        Positions are distinct, below the capacity, and on the host; they may be filled already. A row then
        reaches to its highest position; places in between that nothing has filled hold zero keys and values.
        """
        self._expect_alive()
        tokens = self._expect_qkv(qkv)
        rows = self._positions(positions, tokens)
        ends = [max([length, *(p + 1 for p in row)]) for length, row in zip(self._lengths, rows)]
        gaps = [
            sorted(set(range(length, end)) - set(row)) for length, end, row in zip(self._lengths, ends, rows)
        ]
        touched = [{*row, *gap} for row, gap in zip(rows, gaps)]

        def write() -> Tensor:
            q = self._write(qkv, self._tensor(rows, tokens), 0, options)
            slots = [self._slot(b, p) for b, gap in enumerate(gaps) for p in gap]
            self._pool.clear([page for page, _ in slots], [offset for _, offset in slots])
            return q

        return self._change(touched, ends, write)

    def overwrite_last(
        self, qkv: Tensor, q_scale: Tensor | None = None, l2_norm: bool = False, **options: Any
    ) -> Tensor:
        """Replaces the last L tokens of every row by those of qkv and returns the queries."""
        self._expect_alive()
        tokens = self._expect_qkv(qkv)
        if tokens > min(self._lengths, default=0):
            raise ValueError(
                f"expected at most {min(self._lengths, default=0)} tokens to overwrite, got {tokens}"
            )
        starts = [length - tokens for length in self._lengths]
        ends, options = list(self._lengths), _normed(q_scale, l2_norm, options)
        touched = [range(a, b) for a, b in zip(starts, ends)]
        return self._change(touched, ends, lambda: self._write_behind(qkv, starts, None, options))

    def truncate(self, length: int | Sequence[int]) -> None:
        """Keeps the first `length` tokens, of every row or of each its own."""
        self._expect_alive()
        wanted = self._per_row("lengths", length)
        for n, now in zip(wanted, self._lengths):
            if not 0 <= n <= now:
                raise ValueError(f"expected a length of 0..{now}, got {n}")
        self._finish(wanted)

    def rewind(self, counts: int | Sequence[int]) -> None:
        """Forgets the newest tokens, as many in every row or in each its own."""
        self._expect_alive()
        wanted = self._per_row("counts", counts)
        for n, now in zip(wanted, self._lengths):
            if not 0 <= n <= now:
                raise ValueError(f"expected to rewind 0..{now} tokens, got {n}")
        self._finish([now - n for n, now in zip(wanted, self._lengths)])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes what row rows[b] was; rows may repeat."""
        self._expect_alive()
        source = self._source(rows, self.batch)
        lengths = [self._lengths[r] for r in source]
        if self._rows is None:
            longest = max(lengths, default=0)
            index = torch.tensor(source, dtype=torch.long).to(self.k.device, non_blocking=True)
            for t in map(indexable, self._pool.tensors):
                t[:, :, :longest] = t[index, :, :longest]
        else:
            before = self._rows
            self._rows = [list(before[r]) for r in source]
            for row in self._rows:
                self._pool.hold(row)
            for row in before:
                self._pool.release(row)
            self._stale_table = True
        self._finish(lengths)

    def fork(self, rows: Sequence[int] | None = None) -> KVCache:
        """A cache that goes on from here by itself: of all rows, or of the given ones, which may repeat.

        Paged: both hold the same pages, and whoever writes to a shared page first gets a copy of it; no
        memory is taken. Contiguous: a copy in memory of its own. A peek is not carried over.
        """
        self._expect_alive()
        source = list(range(self.batch)) if rows is None else self._source(rows, None)
        other = object.__new__(KVCache)
        other.batch, other.capacity = len(source), self.capacity
        if self._rows is None:
            _, H, _, D = self.k.shape
            other._pool = PagePool(other.batch, H, self.capacity, D, self.dtype, self.k.device)
            index = torch.tensor(source, dtype=torch.long).to(self.k.device, non_blocking=True)
            for mine, theirs in zip(self._pool.tensors, other._pool.tensors):
                indexable(theirs).copy_(indexable(mine)[index])
            other._start(paged=False)
        else:
            other._pool = self._pool
            other._start(paged=True)
            used = [-(-n // self.page_size) for n in self._lengths]
            other._rows = [self._rows[r][: used[r]] for r in source]
            for row in other._rows:
                self._pool.hold(row)
            other._stale_table = True
        other._finish([self._lengths[r] for r in source])
        return other

    def free(self) -> None:
        """Gives the pages back; the cache cannot be used any more."""
        self._expect_alive()
        for row in self._rows or ():
            self._pool.release(row)
        self._rows = None if self._rows is None else [[] for _ in range(self.batch)]
        self._freed = True

    # ------------------------------------------------------------------------------------------------
    # Reading

    def read(
        self, start: int = 0, end: int | None = None, *, row: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keys and values of positions [start, end) as dense tensors [B, H, end - start, D], multiplied out.

        end defaults to the longest row; behind a row's own end there are zeros. row: only this one. dtype: of
        the result where the storage is one-byte (float32).
        """
        self._expect_alive()
        lengths, table, parts = self.lengths, self.page_table, self._pool
        if row is not None and not 0 <= row < self.batch:
            raise ValueError(f"expected a row of 0..{self.batch - 1}, got {row}")
        longest = max(self._lengths, default=0) if row is None else self._lengths[row]
        rows = slice(None) if row is None else slice(row, row + 1)
        stop = longest if end is None else end
        out = []
        for cache, scale in ((parts.k, parts.k_scale), (parts.v, parts.v_scale)):
            if table is None:
                cache, scale = cache[rows], None if scale is None else scale[rows]
            out.append(
                ops.read_cache(
                    cache, start, stop, page_table=None if table is None else table[rows],
                    lengths=lengths[rows], scale=scale, dtype=dtype,
                )
            )  # fmt: skip
        return out[0], out[1]

    def attend(self, q: Tensor, **options: Any) -> Tensor:
        """Attention of q [B, Hq, L, D] over all tokens of each row: `ops.cached_attention` with what this
        cache holds, one-byte storage and pages read in place. options: k_new, v_new, new_intervals, scale,
        head_scale. Tokens of a `peek` are not seen until `commit`.
        """
        self._expect_alive()
        even = len(set(self._lengths)) == 1
        return ops.cached_attention(
            q, self.k, self.v, self._lengths[0] if even else self.lengths,
            page_table=self.page_table, k_scale=self.k_scale, v_scale=self.v_scale, **options,
        )  # fmt: skip

    def attend_causal(
        self, q: Tensor, starts: Sequence[int] | None = None, *, padding: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the newest tokens q [B, Hq, L, D], appended or peeked: each sees itself and what
        stands before it in its row. starts: where they begin in each row (default: they are the last L).
        padding: int32 [B], how many tokens at a row's beginning no other one sees.
        """
        self._expect_alive()
        tokens = q.shape[2]
        ends = [n + peeked for n, peeked in zip(self._lengths, self._peeked)]
        if tokens == 1 and starts is None and padding is None and not any(self._peeked):
            return self.attend(q, scale=scale)
        first = [end - tokens for end in ends] if starts is None else self._per_row("starts", starts)
        longest, parts = max(first, default=0) + tokens, (self.k, self.v)
        if self.page_table is None and self.k_scale is None:
            k, v = (t[:, :, :longest] for t in parts)
        else:
            k, v = (
                ops.read_cache(
                    t,
                    0,
                    longest,
                    page_table=self.page_table,
                    lengths=self.visible_lengths,
                    scale=s,
                    dtype=q.dtype,
                )
                for t, s in zip(parts, (self.k_scale, self.v_scale))
            )
        end = torch.tensor(first, dtype=torch.int32)[:, None] + torch.arange(1, tokens + 1, dtype=torch.int32)
        end = end.to(q.device, non_blocking=True)
        start = torch.zeros_like(end) if padding is None else torch.minimum(padding[:, None], end - 1)
        out: Tensor = ops.row_interval_attention(q, k, v, start, end, scale=scale)
        return out

    def pooled_view(
        self, h: int, w: int, grid: tuple[int, int], start: int = 0, *, mode: str = "area",
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keys and values of the tokens start .. start + H W - 1, a grid (H, W), resampled to (h, w).

        [B, heads, h * w, D] each: with "area" the source features as VAREdit's first layer sees them (arXiv
        2508.15772). Read in place where the cache is contiguous and not one-byte.
        """
        self._expect_alive()
        end = start + grid[0] * grid[1]
        if not 0 <= start <= end <= min(self._lengths, default=0):
            raise ValueError(f"expected tokens within 0..{min(self._lengths, default=0)}, got {start}..{end}")
        if self._rows is None and self.k_scale is None:
            k, v, begin = self.k, self.v, start
        else:
            (k, v), begin = self.read(start, end, dtype=dtype), 0
        return ops.pool_tokens(k, grid, (h, w), begin, mode), ops.pool_tokens(v, grid, (h, w), begin, mode)

    # ------------------------------------------------------------------------------------------------
    # How it works

    def _append(
        self, qkv: Tensor, counts: Sequence[int] | None, options: dict[str, Any], peek: bool
    ) -> Tensor:
        self._expect_alive()
        tokens = self._expect_qkv(qkv)
        added = [tokens] * self.batch if counts is None else self._per_row("counts", counts)
        for n, length in zip(added, self._lengths):
            if not 0 <= n <= tokens:
                raise ValueError(f"expected counts of 0..{tokens}, got {n}")
            if length + n > self.capacity:
                raise ValueError(
                    f"expected at most {self.capacity - length} more tokens in a cache of {self.capacity}, "
                    f"got {n}"
                )
        starts = list(self._lengths)
        ends = [a + n for a, n in zip(starts, added)]
        touched = [range(a, b) for a, b in zip(starts, ends)]
        peeked = added if peek else None
        given = None if counts is None else added

        def write() -> Tensor:
            return self._write_behind(qkv, starts, given, options)

        return self._change(touched, starts if peek else ends, write, peeked)

    def _write_behind(
        self, qkv: Tensor, starts: list[int], counts: list[int] | None, options: dict[str, Any]
    ) -> Tensor:
        tokens = qkv.shape[1]
        if counts is None and len(set(starts)) <= 1:
            return self._write(qkv, None, starts[0] if starts else 0, options)
        added = counts or [tokens] * self.batch
        rows = [[a + t if t < n else -1 for t in range(tokens)] for a, n in zip(starts, added)]
        if counts is not None and options.get("rope") is not None and options.get("rope_index") is None:
            behind = [[a + t for t in range(tokens)] for a in starts]  # tokens that are not stored, too
            options = options | {"rope_index": self._tensor(behind, tokens)}
        return self._write(qkv, self._tensor(rows, tokens), 0, options)

    def _write(self, qkv: Tensor, positions: Tensor | None, start: int, options: dict[str, Any]) -> Tensor:
        p = self._pool
        return ops.append_(
            p.k, p.v, qkv, start, positions=positions, page_table=self.page_table, k_scale=p.k_scale,
            v_scale=p.v_scale, **options,
        )  # fmt: skip

    def _change(
        self,
        touched: Sequence[Sequence[int] | set[int]],
        lengths: list[int],
        write: Callable[[], Tensor],
        peeked: list[int] | None = None,
    ) -> Tensor:
        """Gives every row pages of its own for the positions it writes, writes, and takes note of it.

        If writing fails, the pages are given back.
        """
        if self._rows is None:
            q = write()
            self._finish(lengths, peeked)
            return q
        before = [list(row) for row in self._rows]
        self._take_pages(touched)
        try:
            q = write()
        except BaseException:
            self._restore(before)
            raise
        self._finish(lengths, peeked)
        return q

    def _take_pages(self, touched: Sequence[Sequence[int] | set[int]]) -> None:
        assert self._rows is not None
        wanted = [sorted({p // self.page_size for p in positions}) for positions in touched]
        holders, new, shared = dict[int, int](), 0, list[tuple[int, int]]()
        for b, (row, numbers) in enumerate(zip(self._rows, wanted)):
            for number in numbers:
                if number >= len(row):
                    new += 1
                    continue
                page = row[number]
                left = holders.setdefault(page, self._pool.holders[page])
                if left > 1:  # the last holder keeps the page
                    holders[page] = left - 1
                    shared.append((b, number))
        if new + len(shared) > self._pool.free:
            raise ValueError(
                f"expected to need at most {self._pool.free} more pages of {len(self._pool.holders)}, "
                f"got {new + len(shared)}"
            )
        source = [self._rows[b][number] for b, number in shared]
        target = [self._pool.take() for _ in shared]
        self._pool.copy(source, target)
        for (b, number), page in zip(shared, target):
            self._rows[b][number] = page
        self._pool.release(source)
        for row, numbers in zip(self._rows, wanted):
            row.extend([self._pool.take() for number in numbers if number >= len(row)])
        self._stale_table |= bool(new or shared)

    def _restore(self, before: list[list[int]]) -> None:
        """Undoes `_take_pages`. A page that was copied lives on in its other holders."""
        assert self._rows is not None
        for row in before:
            self._pool.hold(row)
        for row in self._rows:
            self._pool.release(row)
        self._rows = before
        self._stale_table = True

    def _finish(self, lengths: list[int], peeked: list[int] | None = None) -> None:
        self._lengths = lengths
        self._peeked = peeked or [0] * self.batch
        if self._rows is not None:
            for row, n, more in zip(self._rows, lengths, self._peeked):
                used = -(-(n + more) // self.page_size)
                self._stale_table |= used < len(row)
                self._pool.release(row[used:])
                del row[used:]
        self._stale_lengths = True

    def _upload(self) -> None:
        """Lengths and table to the device; small copies from pageable memory, which do not wait for it."""
        self._expect_alive()
        if self._stale_lengths:
            visible = [n + more for n, more in zip(self._lengths, self._peeked)]
            lengths = torch.tensor([self._lengths, visible], dtype=torch.int32)
            self._device_lengths.copy_(lengths, non_blocking=True)
        if self._stale_table and self._device_table is not None and self._rows is not None:
            per_row = self._device_table.shape[1]
            rows = [row + [-1] * (per_row - len(row)) for row in self._rows]
            table = torch.tensor(rows, dtype=torch.int32).view(self.batch, per_row)
            self._device_table.copy_(table, non_blocking=True)
        self._stale_lengths = self._stale_table = False

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        if self._rows is None:
            return row, position
        return self._rows[row][position // self.page_size], position % self.page_size

    def _tensor(self, rows: list[list[int]], tokens: int) -> Tensor:
        host = torch.tensor(rows, dtype=torch.int32).view(self.batch, tokens)
        return host.to(self.k.device, non_blocking=True)

    def _expect_alive(self) -> None:
        if self._freed:
            raise ValueError("expected a cache in use, got one that was freed")

    def _expect_qkv(self, qkv: Tensor) -> int:
        """Returns the number of tokens; the rest is checked where qkv is written."""
        if not isinstance(qkv, Tensor):
            raise TypeError(f"expected qkv to be a tensor, got {type(qkv).__name__}")
        if qkv.dim() not in (4, 5) or qkv.shape[0] != self.batch:
            raise ValueError(
                f"expected qkv [{self.batch}, L, Hq + 2 Hkv, D] or [{self.batch}, L, 3, H, D], "
                f"got {list(qkv.shape)}"
            )
        return qkv.shape[1]

    def _per_row(self, name: str, values: int | Sequence[int]) -> list[int]:
        out = [values] * self.batch if isinstance(values, int) else [int(n) for n in values]
        if len(out) != self.batch:
            raise ValueError(f"expected {name} for {self.batch} rows, got {len(out)}")
        return out

    def _source(self, rows: Sequence[int], number: int | None) -> list[int]:
        source = [int(r) for r in rows]
        if number is not None and len(source) != number:
            raise ValueError(f"expected {number} rows, got {len(source)}")
        for r in source:
            if not 0 <= r < self.batch:
                raise ValueError(f"expected rows of 0..{self.batch - 1}, got {r}")
        return source

    def _positions(
        self, positions: Sequence[int] | Sequence[Sequence[int]] | Tensor, tokens: int
    ) -> list[list[int]]:
        if isinstance(positions, Tensor):
            if positions.device.type != "cpu":
                raise ValueError(f"expected positions on the host, got {positions.device}")
            positions = positions.tolist()
        shared = all(isinstance(p, int) for p in positions)
        rows: list[list[int]] = (
            [list(positions) for _ in range(self.batch)]  # type: ignore[arg-type]
            if shared
            else [list(row) for row in positions]  # type: ignore[arg-type]
        )
        if len(rows) != self.batch or any(len(row) != tokens for row in rows):
            raise ValueError(
                f"expected positions [{tokens}] or [{self.batch}, {tokens}], got {[len(r) for r in rows]}"
            )
        for row in rows:
            for p in row:
                if not 0 <= p < self.capacity:
                    raise ValueError(f"expected positions of 0..{self.capacity - 1}, got {p}")
            if len(set(row)) < len(row):
                twice = next(p for p in row if row.count(p) > 1)
                raise ValueError(f"expected distinct positions, got {twice} more than once")
        return rows


def _normed(q_scale: Tensor | None, l2_norm: bool, options: dict[str, Any]) -> dict[str, Any]:
    if q_scale is not None and not l2_norm:
        raise ValueError("expected q_scale only with l2_norm, got q_scale without it")
    return options | {"norm": "l2", "q_weight": q_scale} if l2_norm else options
