"""The fused append (norms, rotations, grouped heads, pages, one-byte storage) and the read, against torch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arimg import _library, ops, reference
from arimg.nn.rope import rope_1d, rope_2d
from arimg.reference.kv_cache import decode_vectors, encode_vectors, split_qk_norm
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = [torch.int8, torch.float8_e4m3fn]


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def to(rope, device):
    return ops.Rope(rope.cos.to(device), rope.sin.to(device), rope.interleaved)


def weights(norm, Hq, D, device="cpu"):
    if norm is None:
        return {}
    if norm == "l2":
        return dict(norm=norm, q_weight=(normal(Hq).abs() * 10).to(device))
    return dict(norm=norm, q_weight=normal(D, seed=1).to(device), k_weight=normal(D, seed=2).to(device))


def scattered(B, pages_each, device="cpu"):
    """A table whose pages lie in random order, and how many pages there are."""
    order = torch.randperm(B * pages_each, generator=torch.Generator().manual_seed(3))
    return order.to(torch.int32).view(B, pages_each).to(device), B * pages_each


def q_and_k(qkv, cos, sin, q_weight, k_weight, options, kv_heads):
    """Queries and keys [B, Hq + Hkv, L, D] by the reference, in qkv's dtype."""
    B, L, _, D = qkv.shape
    k, v = torch.zeros(2, B, kv_heads, L, D, dtype=qkv.dtype)
    rope = None if cos is None else ops.Rope(cos, sin, options["interleaved"])
    q = reference.append_(
        k, v, qkv, 0, norm=options["norm"], q_weight=q_weight, k_weight=k_weight, rope=rope,
        rope_index=options["index"],
    )  # fmt: skip
    return torch.cat((q, k), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "l2", "rms"])
@pytest.mark.parametrize("pairing", [None, "interleaved", "halves"])
@pytest.mark.parametrize(
    "B, L, Hq, Hkv, D", [(2, 3, 4, 2, 64), (1, 2, 3, 1, 20), (1, 2, 2, 2, 256), (1, 3, 1, 1, 6)]
)
def test_append(backend, B, L, Hq, Hkv, D, pairing, norm, dtype):
    qkv = normal(B, L, Hq + 2 * Hkv, D, dtype=dtype, device=backend.device)
    k, v = normal(2, B, Hkv, L + 3, D, seed=4, dtype=dtype, device=backend.device)
    before = k.clone(), v.clone()
    interleaved = pairing == "interleaved"
    rope = None if pairing is None else to(rope_1d(9, D, interleaved=interleaved), backend.device)
    index = torch.arange(L, dtype=torch.int32).flip(0).view(1, L).to(backend.device) + 4
    options = weights(norm, Hq, D, backend.device)
    q = ops.append_(k, v, qkv, 2, rope=rope, rope_index=index, **options)
    assert q.shape == (B, Hq, L, D) and q.is_contiguous() and q.dtype == dtype
    named = dict(norm=norm, interleaved=interleaved, index=index.cpu())
    tables = (None, None) if rope is None else rope[:2]
    assert_close(
        torch.cat((q, k[:, :, 2 : 2 + L]), 1), q_and_k, qkv, *tables, options.get("q_weight"),
        options.get("k_weight"), named, Hkv,
    )  # fmt: skip
    assert torch.equal(v[:, :, 2 : 2 + L], qkv[:, :, Hq + Hkv :].transpose(1, 2))
    for now, then in zip((k, v), before):
        assert torch.equal(now[:, :, :2], then[:, :, :2])
        assert torch.equal(now[:, :, 2 + L :], then[:, :, 2 + L :])


@pytest.mark.parametrize("storage", [None, *CODES])
def test_pages_hold_what_a_contiguous_cache_holds(backend, storage):
    B, L, H, D, page = 2, 7, 2, 16, 3
    qkv = normal(B, L, 6, D, device=backend.device)
    table, pages = scattered(B, 3, backend.device)
    rope = to(rope_2d(2, 4, D, prefix=1), backend.device)
    positions = torch.tensor([[5, 3, -1, 0, 1, 8, 7], [0, 1, 2, 3, 4, 9, 6]], dtype=torch.int32)
    positions = positions.to(backend.device)
    shapes = (B, H, 9, D), (pages, H, page, D)
    parts = []
    for shape, where in zip(shapes, (None, table)):
        k, v = (torch.zeros(shape, dtype=storage or torch.float32, device=backend.device) for _ in "kv")
        scales = {}
        if storage is not None:
            scales = {f"{n}_scale": torch.zeros(shape[:3], device=backend.device) for n in "kv"}
        options = dict(rope=rope, norm="l2", page_table=where, rope_index=positions.clamp(0, 8))
        q = ops.append_(k, v, qkv, positions=positions, **options, **scales)
        rows = [
            ops.read_cache(t, 0, 9, page_table=where, scale=scales.get(f"{n}_scale"))
            for n, t in zip("kv", (k, v))
        ]
        parts.append((q, *rows))
    assert all(torch.equal(a, b) for a, b in zip(*parts))
    _, k, v = parts[0]
    # what a token without a place would have written is nowhere: 5 of 9 positions are filled
    assert (v[0].abs().sum((0, 2)) > 0).tolist() == [True, True, False, True, False, True, False, True, True]
    assert (v[1].abs().sum((0, 2)) > 0).tolist() == [True] * 5 + [False, True, False, False]
    if storage is None:
        assert torch.equal(v[0, :, 8], qkv[0, 5, 4:]) and torch.equal(v[1, :, 6], qkv[1, 6, 4:])


def test_no_page_no_write(backend):
    qkv = normal(1, 4, 3, 8, device=backend.device)
    k, v = torch.zeros(2, 2, 1, 2, 8, device=backend.device)
    table = torch.tensor([[1, -1, 7]], dtype=torch.int32, device=backend.device)
    ops.append_(k, v, qkv, 1, page_table=table)
    assert torch.equal(v[1, 0, 1], qkv[0, 0, 2]) and v.count_nonzero() == 8
    assert torch.equal(ops.read_cache(v, 0, 6, page_table=table)[0, 0, 1], qkv[0, 0, 2])
    assert ops.read_cache(v, 0, 6, page_table=table).count_nonzero() == 8


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_and_unaligned_equals_the_row_in_a_batch(backend, dtype, pairing):
    B, L, D = 3, 4, 32
    qkv = normal(B, L, 6, D, dtype=dtype, device=backend.device)
    rope = to(rope_1d(8, D, interleaved=pairing == "interleaved"), backend.device)
    k, v = torch.zeros(2, B, 2, L, D, dtype=dtype, device=backend.device)
    q = ops.append_(k, v, qkv, rope=rope, **weights("rms", 2, D, backend.device))
    for b in range(B):
        shifted = torch.empty(qkv[b].numel() + 1, dtype=dtype, device=backend.device)[1:].view(1, L, 6, D)
        shifted.copy_(qkv[b : b + 1])
        one = torch.zeros_like(k[:1]), torch.zeros_like(v[:1])
        alone = ops.append_(*one, shifted, rope=rope, **weights("rms", 2, D, backend.device))
        assert torch.equal(alone[0], q[b]) and torch.equal(one[0][0], k[b]) and torch.equal(one[1][0], v[b])


def test_positions_per_row_rotate_per_row(backend):
    qkv = normal(1, 3, 3, 8, device=backend.device).expand(2, 3, 3, 8)
    rope = to(rope_1d(9, 8), backend.device)
    positions = torch.tensor([[0, 1, 2], [4, 5, 6]], dtype=torch.int32, device=backend.device)
    k, v = torch.zeros(2, 2, 1, 9, 8, device=backend.device)
    q = ops.append_(k, v, qkv, positions=positions, rope=rope)
    for b, start in ((0, 0), (1, 4)):
        mine, other = torch.zeros(2, 1, 1, 9, 8, device=backend.device)
        assert torch.equal(ops.append_(mine, other, qkv[:1], start, rope=rope)[0], q[b])
        assert torch.equal(mine[0], k[b])


def test_no_table_row_and_bad_numbers_give_nan(backend):
    qkv = normal(1, 4, 3, 16, device=backend.device)
    qkv[0, 3, 0, 5] = torch.inf
    index = torch.tensor([[3, 8, -1, 0]], dtype=torch.int32, device=backend.device)
    k, v = torch.zeros(2, 1, 1, 4, 16, device=backend.device)
    q = ops.append_(k, v, qkv, rope=to(rope_1d(8, 16), backend.device), rope_index=index, norm="rms")
    assert q[0, 0, 0].isfinite().all() and k[0, 0, 0].isfinite().all()
    assert q[0, 0, 1:3].isnan().all() and k[0, 0, 1:3].isnan().all()
    assert q[0, 0, 3].isnan().any() and k[0, 0, 3].isfinite().all()
    assert torch.equal(v[0, 0], qkv[0, :, 2])


@pytest.mark.parametrize("storage", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 20, 64])
def test_codes_are_the_reference_s_to_the_bit(backend, D, dtype, storage):
    qkv = normal(2, 5, 4, D, dtype=dtype, device=backend.device)
    qkv[0, 0] = 0
    qkv[0, 1] *= 1e-3
    qkv[0, 2, :, ::2] *= 1e-4  # subnormal codes of fp8
    k, v = torch.zeros(2, 2, 1, 6, D, device=backend.device).to(storage)
    scales = torch.zeros(2, 2, 1, 6, device=backend.device)
    ops.append_(k, v, qkv, 1, k_scale=scales[0], v_scale=scales[1])
    for which, (cache, scale) in enumerate(((k, scales[0]), (v, scales[1]))):
        codes, factor = encode_vectors(qkv[:, :, 2 + which].cpu(), storage)
        assert torch.equal(scale[:, 0, 1:].cpu(), factor)
        assert torch.equal(cache[:, 0, 1:].cpu().view(torch.int8), codes.view(torch.int8))
        got = ops.read_cache(cache, 1, 6, scale=scale, dtype=dtype)
        assert torch.equal(got[:, 0].cpu(), decode_vectors(codes, factor, dtype))


@pytest.mark.parametrize("storage", CODES)
def test_the_error_of_one_byte_storage_is_bounded(backend, storage):
    """int8: half a step, amax / 254. fp8: 2^-4 of the number, and 2^-10 steps of amax / 448 near zero."""
    x = normal(3, 7, 3, 64, device=backend.device) * torch.logspace(-3, 3, 7).view(1, 7, 1, 1).to(
        backend.device
    )
    k, v = torch.zeros(2, 3, 1, 7, 64, device=backend.device).to(storage)
    scales = torch.zeros(2, 3, 1, 7, device=backend.device)
    ops.append_(k, v, x, k_scale=scales[0], v_scale=scales[1])
    got, exact = ops.read_cache(v, 0, 7, scale=scales[1])[:, 0].double(), x[:, :, 2].double()
    error, amax = (got - exact).abs(), exact.abs().amax(-1, keepdim=True)
    fp8 = torch.maximum(exact.abs() / 16, amax / 448 * 2**-10)
    bound = amax / 254 if storage == torch.int8 else fp8
    assert (error <= bound * (1 + 2**-20)).all()
    assert (error > bound / 2).any()


@pytest.mark.parametrize("storage", CODES)
def test_bad_numbers_stay_bad_in_one_byte_storage(backend, storage):
    x = normal(1, 4, 3, 16, device=backend.device)
    x[0, 1, 2, 3], x[0, 2, 2, 3], x[0, 3] = torch.nan, -torch.inf, 1e-38
    k, v = torch.zeros(2, 1, 1, 4, 16, device=backend.device).to(storage)
    scales = torch.zeros(2, 1, 1, 4, device=backend.device)
    ops.append_(k, v, x, k_scale=scales[0], v_scale=scales[1])
    got = ops.read_cache(v, 0, 4, scale=scales[1])[0, 0]
    assert got[0].isfinite().all() and not got[1].isfinite().any() and not got[2].isfinite().any()
    assert (got[3].abs() <= 2.0**-100).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [5, 16])
def test_read(backend, D, dtype):
    pages = normal(6, 2, 3, D, dtype=dtype, device=backend.device)
    table, _ = scattered(2, 3, backend.device)
    lengths = torch.tensor([5, 9], dtype=torch.int32, device=backend.device)
    whole = pages[table.long()].transpose(2, 3).flatten(1, 2).transpose(1, 2)  # [2, 2, 9, D]
    assert torch.equal(ops.read_cache(pages, 0, 9, page_table=table), whole)
    got = ops.read_cache(pages, 2, 8, page_table=table, lengths=lengths)
    assert torch.equal(got[1], whole[1, :, 2:8]) and torch.equal(got[0, :, :3], whole[0, :, 2:5])
    assert (got[0, :, 3:] == 0).all()
    assert torch.equal(ops.read_cache(pages[:2], 1, 3), pages[:2, :, 1:3])
    beyond = ops.read_cache(pages[:2], 2, 5)
    assert torch.equal(beyond[:, :, 0], pages[:2, :, 2]) and (beyond[:, :, 1:] == 0).all()
    assert ops.read_cache(pages, 4, 4, page_table=table).shape == (2, 2, 0, D)


def test_the_reference_reads_and_writes_the_same():
    table, pages = scattered(2, 3)
    qkv = normal(2, 7, 5, 8)
    stores = [[t.to(torch.int8) for t in torch.zeros(2, pages, 1, 3, 8)] for _ in "ab"]
    scales = [list(torch.zeros(2, pages, 1, 3)) for _ in "ab"]
    options = dict(page_table=table, rope=rope_1d(20, 8))
    for f, (k, v), (ks, vs) in zip((ops.append_, reference.append_), stores, scales):
        f(k, v, qkv, 1, k_scale=ks, v_scale=vs, **options)
    assert torch.equal(stores[0][1], stores[1][1]) and torch.equal(scales[0][1], scales[1][1])
    lengths = torch.tensor([6, 8], dtype=torch.int32)
    both = [
        f(stores[0][1], 1, 9, page_table=table, lengths=lengths, scale=scales[0][1], dtype=torch.bfloat16)
        for f in (ops.read_cache, reference.read_cache)
    ]
    assert torch.equal(*both) and both[0].dtype == torch.bfloat16


def test_gradients_flow_through_the_reference():
    qkv = normal(1, 3, 4, 8).requires_grad_()
    weight = torch.ones(8, requires_grad=True)
    k, v = torch.zeros(2, 1, 1, 5, 8).unbind(0)
    k, v = k.clone(), v.clone()
    positions = torch.tensor([[4, 0, 2]], dtype=torch.int32)
    q = ops.append_(k, v, qkv, positions=positions, norm="rms", q_weight=weight, rope=rope_1d(5, 8))
    (q.square().sum() * 0.5 + v.sum()).backward()
    assert (qkv.grad[:, :, 3] == 1).all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    namespace = getattr(torch.ops, namespace)
    table, pages = scattered(2, 2)
    qkv, rope = normal(2, 3, 4, 8), rope_1d(6, 8)
    k, v = (torch.zeros(pages, 1, 2, 8, dtype=torch.int8) for _ in "kv")
    scales = [torch.zeros(pages, 1, 2) for _ in "kv"]
    index = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    arguments = (k, v, *scales, qkv, 0, index, table, 2, torch.ones(8), None, 1e-6, *rope[:2], index, False)
    torch.library.opcheck(namespace.append_, arguments)
    plain = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    more = (None, None, qkv, 1, None, None, 0, None, None, 1e-6, None, None, None, True)
    torch.library.opcheck(namespace.append_, (*plain, *more))
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    torch.library.opcheck(namespace.read_cache, (k, scales[0], table, lengths, 2, 0, 4, 1))
    torch.library.opcheck(namespace.read_cache, (plain[0], None, None, None, 2, 1, 2, 0))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    rope, table = rope_1d(40, 8), torch.arange(8, dtype=torch.int32).view(2, 4)

    def step(k, v, qkv, start, length):
        q = ops.append_(k, v, qkv, start, page_table=table, rope=rope, norm="l2")
        return q * 2, ops.read_cache(k, 0, length, page_table=table)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens, start in ((6, 2), (4, 7), (9, 10)):
        qkv = normal(2, tokens, 4, 8)
        mine, other = torch.zeros(2, 8, 1, 5, 8), torch.zeros(2, 8, 1, 5, 8)
        got = compiled(*mine, qkv, start, start + tokens)
        assert all(torch.equal(a, b) for a, b in zip(got, step(*other, qkv, start, start + tokens)))
        assert torch.equal(mine, other) and mine.count_nonzero()
    assert len(graphs) == 1


def test_caches_of_more_than_2_31_elements():
    """Their shapes, under fake tensors."""
    with FakeTensorMode():
        k, v = (torch.empty(2**17, 8, 32, 128, dtype=torch.int8) for _ in "kv")
        scale = torch.empty(2**17, 8, 32)
        table = torch.empty(4, 2**15, dtype=torch.int32)
        qkv = torch.empty(4, 300, 24 + 16, 128, dtype=torch.bfloat16)
        assert k.numel() > 2**31
        q = ops.append_(k, v, qkv, 2**19, page_table=table, k_scale=scale, v_scale=scale)
        assert q.shape == (4, 24, 300, 128) and q.dtype == torch.bfloat16
        out = ops.read_cache(k, 0, 2**20, page_table=table, scale=scale, dtype=torch.float16)
        assert out.shape == (4, 8, 2**20, 128) and out.dtype == torch.float16 and out.numel() > 2**31


def test_pages_beyond_2_31_elements(backend):
    """Offsets of pages are 64-bit: the two ends of large caches, whose middle is never touched."""
    if backend.name == "emulated":
        pytest.skip("the page behind each input would copy gigabytes")
    pages, D = 2**31 // (16 * 64) + 2, 64
    k, v = (torch.empty(pages, 1, 16, D, dtype=torch.int8, device=backend.device) for _ in "kv")
    scales = [torch.empty(pages, 1, 16, device=backend.device) for _ in "kv"]
    assert k.numel() > 2**31
    table = torch.tensor([[pages - 1, 0]], dtype=torch.int32, device=backend.device)
    qkv = normal(1, 4, 3, D, device=backend.device)
    ops.append_(k, v, qkv, 14, page_table=table, k_scale=scales[0], v_scale=scales[1])
    for which, (cache, scale) in enumerate(zip((k, v), scales)):
        got = ops.read_cache(cache, 14, 18, page_table=table, scale=scale)
        want = decode_vectors(*encode_vectors(qkv[:, :, 1 + which].cpu(), torch.int8), torch.float32)
        assert torch.equal(got[:, 0].cpu(), want)


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(qkv=torch.zeros(1, 2, 16)), ValueError, r"expected qkv \[B, L, Hq \+ 2 Hkv, D\] or"),
        (dict(qkv=torch.zeros(1, 2, 4, 16)), ValueError, r"more than 4 heads in qkv .* got 4"),
        (dict(k_cache=torch.ones(1, 2, 16)), ValueError, r"expected k_cache \[pages, H, page_size, D\]"),
        (dict(v_cache=torch.ones(1, 2, 6, 16)), ValueError, r"expected v_cache of k_cache's shape"),
        (dict(positions=torch.zeros(1, 2).long()), TypeError, "expected positions of int32, got torch.int64"),
        (dict(positions=int32(2, 2)), ValueError, r"expected positions \[1 or 1, 2\], got \[2, 2\]"),
        (dict(rope_index=int32(1, 3)), ValueError, r"expected rope_index \[1 or 1, 2\], got \[1, 3\]"),
        (dict(page_table=int32(2, 4)), ValueError, r"expected page_table \[1, max_pages\], got \[2, 4\]"),
        (dict(page_table=int32(4)), ValueError, r"expected page_table \[1, max_pages\], got \[4\]"),
        (dict(norm="layer"), ValueError, "expected a norm of 'l2', 'rms' or None, got 'layer'"),
        (dict(norm="l2", q_weight=torch.ones(16)), ValueError, r"expected q_weight \[2\], got \[16\]"),
        (dict(norm="l2", k_weight=torch.ones(16)), ValueError, "expected no k_weight with norm 'l2'"),
        (dict(q_weight=torch.ones(16)), ValueError, "expected no q_weight with norm None"),
        (dict(norm="rms", k_weight=torch.ones(2)), ValueError, r"expected k_weight \[16\], got \[2\]"),
        (dict(rope=rope_1d(3, 8)), ValueError, r"expected rope.cos \[P, 8\], got \[3, 4\]"),
        (dict(k_scale=torch.ones(1, 2, 5)), ValueError, "expected k_scale with int8 or float8_e4m3fn"),
        (dict(v_cache=torch.ones(1, 2, 5, 16).to(torch.int8)), ValueError, "expected v_scale with int8"),
        (dict(start=4), ValueError, "expected positions within 0..5, got 4..6"),
    ],
)
def test_bad_input_is_refused_and_the_cache_kept(change, error, text):
    good = dict(
        k_cache=torch.ones(1, 2, 5, 16), v_cache=torch.ones(1, 2, 5, 16), qkv=torch.zeros(1, 2, 6, 16)
    )
    arguments = good | change
    with pytest.raises(error, match=text):
        ops.append_(**arguments)
    assert (arguments["k_cache"] == 1).all() and (arguments["v_cache"] == 1).all()


def test_bad_reads_are_refused():
    cache = torch.ones(1, 2, 5, 16)
    with pytest.raises(ValueError, match="expected 0 <= start <= end, got 3 and 2"):
        ops.read_cache(cache, 3, 2)
    with pytest.raises(TypeError, match=r"expected the cache's dtype torch.float32, got torch.float16"):
        ops.read_cache(cache, 0, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"expected lengths \[1\], got \[2\]"):
        ops.read_cache(cache, 0, 2, lengths=int32(2))
    with pytest.raises(TypeError, match=r"expected cache of float32, bfloat16 or float16, got torch.float64"):
        ops.read_cache(cache.double(), 0, 2)


def test_the_old_form_is_the_new_one():
    qkv = normal(2, 3, 3, 2, 16)
    k, v = torch.zeros(2, 2, 2, 3, 16)
    q = ops.append_(k, v, qkv, norm="l2", q_weight=torch.ones(2))
    for got, want in zip((q, k, v), split_qk_norm(qkv, None, True)):
        torch.testing.assert_close(got, want)
