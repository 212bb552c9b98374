"""Cache appends with normalised queries and keys against plain torch, and the cache object."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops
from arimg.cache import KVCache
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(B, L, H, D, dtype=torch.float32, device="cpu", capacity=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, L, 3, H, D, generator=g).to(dtype).to(device)
    cache = torch.randn(2, B, H, capacity or L + 3, D, generator=g).to(dtype).to(device)
    q_scale = (torch.rand(H, generator=g) * 10).to(device)
    return qkv, cache[0].contiguous(), cache[1].contiguous(), q_scale


def unit(qkv, which, scale):
    """q or k of qkv, [B, H, L, D], normalised with the same-dtype formula and scaled per head."""
    return F.normalize(qkv[:, :, which].transpose(1, 2), dim=-1, eps=1e-12) * scale[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, L, H, D", [(1, 1, 1, 8), (2, 3, 2, 64), (1, 5, 3, 128), (2, 2, 2, 20), (1, 3, 2, 256), (1, 2, 1, 5)]
)
def test_append_with_norm(backend, B, L, H, D, dtype):
    qkv, k, v, q_scale = make(B, L, H, D, dtype, backend.device)
    before = k.clone(), v.clone()
    q = ops.append_qk_norm_(k, v, qkv, 2, q_scale, True)
    one = torch.ones(H, dtype=dtype)
    assert q.shape == (B, H, L, D) and q.is_contiguous() and q.dtype == dtype
    assert_close(q, unit, qkv, 0, q_scale.cpu())
    assert_close(k[:, :, 2 : 2 + L], unit, qkv, 1, one)
    assert torch.equal(v[:, :, 2 : 2 + L], qkv[:, :, 2].transpose(1, 2))
    for now, then in zip((k, v), before):
        assert torch.equal(now[:, :, :2], then[:, :, :2]) and torch.equal(
            now[:, :, 2 + L :], then[:, :, 2 + L :]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_without_norm_copies(backend, dtype):
    qkv, k, v, _ = make(2, 4, 3, 64, dtype, backend.device)
    q = ops.append_qk_norm_(k, v, qkv, 0, None, False)
    for got, which in ((q, 0), (k[:, :, :4], 1), (v[:, :, :4], 2)):
        assert torch.equal(got, qkv[:, :, which].transpose(1, 2))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    qkv, k, v, q_scale = make(3, 4, 2, 64, device=backend.device)
    q = ops.append_qk_norm_(k, v, qkv, 1, q_scale, True)
    for b in range(3):
        s = slice(b, b + 1)
        alone = torch.zeros_like(k[s]), torch.zeros_like(v[s])
        assert torch.equal(ops.append_qk_norm_(*alone, qkv[s], 1, q_scale, True), q[s])
        assert torch.equal(alone[0][:, :, 1:5], k[s, :, 1:5]) and torch.equal(
            alone[1][:, :, 1:5], v[s, :, 1:5]
        )


def test_views_of_a_larger_cache_and_unaligned_input(backend):
    qkv, k, v, q_scale = make(2, 3, 2, 64, device=backend.device)
    want = ops.append_qk_norm_(k, v, qkv, 0, q_scale, True)
    big = torch.zeros(2, 4, 4, 9 * 64 + 1, device=backend.device)
    wide_k, wide_v = (t[1::2, 1:3, 1:].view(2, 2, 9, 64) for t in big)
    shifted = torch.empty(qkv.numel() + 1, device=backend.device)[1:].view(qkv.shape).copy_(qkv)
    assert torch.equal(ops.append_qk_norm_(wide_k, wide_v, shifted, 4, q_scale, True), want)
    assert torch.equal(wide_k[:, :, 4:7], k[:, :, :3]) and torch.equal(wide_v[:, :, 4:7], v[:, :, :3])
    assert big.count_nonzero() == 2 * k[:, :, :3].numel()


def test_zero_and_nan_vectors(backend):
    qkv, k, v, q_scale = make(1, 3, 1, 64, device=backend.device)
    qkv[0, 0, :2] = 0
    qkv[0, 1, 0, 0, 5] = float("nan")
    q = ops.append_qk_norm_(k, v, qkv, 0, q_scale, True)
    assert (q[0, 0, 0] == 0).all() and (k[0, 0, 0] == 0).all()
    assert q[0, 0, 1].isnan().all() and q[0, 0, 2].isfinite().all() and k[0, 0, :3].isfinite().all()


def test_no_tokens(backend):
    qkv, k, v, q_scale = make(2, 0, 2, 16, device=backend.device)
    before = k.clone()
    assert ops.append_qk_norm_(k, v, qkv, 3, q_scale, True).shape == (2, 2, 0, 16)
    assert torch.equal(k, before)


def test_gradients_flow_through_the_reference():
    qkv, k, v, q_scale = make(1, 2, 2, 16)
    qkv.requires_grad_()
    q = ops.append_qk_norm_(k, v, qkv, 0, q_scale, True)
    (q.sum() + k.sum() + v.sum()).backward()
    assert qkv.grad is not None and (qkv.grad[:, :, 2] == 1).all() and qkv.grad[:, :, :2].abs().sum() > 0


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda k, v, x, at, s: ops.append_qk_norm_(k, v, x, at, s, True) * 2,
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for tokens, at in ((5, 2), (4, 6), (7, 9)):
        qkv, k, v, q_scale = make(2, tokens, 2, 16, capacity=20)
        mine, other = k.clone(), k.clone()
        got = step(mine, v, qkv, at, q_scale)
        assert torch.equal(got, ops.append_qk_norm_(other, v, qkv, at, q_scale, True) * 2)
        assert torch.equal(mine, other) and not torch.equal(mine, k)
    assert len(graphs) == 1


def test_cache_appends_truncates_and_refuses_too_much():
    cache = KVCache(2, 3, 7, 16)
    for memory in (cache.k, cache.v):
        memory.zero_()  # new memory may hold NaN, which equals nothing
    qkv, _, _, q_scale = make(2, 4, 3, 16)
    cache.append(qkv, q_scale, l2_norm=True)
    assert cache.length == 4 and cache.capacity == 7 and cache.nbytes == 2 * 2 * 3 * 7 * 16 * 4
    before = cache.k.clone(), cache.v.clone()
    with pytest.raises(ValueError, match="expected at most 3 more tokens in a cache of 7, got 4"):
        cache.append(qkv, q_scale, l2_norm=True)
    for length in (5, -1):
        with pytest.raises(ValueError, match=f"expected a length of 0..4, got {length}"):
            cache.truncate(length)
    assert cache.length == 4 and torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])
    cache.truncate(1)
    cache.append(qkv[:, 1:], q_scale, l2_norm=True)
    assert cache.length == 4 and torch.equal(cache.k, before[0]) and torch.equal(cache.v, before[1])


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(qkv=torch.zeros(1, 2, 2, 16)),
            ValueError,
            r"expected qkv \[B, L, 3, H, D\], got \[1, 2, 2, 16\]",
        ),
        (dict(qkv=torch.zeros(1, 2, 3, 2, 16).double()), TypeError, "expected qkv of float32"),
        (dict(qkv=torch.zeros(1, 2, 3, 2, 300)), ValueError, "expected a head dim of at most 256, got 300"),
        (dict(k_cache=torch.ones(1, 3, 5, 16)), ValueError, r"expected k_cache \[1, 2, Lmax, 16\]"),
        (
            dict(k_cache=torch.ones(1, 2, 5, 32)[..., ::2]),
            ValueError,
            "expected k_cache with contiguous rows",
        ),
        (dict(v_cache=torch.ones(1, 2, 5, 16).half()), TypeError, "expected v_cache of qkv's dtype"),
        (dict(start=4), ValueError, r"expected positions within 0..5, got 4..6"),
        (dict(start=-1), ValueError, r"expected positions within 0..5, got -1..1"),
        (dict(q_scale=torch.ones(3)), ValueError, r"expected q_scale \[2\], got \[3\]"),
        (dict(q_scale=torch.ones(2), l2_norm=False), ValueError, "expected q_scale only with l2_norm"),
    ],
)
def test_bad_input_is_refused_and_the_cache_kept(change, error, text):
    good = dict(
        k_cache=torch.ones(1, 2, 5, 16),
        v_cache=torch.ones(1, 2, 5, 16),
        qkv=torch.zeros(1, 2, 3, 2, 16),
        start=0,
        q_scale=None,
        l2_norm=True,
    )
    arguments = good | change
    with pytest.raises(error, match=text):
        ops.append_qk_norm_(**arguments)
    assert (arguments["k_cache"] == 1).all() and (arguments["v_cache"] == 1).all()
