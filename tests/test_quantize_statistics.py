"""Counts and sums per code, usage and k-means against loops written from the definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, codes, dimensions: tails of every vector, more than one block of codes and of columns
SHAPES = [(1, 1, 1), (7, 3, 2), (200, 70, 8), (33, 130, 17), (150, 16, 33), (300, 5, 64), (90, 20, 130)]


def make(rows, codes, dim, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g).to(dtype)
    return x.to(device), torch.randint(0, codes, (rows,), generator=g).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_code_statistics(backend, shape, dtype):
    x, indices = make(*shape, dtype, backend.device)
    counts, sums = ops.code_statistics(x, indices, shape[1])
    assert counts.dtype == torch.int64 and sums.dtype == torch.float32
    assert counts.tolist() == [int((indices == k).sum()) for k in range(shape[1])]
    expected = torch.zeros(shape[1], shape[2])
    for row, k in zip(x.cpu().float(), indices.tolist()):  # in row order, in float32: bit for bit
        expected[k] += row
    assert torch.equal(sums.cpu(), expected)
    assert torch.equal(reference.code_statistics(x.cpu(), indices.cpu(), shape[1])[1], expected)


def test_indices_that_are_no_code_are_left_out(backend):
    x, indices = make(100, 9, 5, device=backend.device)
    indices[::3] = -1
    indices[1::7] = 9
    indices[2] = 2**40
    counts, sums = ops.code_statistics(x, indices, 9)
    kept = (indices >= 0) & (indices < 9)
    again = ops.code_statistics(x[kept], indices[kept], 9)
    assert torch.equal(counts, again[0]) and torch.equal(sums, again[1])
    assert counts.sum() == kept.sum() < 70


def test_one_code_takes_all_rows(backend):
    x, indices = make(500, 1, 40, device=backend.device)
    counts, sums = ops.code_statistics(x, indices + 17, 33)
    assert counts[17] == 500 and counts.sum() == 500
    torch.testing.assert_close(sums[17].double(), x.double().sum(0), atol=1e-4, rtol=0)
    assert sums[:17].eq(0).all() and sums[18:].eq(0).all()


def test_a_nan_stays_in_its_code(backend):
    x, indices = make(64, 8, 3, device=backend.device)
    x[5, 1], x[9, 0] = math.nan, math.inf
    sums = ops.code_statistics(x, indices, 8)[1].cpu()
    clean = ops.code_statistics(x.nan_to_num(0, 0, 0), indices, 8)[1].cpu()
    odd = ~sums.isfinite()
    assert odd.sum() == 2 and sums[indices[5], 1].isnan() and sums[indices[9], 0].isinf()
    assert torch.equal(sums[~odd], clean[~odd])


def test_layouts(backend):
    x, indices = make(60, 7, 12, device=backend.device)
    expected = ops.code_statistics(x[::2, ::3].contiguous(), indices[::2].contiguous(), 7)
    got = ops.code_statistics(x[::2, ::3], indices[::2], 7)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    counts, sums = ops.code_statistics(x[:0], indices[:0], 7)
    assert counts.tolist() == [0] * 7 and sums.shape == (7, 12) and not sums.any()
    unaligned = torch.cat([torch.zeros(1, device=x.device), x.flatten()])[1:].view_as(x)
    assert torch.equal(ops.code_statistics(unaligned, indices, 7)[1], ops.code_statistics(x, indices, 7)[1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 200), codes=st.integers(1, 100), dim=st.integers(1, 70), seed=st.integers(0, 99))
def test_random_shapes(backend, rows, codes, dim, seed):
    x, indices = make(rows, codes, dim, device=backend.device, seed=seed)
    counts, sums = ops.code_statistics(x, indices, codes)
    expected = torch.zeros(codes, dim).index_add_(0, indices.cpu(), x.cpu())
    assert torch.equal(sums.cpu(), expected)
    assert torch.equal(counts.cpu(), indices.cpu().bincount(minlength=codes))


# --- usage ------------------------------------------------------------------------------------------------


def test_code_usage(backend):
    even = ops.code_usage(torch.arange(12, device=backend.device).view(3, 4) % 4, 16)
    assert even.fraction.item() == 0.25
    assert math.isclose(even.entropy.item(), math.log(4), rel_tol=1e-6)
    assert math.isclose(even.perplexity.item(), 4, rel_tol=1e-6)
    some = ops.code_usage(torch.tensor([0, 0, 0, 5, -1, 99], device=backend.device), 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert some.fraction.item() == 0.25 and math.isclose(some.entropy.item(), entropy, rel_tol=1e-6)
    none = ops.code_usage(torch.tensor([-1], device=backend.device), 8)
    assert none.fraction.item() == 0 and none.entropy.item() == 0 and none.perplexity.item() == 1


# --- k-means ----------------------------------------------------------------------------------------------


def lloyd64(x, centres, iterations):
    """Float64, no empty clusters expected."""
    for _ in range(iterations):
        index = torch.cdist(x, centres).argmin(-1)
        centres = torch.stack([x[index == k].mean(0) for k in range(len(centres))])
    return centres


def blobs(k=12, per=40, dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    middles = torch.randn(k, dim, generator=g) * 10
    x = (middles[:, None] + torch.randn(k, per, dim, generator=g)).flatten(0, 1)
    return x[torch.randperm(k * per, generator=g)], middles


def test_kmeans_follows_lloyd(backend):
    x, middles = blobs()
    got = ops.kmeans(x.to(backend.device), 12, 5, init=middles.to(backend.device))
    expected = lloyd64(x.double(), middles.double(), 5)
    torch.testing.assert_close(got.centres.cpu(), expected.float())
    assert got.counts.sum() == len(x) and got.centres.dtype == torch.float32


def test_kmeans_from_rows_lowers_the_error(backend):
    x, _ = blobs(k=30, per=20)
    x = x.to(backend.device)
    got = ops.kmeans(x, 30, 15, seed=3)
    error = got.error.tolist()
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(error)) and error[-1] < error[0] / 2
    assert (got.counts > 0).all() and got.counts.sum() == len(x)
    again = ops.kmeans(x, 30, 15, seed=3)
    assert torch.equal(again.centres, got.centres) and torch.equal(again.error, got.error)
    assert not torch.equal(ops.kmeans(x, 30, 1, seed=4).centres, ops.kmeans(x, 30, 1, seed=3).centres)
    final = (x.double() - got.centres.double()[ops.nearest_code(x, got.centres)]).square().sum(-1).mean()
    assert final <= error[-1] * (1 + 1e-6)


def test_kmeans_starts_from_different_rows():
    x = torch.arange(50.0)[:, None]
    centres = ops.kmeans(x, 50, 0, seed=1).centres
    assert torch.equal(centres.sort(0).values, x) and not torch.equal(centres, x)


def test_kmeans_ends_when_nothing_changes():
    x, middles = blobs()
    got = ops.kmeans(x, 12, 100, init=middles)
    assert len(got.error) < 10
    more = ops.kmeans(x, 12, 1, init=got.centres)
    torch.testing.assert_close(more.centres, got.centres)


def test_empty_clusters_move_to_the_farthest_rows(backend):
    # Three rows near 0, two far away; all centres but one see no row.
    x = torch.tensor([[0.0], [0.2], [-0.1], [50.0], [70.0]], device=backend.device)
    init = torch.tensor([[0.0], [1000.0], [2000.0]], device=backend.device)
    first = ops.kmeans(x, 3, 1, init=init)
    # 70 is the farthest row, then 50: they found the two clusters, the rest keep theirs.
    expected = torch.tensor([[0.1 / 3], [70.0], [50.0]])
    torch.testing.assert_close(first.centres.cpu(), expected, atol=1e-5, rtol=0)
    assert first.counts.tolist() == [3, 1, 1]
    kept = ops.kmeans(x, 3, 1, init=init, empty="keep")
    assert kept.centres[1:].flatten().tolist() == [1000.0, 2000.0] and kept.counts.tolist() == [5, 0, 0]


def test_more_clusters_than_distinct_rows():
    x = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    got = ops.kmeans(x, 4, 10)
    assert got.counts.sum() == 4 and sorted(set(got.centres.flatten().tolist())) == [1.0, 2.0]
    assert got.error[-1] == 0


def test_kmeans_relocates_where_random_rows_leave_clusters_empty():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=g).repeat(3, 1)  # every row thrice: equal starting rows are likely
    got = ops.kmeans(x, 350, 10, seed=0)
    assert (got.counts > 0).all()
    keep = ops.kmeans(x, 350, 10, seed=0, empty="keep")
    assert (keep.counts == 0).any() and got.error[-1] < keep.error[-1]


def test_kmeans_by_angle(backend):
    x, middles = blobs()
    x, start = x.to(backend.device), middles.to(backend.device)
    got = ops.kmeans(x, 12, 8, metric="cosine", init=start)
    torch.testing.assert_close(got.centres.norm(dim=-1), torch.ones(12, device=x.device))
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    index = ops.nearest_code(x, got.centres, "cosine")
    for k in range(12):
        mean = torch.nn.functional.normalize(unit[index == k].mean(0), dim=-1)
        assert (mean.float() - got.centres[k]).abs().max() < 1e-5  # a fixed point


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_dtypes_match_the_reference(backend, dtype):
    x = blobs()[0].to(dtype)
    got = ops.kmeans(x.to(backend.device), 20, 6, seed=5)
    expected = reference.kmeans(x, 20, 6, seed=5)
    torch.testing.assert_close(got.centres.cpu(), expected.centres, atol=1e-4, rtol=1e-4)


# --- registration and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    x, indices = make(9, 4, 6)
    torch.library.opcheck(getattr(torch.ops, namespace).code_statistics, (x, indices, 4))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, indices):
        return (*ops.code_statistics(x, indices, 11), *ops.code_usage(indices, 11))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 9):
        x, indices = make(rows, 11, 12)
        for got, expected in zip(compiled(x, indices), step(x, indices)):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


X, INDEX = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.code_statistics(X[0], INDEX, 2), ValueError, r"expected x \[N, D\].*, got \[3\]"),
        (lambda: ops.code_statistics(X.int(), INDEX, 2), TypeError, "expected x of float32"),
        (lambda: ops.code_statistics(X, INDEX.int(), 2), TypeError, "expected indices to be an int64 tensor"),
        (lambda: ops.code_statistics(X, INDEX[:4], 2), ValueError, r"expected indices \[5\], got \[4\]"),
        (lambda: ops.code_statistics(X, INDEX.to("meta"), 2), ValueError, "on x's device cpu, got meta"),
        (lambda: ops.code_statistics(X, INDEX, 0), ValueError, "expected K >= 1 codes, got 0"),
        (lambda: ops.code_usage(X, 4), TypeError, "expected indices to be an int64 tensor"),
        (lambda: ops.kmeans(X, 6), ValueError, "expected k of 1 to the number of rows, 5, got 6"),
        (lambda: ops.kmeans(X, 0), ValueError, "expected k of 1 to the number of rows, 5, got 0"),
        (lambda: ops.kmeans(X, 2, -1), ValueError, "expected rows and iterations >= 0"),
        (lambda: ops.kmeans(X, 2, metric="dot"), ValueError, "expected a metric of l2, cosine, got 'dot'"),
        (lambda: ops.kmeans(X, 2, empty="split"), ValueError, "expected empty of relocate, keep"),
        (lambda: ops.kmeans(X, 2, init=X), ValueError, r"expected init \[2, 3\], got \[5, 3\]"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
