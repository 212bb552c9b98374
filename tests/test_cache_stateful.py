"""Random sequences of cache operations against lists of tensors, one per token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from arimg.cache import KVCache
from arimg.nn.rope import rope_1d
from arimg.reference.kv_cache import decode_vectors, encode_vectors, rotate

B, H, D, CAPACITY = 2, 1, 4, 9
ROPE = rope_1d(CAPACITY, D)
Token = tuple[torch.Tensor, torch.Tensor]  # key and value, [H, D]


@dataclass(eq=False)
class Pair:
    """A cache, and what it must hold: rows of tokens, and the tokens of a peek."""

    cache: KVCache
    rows: list[list[Token]]
    peeked: list[list[Token]]
    freed: bool = False


class Caches(RuleBasedStateMachine):
    """One cache and its forks. `page_size` and `dtype` are set by the subclasses below."""

    page_size: int | None = None
    dtype = torch.float32

    caches = Bundle("caches")
    per_row = st.lists(st.integers(0, 4), min_size=B, max_size=B)
    places = st.lists(st.lists(st.integers(-1, CAPACITY), max_size=3), min_size=B, max_size=B)
    row_numbers = st.lists(st.integers(0, B), min_size=B, max_size=B)

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Pair] = []
        self.seed = 0

    @initialize(target=caches)
    def start(self) -> Pair:
        # fewer pages than two full caches need, so that the pool can be used up
        pages = None if self.page_size is None else 3 * -(-CAPACITY // self.page_size)
        cache = KVCache(B, H, CAPACITY, D, self.dtype, page_size=self.page_size, pages=pages)
        return self.add(Pair(cache, [[] for _ in range(B)], [[] for _ in range(B)]))

    def add(self, pair: Pair) -> Pair:
        self.all.append(pair)
        return pair

    def draw(self, n: int) -> torch.Tensor:
        self.seed += 1
        return torch.randn(B, n, 3, H, D, generator=torch.Generator().manual_seed(self.seed))

    def stored(self, qkv: torch.Tensor, b: int, t: int, position: int) -> Token:
        k, v = (qkv[b, t, i][None, :, None] for i in (1, 2))
        k = rotate(k, ROPE, torch.tensor([[position]]))
        return self.kept(k[0, :, 0]), self.kept(v[0, :, 0])

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype.itemsize > 1:
            return x.to(self.dtype)
        return decode_vectors(*encode_vectors(x, self.dtype), torch.float32)

    def attempt(self, pair: Pair, fits: bool, operation) -> bool:
        """Whether the operation went through; what does not fit, or finds no page, must raise."""
        try:
            operation()
        except ValueError as error:
            out_of_pages = "more pages" in str(error)
            assert out_of_pages or pair.freed or not fits, f"refused without reason: {error}"
            return False
        assert fits and not pair.freed, "should have been refused"
        return True

    # ------------------------------------------------------------------------------------------------

    @rule(pair=caches, n=st.integers(0, 4), counts=st.none() | per_row, peek=st.booleans())
    def append(self, pair: Pair, n: int, counts: list[int] | None, peek: bool) -> None:
        qkv = self.draw(n)
        added = counts or [n] * B
        fits = all(m <= n and len(row) + m <= CAPACITY for m, row in zip(added, pair.rows))
        call = pair.cache.peek if peek else pair.cache.append
        if not self.attempt(pair, fits, lambda: call(qkv, counts=counts, rope=ROPE)):
            return
        new = [
            [self.stored(qkv, b, t, len(row) + t) for t in range(m)]
            for b, (row, m) in enumerate(zip(pair.rows, added))
        ]
        pair.peeked = new if peek else [[] for _ in range(B)]
        if not peek:
            pair.rows = [row + more for row, more in zip(pair.rows, new)]

    @rule(pair=caches, n=st.integers(1, 3), heads=st.sampled_from([2, 3]))
    def append_what_does_not_fit(self, pair: Pair, n: int, heads: int) -> None:
        """The mistake shows only when pages have been taken; they must be given back."""
        self.attempt(pair, False, lambda: pair.cache.append(torch.zeros(B, n, 3, heads, D)))

    @rule(pair=caches, counts=st.none() | per_row)
    def commit(self, pair: Pair, counts: list[int] | None) -> None:
        kept = [len(p) for p in pair.peeked] if counts is None else counts
        fits = all(n <= len(p) for n, p in zip(kept, pair.peeked))
        if self.attempt(pair, fits, lambda: pair.cache.commit(counts)):
            pair.rows = [row + more[:n] for row, more, n in zip(pair.rows, pair.peeked, kept)]
            pair.peeked = [[] for _ in range(B)]

    @rule(
        pair=caches,
        positions=st.lists(st.lists(st.integers(-1, CAPACITY), max_size=3), min_size=B, max_size=B),
    )
    def append_at(self, pair: Pair, positions: list[list[int]]) -> None:
        n = min(map(len, positions))
        positions = [row[:n] for row in positions]
        qkv = self.draw(n)
        fits = all(len(set(row)) == n and all(0 <= p < CAPACITY for p in row) for row in positions)
        if not self.attempt(pair, fits, lambda: pair.cache.append_at(qkv, positions, rope=ROPE)):
            return
        pair.peeked = [[] for _ in range(B)]
        zero = torch.zeros(H, D)
        for b, (row, where) in enumerate(zip(pair.rows, positions)):
            row += [(zero, zero)] * (max([len(row), *(p + 1 for p in where)]) - len(row))
            for t, p in enumerate(where):
                row[p] = self.stored(qkv, b, t, p)

    @rule(pair=caches, n=st.integers(0, 4))
    def overwrite_last(self, pair: Pair, n: int) -> None:
        qkv = self.draw(n)
        fits = all(n <= len(row) for row in pair.rows)
        if self.attempt(pair, fits, lambda: pair.cache.overwrite_last(qkv, rope=ROPE)):
            pair.peeked = [[] for _ in range(B)]
            for b, row in enumerate(pair.rows):
                start = len(row) - n
                row[start:] = [self.stored(qkv, b, t, start + t) for t in range(n)]

    @rule(
        pair=caches,
        lengths=st.integers(-1, CAPACITY) | st.lists(st.integers(0, CAPACITY), min_size=B, max_size=B),
    )
    def truncate(self, pair: Pair, lengths: int | list[int]) -> None:
        each = [lengths] * B if isinstance(lengths, int) else lengths
        fits = all(0 <= n <= len(row) for n, row in zip(each, pair.rows))
        if self.attempt(pair, fits, lambda: pair.cache.truncate(lengths)):
            pair.rows = [row[:n] for n, row in zip(each, pair.rows)]
            pair.peeked = [[] for _ in range(B)]

    @rule(pair=caches, counts=per_row)
    def rewind(self, pair: Pair, counts: list[int]) -> None:
        fits = all(n <= len(row) for n, row in zip(counts, pair.rows))
        if self.attempt(pair, fits, lambda: pair.cache.rewind(counts)):
            pair.rows = [row[: len(row) - n] for n, row in zip(counts, pair.rows)]
            pair.peeked = [[] for _ in range(B)]

    @rule(pair=caches, rows=row_numbers)
    def reorder(self, pair: Pair, rows: list[int]) -> None:
        if self.attempt(pair, max(rows) < B, lambda: pair.cache.reorder(rows)):
            pair.rows = [list(pair.rows[r]) for r in rows]
            pair.peeked = [[] for _ in range(B)]

    @rule(
        target=caches, pair=caches, rows=st.none() | st.lists(st.integers(0, B - 1), min_size=B, max_size=B)
    )
    def fork(self, pair: Pair, rows: list[int] | None):
        made: list[KVCache] = []
        fits = rows is None or max(rows) < B
        if not self.attempt(pair, fits, lambda: made.append(pair.cache.fork(rows))):
            return multiple()
        copies = [list(pair.rows[r]) for r in (range(B) if rows is None else rows)]
        return self.add(Pair(made[0], copies, [[] for _ in range(B)]))

    @rule(pair=caches)
    def free(self, pair: Pair) -> None:
        """All but the last; what was freed stays among the caches, and must refuse everything."""
        alive = [p for p in self.all if not p.freed]
        if alive != [pair] and self.attempt(pair, True, pair.cache.free):
            pair.freed = True

    # ------------------------------------------------------------------------------------------------

    @invariant()
    def caches_hold_what_the_lists_hold(self) -> None:
        for pair in self.all:
            if pair.freed:
                with pytest.raises(ValueError, match="freed"):
                    pair.cache.fork()
                continue
            lengths = [len(row) for row in pair.rows]
            assert pair.cache.row_lengths == tuple(lengths) and pair.cache.lengths.tolist() == lengths
            visible = [n + len(p) for n, p in zip(lengths, pair.peeked)]
            assert pair.cache.visible_lengths.tolist() == visible
            k, v = pair.cache.read()
            for b, row in enumerate(pair.rows):
                for which, got in enumerate((k, v)):
                    want = [token[which] for token in row]
                    if want:
                        self.expect(got[b, :, : len(row)], torch.stack(want, 1))
                    assert (got[b, :, len(row) :] == 0).all()

    def expect(self, got: torch.Tensor, want: torch.Tensor) -> None:
        # a rotation rounds in another order than the reference; codes may then differ by one
        step = 1e-5 if self.dtype.itemsize > 1 else want.abs().amax(-1, keepdim=True) / 127
        assert ((got - want).abs() <= step * 1.0001).all()

    @invariant()
    def pages_are_counted(self) -> None:
        if self.page_size is None or not self.all:
            return
        tables = [p.cache.page_table.flatten() for p in self.all if not p.freed]
        pages = torch.cat(tables)
        cache, number = self.all[0].cache, len(self.all[0].cache.k)
        holders = pages[pages >= 0].bincount(minlength=number).tolist()
        assert cache._pool.holders == holders and cache._pool.free == holders.count(0)
        for pair in self.all:
            if not pair.freed:
                held = (pair.cache.page_table >= 0).sum(1).tolist()
                lengths = [len(row) + len(more) for row, more in zip(pair.rows, pair.peeked)]
                assert held == [-(-n // self.page_size) for n in lengths]


def machine(page_size: int | None, dtype: torch.dtype):
    name = f"Caches_{page_size}_{str(dtype)[6:]}"
    test = type(name, (Caches,), {"page_size": page_size, "dtype": dtype}).TestCase
    test.settings = settings(
        max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return test


TestContiguous = machine(None, torch.float32)
TestContiguousInt8 = machine(None, torch.int8)
TestPages = machine(2, torch.float32)
TestLongPages = machine(5, torch.float32)
TestPagesInt8 = machine(3, torch.int8)
