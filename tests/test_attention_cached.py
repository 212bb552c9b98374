"""Cached attention: ragged lengths, pages, a peeked suffix, shared heads and parts of long caches."""

from __future__ import annotations

import pytest
import torch

from arimg import _library, ops, reference
from arimg.layout import Layout
from test_attention import DTYPES, make, moved, random_intervals
from tolerance import assert_close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Lq, length", [(1, 1), (1, 77), (2, 130), (3, 64), (9, 14), (64, 91), (1, 0), (5, 0)]
)
def test_cached(backend, Lq, length, dtype):
    q, k, v = make(2, 3, Lq, 64, dtype, backend.device, keys=140)
    k[:, :, length:] = float("nan")  # what lies beyond the length is never read
    v[:, :, length:] = float("nan")
    got = ops.cached_attention(q, k, v, length)
    assert got.transpose(1, 2).is_contiguous()
    if length == 0:
        assert got.shape == q.shape and (got == 0).all()
        return
    assert_close(got, reference.cached_attention, q, k, v, length)


@pytest.mark.parametrize("D", [8, 40, 64, 128, 256])
def test_cached_reads_slices_of_a_larger_cache(backend, D):
    q, k, v = make(4, 4, 1, D, device=backend.device, keys=70)
    got = ops.cached_attention(q[1::2, 1:3], k[1::2, 1:3], v[1::2, 1:3], 66)
    want = ops.cached_attention(q, k, v, 66)
    assert torch.equal(got, want[1::2, 1:3])
    assert_close(want, reference.cached_attention, q, k, v, 66)


@pytest.mark.parametrize("sides", [[1, 2, 3, 4, 5, 6, 8]])
def test_cached_steps_equal_the_masked_whole(backend, sides):
    layout = Layout.scales(sides)
    q, k, v = make(2, 2, layout.length, 64, device=backend.device)
    whole = ops.row_interval_attention(q, k, v, *moved(layout.intervals("level-causal"), backend.device))
    for first, last in layout.segments:
        step = ops.cached_attention(q[:, :, first:last], k, v, last)
        assert (step - whole[:, :, first:last]).abs().max() < 1e-5


def cache(B, Hkv, capacity, D, dtype, device, seed=7):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, Hkv, capacity, D, generator=g).to(dtype).to(device) for _ in range(2))
    return k, v


def paged(k, v, page_size, seed=3):
    """The same cache in shuffled pages, with pages that nobody owns: (k, v, page_table)."""
    B, H, capacity, D = k.shape
    per_row = -(-capacity // page_size)
    order = torch.randperm(B * per_row + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: B * per_row].view(B, per_row).to(torch.int32)
    pages = [
        torch.full((len(order), H, page_size, D), float("nan"), dtype=k.dtype, device=k.device) for _ in "kv"
    ]
    for source, target in zip((k, v), pages):
        for b in range(B):
            for n in range(capacity):
                target[int(table[b, n // page_size]), :, n % page_size] = source[b, :, n]
    return *pages, table.to(k.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Lq, H, Hkv, D", [(1, 4, 4, 64), (1, 8, 2, 32), (3, 4, 1, 80), (20, 2, 2, 64), (1, 3, 3, 256)]
)
def test_ragged_lengths_contiguous_and_paged(backend, Lq, H, Hkv, D, dtype):
    B, capacity = 3, 50
    lengths = torch.tensor([0, 50, 17], dtype=torch.int32)
    q = make(B, H, Lq, D, dtype, backend.device)[0]
    k, v = cache(B, Hkv, capacity, D, dtype, backend.device)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = float("nan")  # what lies beyond a length is never read
    moved_lengths = lengths.to(backend.device)
    got = ops.cached_attention(q, k, v, moved_lengths)
    assert got.transpose(1, 2).is_contiguous() and (got[0] == 0).all()
    assert_close(got, reference.cached_attention, q, k, v, lengths)
    k_pages, v_pages, table = paged(k, v, 16)
    again = ops.cached_attention(q, k_pages, v_pages, moved_lengths, page_table=table)
    assert torch.equal(again, got)


@pytest.mark.parametrize("Lq", [1, 5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peek(backend, Lq, dtype):
    """New keys behind the cached ones, all seen, causally seen and seen by intervals of each entry."""
    B, H, Hkv, D = 2, 4, 2, 32
    lengths = torch.tensor([13, 0], dtype=torch.int32)
    q = make(B, H, Lq, D, dtype, backend.device)[0]
    k, v = cache(B, Hkv, 20, D, dtype, backend.device)
    k_new, v_new = cache(B, Hkv, Lq + 2, D, dtype, backend.device, seed=8)
    rules = [None, ops.causal_intervals(Lq, Lq + 2), random_intervals(B, Lq)]
    for rule in rules:

        def formula(q, k, v, k_new, v_new, rule=rule):
            return reference.cached_attention(q, k, v, lengths, k_new=k_new, v_new=v_new, new_intervals=rule)

        intervals = None if rule is None else tuple(moved(rule, backend.device))
        options = dict(k_new=k_new, v_new=v_new, new_intervals=intervals)
        got = ops.cached_attention(q, k, v, lengths.to(backend.device), **options)
        assert_close(got, formula, q, k, v, k_new, v_new)
        k_pages, v_pages, table = paged(k, v, 4)
        again = ops.cached_attention(
            q, k_pages, v_pages, lengths.to(backend.device), page_table=table, **options
        )
        assert torch.equal(again, got)


def test_peek_equals_append(backend):
    q = make(2, 2, 4, 32, device=backend.device)[0]
    k, v = cache(2, 2, 24, 32, torch.float32, backend.device)
    start, end = ops.causal_intervals(4, device=backend.device)
    peeked = ops.cached_attention(
        q, k, v, 20, k_new=k[:, :, 20:], v_new=v[:, :, 20:], new_intervals=(start, end)
    )
    rows = torch.zeros_like(end)
    stored = ops.row_interval_attention(q, k, v, rows, end + 20)
    assert (peeked - stored).abs().max() < 2e-6


@pytest.mark.parametrize("D, dtype", [(64, torch.float32), (128, torch.float16)])
def test_long_caches_are_split_over_keys(backend, D, dtype):
    # Several parts on every backend (1024 keys on the CPU, 256 on GPUs); one entry ends within the first.
    B, H, Hkv, capacity = 3, 4, 2, 2100 if backend.name != "emulated" else 600
    lengths = torch.tensor([capacity, 100, capacity - 57], dtype=torch.int32)
    q = make(B, H, 1, D, dtype, backend.device)[0]
    k, v = cache(B, Hkv, capacity, D, dtype, backend.device)
    factor = torch.tensor([1.0, 0.5, 2.0, -1.0], device=backend.device)
    got = ops.cached_attention(q, k, v, lengths.to(backend.device), head_scale=factor)

    def formula(q, k, v, factor):
        return reference.cached_attention(q, k, v, lengths, head_scale=factor)

    assert_close(got, formula, q, k, v, factor)
    for b, n in enumerate(lengths.tolist()):
        s = slice(b, b + 1)
        alone = ops.cached_attention(q[s], k[s], v[s], lengths[s].to(backend.device), head_scale=factor)
        assert torch.equal(alone, got[s])
        exact = ops.cached_attention(q[s], k[s], v[s], n, head_scale=factor)  # a cache of just this length
        assert torch.equal(exact, got[s])


def test_threads_do_not_change_the_bits():
    q = make(1, 2, 1, 64)[0]
    k, v = cache(1, 2, 5000, 64, torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.cached_attention(q, k, v, 5000))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_unaligned_caches(backend):
    q = make(2, 2, 1, 16, torch.bfloat16, backend.device)[0]
    k, v = cache(2, 2, 30, 17, torch.bfloat16, backend.device)
    k, v = k[..., 1:], v[..., 1:]
    got = ops.cached_attention(q, k, v, 30)
    assert torch.equal(got, ops.cached_attention(q, k.contiguous(), v.contiguous(), 30))


def test_gradients_come_from_the_reference():
    q = make(1, 2, 3, 16)[0].requires_grad_()
    k, v = cache(1, 1, 9, 16, torch.float32, "cpu")
    lengths = torch.tensor([7], dtype=torch.int32)
    out = ops.cached_attention(q, k, v, lengths)
    out.sum().backward()
    assert q.grad is not None and (out - ops.cached_attention(q.detach(), k, v, 7)).abs().max() < 1e-5


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    op = getattr(torch.ops, namespace).cached_attention
    q = make(1, 2, 3, 16)[0]
    k, v = cache(1, 1, 12, 16, torch.float32, "cpu")
    torch.library.opcheck(op, (q, k, v, 9, *[None] * 7, 0.25))
    k_pages, v_pages, table = paged(k, v, 4)
    length, (start, end) = torch.tensor([5], dtype=torch.int32), ops.causal_intervals(3)
    new = k[:, :, :3], v[:, :, :3], start, end, torch.ones(2)
    torch.library.opcheck(op, (q, k_pages, v_pages, -1, length, table, *new, 0.25))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda q, k, v, n: ops.cached_attention(q, k, v, n) + 1, fullgraph=True, dynamic=True, backend=backend
    )
    for queries, length in ((3, 9), (5, 20), (8, 33)):
        q, k, v = make(1, 2, queries, 16, keys=40)
        assert torch.equal(step(q, k, v, length), ops.cached_attention(q, k, v, length) + 1)
    assert len(graphs) == 1


def _good():
    k = torch.zeros(2, 3, 9, 16)
    return dict(q=torch.zeros(2, 3, 2, 16), k_cache=k, v_cache=k, length=4)


NEW, INTS = torch.zeros(2, 3, 2, 16), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(k_cache=torch.zeros(2, 2, 9, 16)),
            ValueError,
            r"expected k_cache \[2, a divisor of 3, 9, 16\]",
        ),
        (
            dict(v_cache=torch.zeros(2, 3, 8, 16)),
            ValueError,
            r"expected v_cache \[2, 3, 9, 16\], got \[2, 3, 8, 16\]",
        ),
        (dict(length=10), ValueError, r"expected a length of 0\.\.9, got 10"),
        (dict(length=-1), ValueError, r"expected a length of 0\.\.9, got -1"),
        (dict(length=INTS.long()), TypeError, "expected lengths of int32, got torch.int64"),
        (dict(length=INTS[:1]), ValueError, r"expected lengths \[2\] on cpu, got \[1\] on cpu"),
        (dict(length=INTS + 10), ValueError, r"expected lengths of 0\.\.9, got 10"),
        (dict(length=INTS - 1), ValueError, r"expected lengths of 0\.\.9, got -1"),
        (dict(page_table=INTS[:, None].long()), TypeError, "expected page_table of int32, got torch.int64"),
        (dict(page_table=INTS), ValueError, r"expected page_table \[2, pages\] on cpu, got \[2\] on cpu"),
        (dict(page_table=INTS[:, None] - 1), ValueError, r"expected pages of 0\.\.1 for all keys, got -1"),
        (dict(page_table=INTS[:, None] + 2), ValueError, r"expected pages of 0\.\.1 for all keys, got 2"),
        (dict(k_new=NEW), ValueError, "expected k_new and v_new together"),
        (dict(new_intervals=(INTS, INTS)), ValueError, "new_intervals only with them"),
        (
            dict(k_new=NEW, v_new=NEW[:, :2]),
            ValueError,
            r"expected v_new \[2, 3, 2, 16\], got \[2, 2, 2, 16\]",
        ),
        (dict(k_new=NEW, v_new=NEW, new_intervals=(INTS, INTS[:1])), ValueError, r"expected row_end \[2\]"),
    ],
)
def test_bad_caches_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.cached_attention(**(_good() | change))
