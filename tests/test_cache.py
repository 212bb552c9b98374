"""KVCache and StateCache, operation by operation; tests/test_cache_stateful.py mixes them at random."""

from __future__ import annotations

import pytest
import torch

from arimg import ops
from arimg.cache import KVCache, StateCache
from arimg.nn.rope import rope_1d
from arimg.reference.kv_cache import decode_vectors, encode_vectors

B, H, D, CAPACITY = 3, 2, 8, 12
PAGED = pytest.mark.parametrize(
    "page_size", [None, 1, 4, 5], ids=lambda p: "whole" if p is None else f"page{p}"
)
STORAGE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])


def tokens(n, seed=0, batch=B, heads=H, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, 3, heads, D, generator=g).to(dtype)


def make(page_size=None, dtype=torch.float32, pages=None, batch=B):
    cache = KVCache(batch, H, CAPACITY, D, dtype, page_size=page_size, pages=pages)
    for t in cache._pool.tensors:  # what was never written must not show
        t.view(torch.int8).fill_(-1)
    return cache


def stored(x, dtype):
    """What the cache gives back of x [..., D]."""
    if dtype in (torch.int8, torch.float8_e4m3fn):
        return decode_vectors(*encode_vectors(x, dtype), torch.float32)
    return x.to(dtype)


def rows_of(cache):
    """[(k, v)] per row, [H, length, D] each."""
    return [tuple(t[0] for t in cache.read(row=b)) for b in range(cache.batch)]


def expect_rows(cache, *qkvs):
    """Row b holds the keys and values of qkvs[b] [L, 3, H, D]."""
    assert cache.row_lengths == tuple(len(x) for x in qkvs)
    assert cache.lengths.tolist() == list(cache.row_lengths)
    for (k, v), x in zip(rows_of(cache), qkvs):
        assert torch.equal(k, stored(x[:, 1].transpose(0, 1), cache.dtype))
        assert torch.equal(v, stored(x[:, 2].transpose(0, 1), cache.dtype))


def state_of(cache):
    """All that an operation that fails must leave alone."""
    return [
        cache.row_lengths,
        cache.visible_lengths.tolist(),
        cache.free_pages,
        *map(torch.cat, rows_of(cache)),
    ]


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@PAGED
@STORAGE
def test_append_and_read(page_size, dtype):
    cache, one_byte = make(page_size, dtype), dtype.itemsize == 1
    kind = torch.float32 if one_byte else dtype
    x = tokens(9, dtype=kind)
    for part in x.split((4, 1, 4), 1):
        q = cache.append(part)
        assert torch.equal(q, part[:, :, 0].transpose(1, 2))
    expect_rows(cache, *x)
    k, v = cache.read(2, 11)
    assert k.shape == v.shape == (B, H, 9, D) and (k[:, :, 7:] == 0).all() and k.dtype == kind
    assert torch.equal(v[:, :, :7], stored(x[:, 2:, 2].transpose(1, 2), dtype))
    if one_byte:
        assert cache.read(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@PAGED
def test_ragged_rows(page_size):
    cache = make(page_size)
    x, y = tokens(5), tokens(3, seed=1)
    cache.append(x, counts=(5, 0, 2))
    assert cache.row_lengths == (5, 0, 2)
    with pytest.raises(ValueError, match=r"expected rows of one length, got \[5, 0, 2\]"):
        _ = cache.length
    cache.append(y)
    expect_rows(cache, torch.cat((x[0], y[0])), y[1], torch.cat((x[2, :2], y[2])))
    cache.truncate((6, 0, 1))
    expect_rows(cache, torch.cat((x[0], y[0]))[:6], y[1, :0], x[2, :1])
    cache.rewind((1, 0, 1))
    expect_rows(cache, x[0], y[1, :0], x[2, :0])
    assert cache.read()[0].shape[2] == 5


@PAGED
def test_rotations_follow_the_positions_of_each_row(page_size):
    """A ragged append rotates as every row by itself does, stored or not."""
    rope = rope_1d(CAPACITY, D)
    cache = make(page_size)
    cache.append(tokens(4), counts=(4, 0, 2))
    x = tokens(3, seed=1)
    q = cache.append(x, counts=(3, 2, 1), norm="rms", rope=rope)
    for b, (start, n) in enumerate(((4, 3), (0, 2), (2, 1))):
        k, v = torch.zeros(2, 1, H, CAPACITY, D)
        assert torch.equal(ops.append_(k, v, x[b : b + 1], start, norm="rms", rope=rope)[0], q[b])
        assert torch.equal(rows_of(cache)[b][0][:, start:], k[0, :, start : start + n])


@PAGED
@STORAGE
def test_append_at(page_size, dtype):
    cache = make(page_size, dtype)
    x = tokens(3)
    cache.append_at(x[:, :, :, :, :].to(torch.float32 if dtype.itemsize == 1 else dtype), (6, 0, 2))
    x = x.to(torch.float32 if dtype.itemsize == 1 else dtype)
    assert cache.row_lengths == (7, 7, 7)
    for b, (k, _) in enumerate(rows_of(cache)):
        want = torch.zeros(H, 7, D, dtype=k.dtype)
        want[:, (6, 0, 2)] = stored(x[b, :, 1].transpose(0, 1), dtype)
        assert torch.equal(k, want)
    y = tokens(2, seed=1).to(x.dtype)
    cache.append_at(y, torch.tensor([[1, 3], [9, 6], [0, 4]]))
    assert cache.row_lengths == (7, 10, 7)
    v = rows_of(cache)[1][1]
    assert torch.equal(v[:, 9], stored(y[1, 0, 2], dtype)) and torch.equal(v[:, 6], stored(y[1, 1, 2], dtype))
    assert (v[:, 7:9] == 0).all() and (v[:, 3:6] == 0).all()


@PAGED
def test_peek_and_commit(page_size):
    cache = make(page_size)
    x, y, z = tokens(4), tokens(5, seed=1), tokens(2, seed=2)
    cache.append(x)
    q = cache.peek(y)
    assert torch.equal(q, y[:, :, 0].transpose(1, 2))
    assert cache.row_lengths == (4, 4, 4) and cache.visible_lengths.tolist() == [9, 9, 9]
    seen = ops.read_cache(cache.k, 0, 9, page_table=cache.page_table, lengths=cache.visible_lengths)
    assert torch.equal(seen, torch.cat((x, y), 1)[:, :, 1].transpose(1, 2))
    cache.commit((0, 5, 2))
    expect_rows(cache, x[0], torch.cat((x[1], y[1])), torch.cat((x[2], y[2, :2])))
    assert cache.visible_lengths.tolist() == [4, 9, 6]
    cache.peek(z)
    cache.peek(z, counts=(1, 0, 2))
    assert cache.visible_lengths.tolist() == [5, 9, 8]
    cache.append(z)
    expect_rows(
        cache, torch.cat((x[0], z[0])), torch.cat((x[1], y[1], z[1])), torch.cat((x[2], y[2, :2], z[2]))
    )
    with pytest.raises(ValueError, match=r"expected to commit 0\.\.0 tokens, got 1"):
        cache.commit(1)


@PAGED
def test_overwrite_last(page_size):
    cache = make(page_size)
    x, y = tokens(6), tokens(3, seed=1)
    cache.append(x, counts=(6, 3, 4))
    q = cache.overwrite_last(y, rope=rope_1d(CAPACITY, D))
    assert cache.row_lengths == (6, 3, 4) and q.shape == (B, H, 3, D)
    other = make(page_size)
    other.append(x, counts=(3, 0, 1))
    other.append(y, rope=rope_1d(CAPACITY, D))
    assert same(state_of(cache)[3:], state_of(other)[3:])


@PAGED
@STORAGE
def test_forks_go_their_own_ways(page_size, dtype):
    cache = make(page_size, dtype, pages=None if page_size is None else 3 * B * -(-CAPACITY // page_size))
    kind = torch.float32 if dtype.itemsize == 1 else dtype
    x, y, z = (tokens(n, seed=n, dtype=kind) for n in (6, 3, 2))
    cache.append(x)
    free = cache.free_pages
    fork, branch = cache.fork(), cache.fork((2, 0, 2))
    assert cache.free_pages == free
    fork.append(y)
    cache.append(z)
    branch.truncate((5, 6, 2))
    branch.append(z[:, :1])
    expect_rows(fork, *torch.cat((x, y), 1))
    expect_rows(cache, *torch.cat((x, z), 1))
    expect_rows(
        branch, torch.cat((x[2, :5], z[0, :1])), torch.cat((x[0], z[1, :1])), torch.cat((x[2, :2], z[2, :1]))
    )
    fork.free()
    branch.free()
    expect_rows(cache, *torch.cat((x, z), 1))
    if page_size is not None:
        assert cache.free_pages == len(cache.k) - B * -(-8 // page_size)


def test_forks_share_pages_and_copy_what_they_write():
    cache = make(4, pages=8, batch=1)
    cache.append(tokens(6, batch=1))
    fork = cache.fork()
    assert fork.k.data_ptr() == cache.k.data_ptr() and torch.equal(fork.page_table, cache.page_table)
    assert fork.nbytes == cache.nbytes
    fork.append(tokens(1, batch=1))
    assert fork.page_table[0, 0] == cache.page_table[0, 0]  # full pages stay shared
    assert fork.page_table[0, 1] != cache.page_table[0, 1] and cache.free_pages == 5
    page = cache.page_table[0, 1].item()
    cache.append(tokens(1, batch=1))  # the page is its own by now
    assert cache.page_table[0, 1] == page and cache.free_pages == 5


def test_the_last_holder_of_a_page_keeps_it():
    cache = make(4, pages=4, batch=2)
    cache.append(tokens(2, batch=2))
    twins = cache.fork((0, 0))
    cache.free()
    twins.append(tokens(1, batch=2))  # one copy, not two
    assert twins.free_pages == 2


@PAGED
def test_reorder(page_size):
    cache = make(page_size)
    x, y = tokens(6), tokens(2, seed=1)
    cache.append(x, counts=(6, 1, 3))
    cache.reorder((2, 0, 2))
    expect_rows(cache, x[2, :3], x[0], x[2, :3])
    cache.append(y)
    expect_rows(cache, *(torch.cat(pair) for pair in ((x[2, :3], y[0]), (x[0], y[1]), (x[2, :3], y[2]))))


@PAGED
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_pooled_view(page_size, dtype):
    cache = make(page_size, dtype)
    x = tokens(11)
    cache.append(x)
    k, v = cache.pooled_view(1, 2, (2, 4), start=2)
    for got, which in ((k, 1), (v, 2)):
        grid = stored(x[:, 2:10, which].transpose(1, 2), dtype).unflatten(2, (2, 4))
        want = torch.stack((grid[:, :, :, :2].mean((2, 3)), grid[:, :, :, 2:].mean((2, 3))), 2)
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r"expected tokens within 0\.\.11, got 4\.\.12"):
        cache.pooled_view(1, 2, (2, 4), start=4)


@PAGED
@STORAGE
def test_memory_is_taken_once_and_reported(page_size, dtype):
    cache = make(page_size, dtype)
    pages, size = (B, CAPACITY) if page_size is None else (B * -(-CAPACITY // page_size), page_size)
    scales = 4 if dtype.itemsize == 1 else 0
    assert cache.nbytes == 2 * pages * H * size * (D * dtype.itemsize + scales)
    before = [t.data_ptr() for t in (*cache._pool.tensors, cache.lengths)]
    x = tokens(4, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    cache.append(x)
    cache.peek(x)
    cache.commit(1)
    cache.append_at(x, (7, 1, 8, 2))
    cache.overwrite_last(x)
    cache.reorder((1, 2, 0))
    cache.truncate(0)
    assert [t.data_ptr() for t in (*cache._pool.tensors, cache.lengths)] == before
    assert cache.free_pages == (0 if page_size is None else pages)


def test_grouped_heads_and_the_norm_of_queries_and_keys():
    cache = KVCache(2, 1, 5, D)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 4 + 2, D, generator=g)
    q = cache.append(qkv, torch.full((4,), 2.0), True)
    assert q.shape == (2, 4, 3, D)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((2, 4, 3), 2.0))
    torch.testing.assert_close(cache.read()[0].norm(dim=-1), torch.ones(2, 1, 3))


ERRORS = [
    ("append", (tokens(7),), {}, r"expected at most 6 more tokens in a cache of 12, got 7"),
    ("append", (tokens(2),), dict(counts=(1, 2)), "expected counts for 3 rows, got 2"),
    ("append", (tokens(2),), dict(counts=(1, 2, 3)), r"expected counts of 0\.\.2, got 3"),
    ("append", (tokens(2, batch=2),), {}, r"expected qkv \[3, L, Hq \+ 2 Hkv, D\]"),
    ("append", (tokens(2, heads=3),), {}, r"expected k_cache \[.*, 3, Lmax, 8\]"),
    ("append", (tokens(2),), dict(norm="layer"), "expected a norm of"),
    ("append", (tokens(2),), dict(rope=rope_1d(4, 6)), r"expected rope.cos \[P, 4\]"),
    ("append", (tokens(2), torch.ones(H)), {}, "expected q_scale only with l2_norm"),
    ("peek", (tokens(7),), {}, "expected at most 6 more tokens in a cache of 12, got 7"),
    ("append_at", (tokens(2), (3, 3)), {}, "expected distinct positions, got 3 more than once"),
    ("append_at", (tokens(2), (3, 12)), {}, r"expected positions of 0\.\.11, got 12"),
    ("append_at", (tokens(2), (-1, 3)), {}, r"expected positions of 0\.\.11, got -1"),
    ("append_at", (tokens(2), (1, 2, 3)), {}, r"expected positions \[2\] or \[3, 2\]"),
    ("append_at", (tokens(2), ((1, 2), (3, 4))), {}, r"expected positions \[2\] or \[3, 2\]"),
    ("append_at", (tokens(2, heads=1), (10, 11)), {}, r"expected k_cache"),
    ("overwrite_last", (tokens(3),), {}, "expected at most 2 tokens to overwrite, got 3"),
    ("truncate", ((6, 3, 2),), {}, r"expected a length of 0\.\.2, got 3"),
    ("truncate", (-1,), {}, r"expected a length of 0\.\.6, got -1"),
    ("rewind", ((0, 0, 5),), {}, r"expected to rewind 0\.\.4 tokens, got 5"),
    ("rewind", (3,), {}, r"expected to rewind 0\.\.2 tokens, got 3"),
    ("commit", ((0, 2, 0),), {}, r"expected to commit 0\.\.1 tokens, got 2"),
    ("reorder", ((0, 1),), {}, "expected 3 rows, got 2"),
    ("reorder", ((0, 1, 3),), {}, r"expected rows of 0\.\.2, got 3"),
    ("fork", ((3,),), {}, r"expected rows of 0\.\.2, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("name, arguments, options, text", ERRORS)
def test_what_fails_changes_nothing(page_size, name, arguments, options, text):
    cache = make(page_size)
    cache.append(tokens(6, seed=9), counts=(6, 2, 4))
    cache.peek(tokens(1, seed=8))
    before = state_of(cache)
    with pytest.raises(ValueError, match=text):
        getattr(cache, name)(*arguments, **options)
    assert same(before, state_of(cache))
    assert cache.visible_lengths.tolist() == [7, 3, 5]


def test_a_used_up_pool_is_refused_before_anything_changes():
    cache = make(2, pages=6)
    cache.append(tokens(3))
    fork = cache.fork()
    before = state_of(cache), state_of(fork)
    with pytest.raises(ValueError, match="expected to need at most 0 more pages of 6, got 3"):
        fork.append(tokens(1))  # its page is shared
    with pytest.raises(ValueError, match="expected to need at most 0 more pages of 6, got 6"):
        cache.append(tokens(2))
    assert same(before[0], state_of(cache)) and same(before[1], state_of(fork))
    fork.free()
    cache.append(tokens(1))
    assert cache.length == 4


@pytest.mark.parametrize("page_size", [None, 4])
def test_a_freed_cache_is_refused(page_size):
    cache = make(page_size)
    cache.append(tokens(2))
    other = cache.fork()
    cache.free()
    calls = [
        cache.fork, cache.free, cache.read, cache.commit, lambda: cache.append(tokens(1)),
        lambda: cache.peek(tokens(1)), lambda: cache.append_at(tokens(1), (1,)), lambda: cache.truncate(0),
        lambda: cache.rewind(0), lambda: cache.reorder((0, 1, 2)), lambda: cache.overwrite_last(tokens(1)),
        lambda: cache.pooled_view(1, 1, (1, 1)), lambda: cache.lengths, lambda: cache.page_table,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="expected a cache in use, got one that was freed"):
            call()
    expect_rows(other, *tokens(2))


def test_bad_caches_are_refused():
    with pytest.raises(ValueError, match="expected a page size of 1 or more, got 0"):
        KVCache(1, 1, 4, 8, page_size=0)
    with pytest.raises(ValueError, match="expected a number of pages only with a page_size"):
        KVCache(1, 1, 4, 8, pages=3)
    with pytest.raises(ValueError, match="expected sizes of 0 or more"):
        KVCache(1, -1, 4, 8)
    with pytest.raises(ValueError, match=r"expected a row of 0\.\.0, got 1"):
        KVCache(1, 1, 4, 8).read(row=1)
    with pytest.raises(TypeError, match="expected qkv to be a tensor, got list"):
        KVCache(1, 1, 4, 8).append([1])
    KVCache(0, 1, 4, 8).reorder(())
    empty = KVCache(0, 1, 4, 8, page_size=2)
    assert empty.length == 0 and empty.append(torch.zeros(0, 2, 3, 1, 8)).shape == (0, 1, 2, 8)


# ----------------------------------------------------------------------------------------------------------


def states(**options):
    return StateCache(3, {"s": (2, 4), "tail": (5,)}, dtypes={"tail": torch.bfloat16}, **options)


def fill(cache, seed):
    g = torch.Generator().manual_seed(seed)
    s, tail = torch.randn(3, 2, 4, generator=g), torch.randn(3, 5, generator=g).bfloat16()
    cache.update(s=s, tail=tail)
    return s, tail


def test_states_are_kept_forked_reordered_and_reset():
    cache = states(checkpoints=2)
    assert (cache["s"] == 0).all() and list(cache) == ["s", "tail"]
    assert cache.nbytes == 3 * 3 * (8 * 4 + 5 * 2)
    address = cache["s"].data_ptr()
    s, tail = fill(cache, 1)
    fork = cache.fork((2, 2))
    cache["s"].mul_(2)
    assert torch.equal(cache["s"], 2 * s) and torch.equal(fork["s"], s[[2, 2]])
    assert torch.equal(fork["tail"], tail[[2, 2]]) and fork.batch == 2
    cache.reorder((1, 1, 0))
    assert torch.equal(cache["s"], 2 * s[[1, 1, 0]]) and cache["s"].data_ptr() == address
    cache.reset((1,))
    assert (cache["s"][1] == 0).all() and (cache["tail"][1] == 0).all() and cache["s"][0].any()
    cache.reset()
    assert not cache["s"].any()


def test_states_go_back_to_checkpoints_row_by_row():
    cache = states(checkpoints=2)
    first, _ = fill(cache, 1)
    cache.save()
    second, tail = fill(cache, 2)
    cache.save()
    third, _ = fill(cache, 3)
    cache.rewind((0, 1, 2))
    assert cache.saved == (2, 1, 0)
    assert torch.equal(cache["s"], torch.stack((third[0], second[1], first[2])))
    assert torch.equal(cache["tail"][1], tail[1])
    before = cache["s"].clone()
    for counts, text in (((0, 2, 0), r"0\.\.1 checkpoints, got 2"), (1, r"0\.\.0 checkpoints, got 1")):
        with pytest.raises(ValueError, match=text):
            cache.rewind(counts)
    with pytest.raises(ValueError, match="expected at most 2 checkpoints, got one more"):
        cache.save()
    assert torch.equal(cache["s"], before) and cache.saved == (2, 1, 0)
    cache.forget()
    assert cache.saved == (0, 0, 0) and torch.equal(cache["s"], before)


def test_bad_states_are_refused():
    cache = states()
    fill(cache, 1)
    before = cache["s"].clone()
    good = torch.ones(3, 2, 4)
    for change, error, text in (
        (dict(s=good, x=good), ValueError, r"expected states of \['s', 'tail'\], got 'x'"),
        (dict(s=good, tail=torch.ones(3, 4)), ValueError, r"expected tail \[3, 5\], got \[3, 4\]"),
        (dict(s=good.half()), TypeError, r"expected s of torch\.float32, got torch\.float16"),
    ):
        with pytest.raises(error, match=text):
            cache.update(**change)
    with pytest.raises(ValueError, match=r"expected rows of 0\.\.2, got 5"):
        cache.reorder((0, 1, 5))
    with pytest.raises(ValueError, match="expected 3 rows, got 2"):
        cache.reorder((0, 1))
    with pytest.raises(ValueError, match="expected counts for 3 rows, got 1"):
        cache.rewind((0,))
    with pytest.raises(ValueError, match=r"expected dtypes of \['s'\], got \['t'\]"):
        StateCache(1, {"s": (1,)}, dtypes={"t": torch.half})
    assert torch.equal(cache["s"], before)


@PAGED
@pytest.mark.parametrize("new", [1, 3, 5])
def test_padding_is_seen_by_itself_alone(page_size, new):
    cache, x, padding = make(page_size), tokens(5), torch.tensor([0, 2, 4], dtype=torch.int32)
    if new < 5:
        cache.append(x[:, : 5 - new])
    q = cache.append(x[:, 5 - new :])
    got = cache.attend_causal(q, padding=padding)
    q, k, v = x.permute(2, 0, 3, 1, 4)
    i = torch.arange(5)
    seen = (i <= i[:, None]) & (i >= padding[:, None, None]) | (i == i[:, None])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    torch.testing.assert_close(got, want[:, :, 5 - new :], rtol=1e-5, atol=1e-6)


def test_a_new_cache_holds_zeros():
    """Places behind the end of a row are read with masked rows: they must hold no NaN by chance."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for page_size in (None, 4):
            cache = KVCache(2, 1, 64, 32, dtype, page_size=page_size)
            assert not cache.k.float().any() and not cache.v.float().any()
