"""Cached attention over one-byte caches: the attention of the values that `read_cache` multiplies out."""

from __future__ import annotations

import pytest
import torch

from arimg import _library, ops, reference
from test_attention import DTYPES, make
from test_attention_cached import cache
from tolerance import assert_close

CODES = [torch.int8, torch.float8_e4m3fn]


def coded(B, H, capacity, D, dtype, device, page_size=None, seed=5):
    """A full one-byte cache, contiguous or in shuffled pages: (options of cached_attention)."""
    qkv = torch.randn(B, capacity, 3 * H, D, generator=torch.Generator().manual_seed(seed))
    rows, size, table = B, capacity, None
    if page_size is not None:
        per_row = -(-capacity // page_size)
        rows, size = B * per_row + 2, page_size
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        table = order[: B * per_row].view(B, per_row).to(torch.int32)
    k, v = (torch.zeros(rows, H, size, D).to(dtype) for _ in "kv")
    k_scale, v_scale = (torch.full((rows, H, size), float("nan")) for _ in "kv")
    reference.append_(k, v, qkv, 0, page_table=table, k_scale=k_scale, v_scale=v_scale)
    given = dict(k_cache=k, v_cache=v, page_table=table, k_scale=k_scale, v_scale=v_scale)
    return {name: t.to(device) for name, t in given.items() if t is not None}


def dense(given, end, dtype):
    """Keys and values as the oracle reads them."""
    given = {name: t.cpu() for name, t in given.items()}
    return [
        reference.read_cache(
            given[f"{x}_cache"], 0, end, page_table=given.get("page_table"), scale=given[f"{x}_scale"],
            dtype=dtype,
        )
        for x in "kv"
    ]  # fmt: skip


def against_dense(got, q, given, end, length, **options):
    k, v = dense(given, end, torch.float32)

    def formula(q, k, v):
        return reference.cached_attention(q, k.to(q.dtype), v.to(q.dtype), length, **options)

    assert_close(got, formula, q, k, v)


@pytest.mark.parametrize("storage", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "Lq, H, Hkv, D",
    [(1, 4, 4, 64), (1, 8, 2, 32), (3, 4, 1, 80), (20, 2, 2, 64), (7, 2, 1, 24), (1, 2, 2, 256)],
)
def test_ragged_lengths_contiguous_and_paged(backend, Lq, H, Hkv, D, dtype, storage):
    B, capacity = 3, 50
    lengths = torch.tensor([0, 50, 17], dtype=torch.int32)
    q = make(B, H, Lq, D, dtype, backend.device)[0]
    given = coded(B, Hkv, capacity, D, storage, backend.device)
    for b, n in enumerate(lengths.tolist()):  # what lies beyond a length is never read
        given["k_scale"][b, :, n:] = given["v_scale"][b, :, n:] = float("nan")
    got = ops.cached_attention(q, length=lengths.to(backend.device), **given)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous() and (got[0] == 0).all()
    against_dense(got, q, given, capacity, lengths)
    in_pages = coded(B, Hkv, capacity, D, storage, backend.device, page_size=16)
    again = ops.cached_attention(q, length=lengths.to(backend.device), **in_pages)
    assert torch.equal(again, got)
    for b in (1, 2):  # a row alone
        row = {name: t[b : b + 1] for name, t in given.items()}
        alone = ops.cached_attention(q[b : b + 1], length=int(lengths[b]), **row)
        assert torch.equal(alone, got[b : b + 1])


@pytest.mark.parametrize("storage", CODES)
def test_every_code(backend, storage):
    """All bytes as values, each read alone by a query that sees one key."""
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 1, 1, 16).view(storage)
    bytes_ = bytes_.to(backend.device)
    scale = torch.full((16, 1, 1), 0.75, device=backend.device)
    q = torch.zeros(16, 1, 1, 16, device=backend.device)
    got = ops.cached_attention(q, bytes_, bytes_, 1, k_scale=scale, v_scale=scale)
    assert torch.equal(got, ops.read_cache(bytes_, 0, 1, scale=scale))


@pytest.mark.parametrize("storage", CODES)
@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("Lq", [1, 5, 19])
def test_peek(backend, Lq, page_size, storage):
    """New keys, in q's dtype, behind one-byte ones."""
    B, H, Hkv, D, dtype = 2, 4, 2, 32, torch.bfloat16
    lengths = torch.tensor([13, 0], dtype=torch.int32)
    q = make(B, H, Lq, D, dtype, backend.device)[0]
    given = coded(B, Hkv, 20, D, storage, backend.device, page_size)
    k_new, v_new = cache(B, Hkv, Lq + 2, D, dtype, backend.device, seed=8)
    rule = ops.causal_intervals(Lq, Lq + 2)
    got = ops.cached_attention(
        q, length=lengths.to(backend.device), k_new=k_new, v_new=v_new,
        new_intervals=tuple(t.to(backend.device) for t in rule), **given,
    )  # fmt: skip
    k, v = dense(given, 20, torch.float32)

    def formula(q, k, v, k_new, v_new):
        k, v = k.to(q.dtype), v.to(q.dtype)
        return reference.cached_attention(q, k, v, lengths, k_new=k_new, v_new=v_new, new_intervals=rule)

    assert_close(got, formula, q, k, v, k_new, v_new)


@pytest.mark.parametrize("storage", CODES)
def test_long_caches_are_split_over_keys(backend, storage):
    capacity = 1300 if backend.name != "emulated" else 520
    lengths = torch.tensor([capacity, 100], dtype=torch.int32)
    q = make(2, 4, 1, 64, device=backend.device)[0]
    given = coded(2, 2, capacity, 64, storage, backend.device, page_size=64)
    k_new, v_new = cache(2, 2, 3, 64, torch.float32, backend.device)
    got = ops.cached_attention(q, length=lengths.to(backend.device), k_new=k_new, v_new=v_new, **given)
    k, v = dense(given, capacity, torch.float32)

    def formula(q, k, v, k_new, v_new):
        return reference.cached_attention(q, k, v, lengths, k_new=k_new, v_new=v_new)

    assert_close(got, formula, q, k, v, k_new, v_new)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("Lq", [1, 20])
def test_a_key_that_is_none_is_seen(backend, Lq, bad):
    q = make(2, 2, Lq, 16, device=backend.device)[0]
    given = coded(2, 2, 9, 16, torch.int8, backend.device)
    given["k_scale"][1, 0, 3] = bad
    got = ops.cached_attention(q, length=9, **given)
    assert got[0].isfinite().all() and got[1, 0].isnan().all() and got[1, 1].isfinite().all()


def test_gradients_come_from_the_reference():
    q = make(1, 2, 3, 16)[0].requires_grad_()
    given = coded(1, 1, 9, 16, torch.int8, "cpu")
    out = ops.cached_attention(q, length=7, **given)
    out.sum().backward()
    assert q.grad is not None
    assert (out - ops.cached_attention(q.detach(), length=7, **given)).abs().max() < 1e-5


@pytest.mark.parametrize("storage", CODES)
@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace, storage):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    q, lengths = make(1, 2, 3, 16)[0], torch.tensor([5], dtype=torch.int32)
    given = coded(1, 1, 12, 16, storage, "cpu", page_size=4)
    args = q, given["k_cache"], given["v_cache"], -1, lengths, given["page_table"], *[None] * 5, 0.25
    op = getattr(torch.ops, namespace).cached_attention
    # torch's own check of the schema multiplies all tensors, which float8 cannot
    tests = (
        "test_faketensor",
        "test_aot_dispatch_dynamic",
        *(["test_schema"] if storage == torch.int8 else []),
    )
    torch.library.opcheck(op, (*args, given["k_scale"], given["v_scale"]), test_utils=tests)


def test_compiles_without_graph_breaks():
    step = torch.compile(
        lambda q, n, given: ops.cached_attention(q, length=n, **given) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    q = make(2, 2, 1, 16)[0]
    given = coded(2, 2, 12, 16, torch.int8, "cpu", page_size=4)
    assert torch.equal(step(q, 9, given), ops.cached_attention(q, length=9, **given) + 1)


K, S = torch.zeros(2, 3, 9, 16, dtype=torch.int8), torch.ones(2, 3, 9)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(k_scale=None), ValueError, "expected k_scale with int8 or float8_e4m3fn storage"),
        (dict(v_scale=None), ValueError, "expected v_scale with int8 or float8_e4m3fn storage"),
        (dict(k_scale=S.double()), TypeError, "expected k_scale of float32, got torch.float64"),
        (
            dict(v_scale=S[:, :2]),
            ValueError,
            r"expected contiguous v_scale \[2, 3, 9\] on cpu, got \[2, 2, 9\]",
        ),
        (dict(v_cache=K.float()), TypeError, "expected v_cache of k_cache's dtype torch.int8"),
        (dict(k_cache=K.float(), v_cache=K.float()), ValueError, "expected scales only with int8"),
        (dict(k_cache=K.to(torch.uint8)), TypeError, "expected k_cache of q's dtype torch.float32"),
    ],
)
def test_bad_scales_are_refused(change, error, text):
    good = dict(q=torch.zeros(2, 3, 2, 16), k_cache=K, v_cache=K, length=4, k_scale=S, v_scale=S)
    with pytest.raises(error, match=text):
        ops.cached_attention(**(good | change))
