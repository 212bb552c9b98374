"""The k nearest codes, allowed subsets, dual codebooks and residual depth, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from test_quantize import DTYPES, METRICS, assert_nearest, make, scores

NAN, INF = float("nan"), float("inf")


def assert_k_nearest(values, indices, x, codebook, k, metric) -> int:
    """The k lowest scores in order, rounding aside, with the values that belong to them.

    Counts the places that differ from the exact order, all of which must be within rounding.
    """
    exact, error = scores(x, codebook, metric)
    values, indices = values.cpu().double(), indices.cpu()
    assert values.shape == indices.shape == (len(x), k) and indices.dtype == torch.int64
    if len(x) == 0:
        return 0
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an index twice"
    best = exact.sort(dim=-1, stable=True)
    got, band = exact.gather(-1, indices), error.gather(-1, indices) + error.gather(-1, best.indices[:, :k])
    assert ((got - best.values[:, :k]).abs() <= band).all(), "beyond rounding from the k nearest"
    rows = x.detach().cpu().double()
    squares = rows.square().sum(-1, keepdim=True)
    near = {"l2": 2 * got + squares, "dot": -got, "cosine": -got / squares.sqrt()}[metric]
    # twice the score's error and that of x . x; for the cosine the division's, relative to a value below 1
    allowed = error.gather(-1, indices)
    if metric == "l2":
        allowed = 2 * allowed + (x.shape[1] + 2) * 2.0**-23 * squares
    elif metric == "cosine":
        allowed = allowed / squares.sqrt() + (x.shape[1] + 4) * 2.0**-23
    assert ((values - near).abs() <= allowed + 2.0**-22 * near.abs()).all()
    step = values.diff(dim=-1)
    assert (step >= 0).all() if metric == "l2" else (step <= 0).all()
    return int((indices != best.indices[:, :k]).sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, codes, dim, k",
    [(1, 1, 1, 1), (7, 33, 4, 33), (65, 330, 7, 5), (13, 700, 8, 128), (9, 140, 33, 64)],
)
def test_nearest_codes(backend, rows, codes, dim, k, dtype, metric):
    x, codebook = make(rows, codes, dim, dtype, backend.device)
    values, indices = ops.nearest_codes(x, codebook, k, metric)
    moved = assert_k_nearest(values, indices, x, codebook, k, metric)
    assert moved <= rows * k // 20, f"{moved} of {rows * k} places differ from the exact order"
    assert torch.equal(indices[:, 0], ops.nearest_code(x, codebook, metric))


def test_large_codebooks_and_the_split_over_codes(backend):
    for rows, codes, dim, k in [(3, 16384, 8, 128), (70, 4096, 32, 10)]:
        x, codebook = make(rows, codes, dim, device=backend.device)
        values, indices = ops.nearest_codes(x, codebook, k)
        assert assert_k_nearest(values, indices, x, codebook, k, "l2") <= rows * k // 20


def test_integers_have_exact_ties_in_the_order_of_the_indices(backend):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (70, 4), generator=g).float()
    codebook = torch.randint(-2, 3, (300, 4), generator=g).float()
    for k in (1, 60, 128):
        values, indices = ops.nearest_codes(x.to(backend.device), codebook.to(backend.device), k)
        exact = torch.cdist(x.double(), codebook.double()).square().round().sort(dim=-1, stable=True)
        assert torch.equal(indices.cpu(), exact.indices[:, :k])
        assert torch.equal(values.cpu().double(), exact.values[:, :k])


@pytest.mark.parametrize("order", ["far to near", "near to far"])
def test_codes_sorted_by_distance(backend, order):
    # Every code beats all before it, or none does: the lists overflow as often as they can.
    x = torch.zeros(20, 1, device=backend.device)
    codebook = torch.arange(1.0, 901.0, device=backend.device)[:, None]
    codebook = codebook if order == "near to far" else codebook.flip(0)
    values, indices = ops.nearest_codes(x, codebook, 100)
    assert torch.equal(values.cpu(), torch.arange(1.0, 101.0).square().expand(20, 100))
    ascending = torch.arange(100) if order == "near to far" else torch.arange(899, 799, -1)
    assert torch.equal(indices.cpu(), ascending.expand(20, 100))


@pytest.mark.parametrize("dim", [3, 8, 40])
def test_a_row_of_the_k_nearest_does_not_depend_on_the_batch(backend, dim):
    x, codebook = make(100, 300, dim, device=backend.device)
    codebook = torch.cat([codebook, codebook + 1e-7])
    values, indices = ops.nearest_codes(x, codebook, 20)
    for rows in (slice(0, 1), slice(3, 7), slice(50, 100)):
        alone = ops.nearest_codes(x[rows], codebook, 20)
        assert torch.equal(alone[0], values[rows]) and torch.equal(alone[1], indices[rows])


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity_come_last(backend, metric):
    x, codebook = make(12, 50, 8, device=backend.device)
    codebook[7] = NAN
    codebook[3, 1] = NAN
    x[5, 3] = NAN
    values, indices = ops.nearest_codes(x, codebook, 50, metric)
    worst = INF if metric == "l2" else -INF
    assert torch.equal(indices[5].cpu(), torch.arange(50)) and values[5].eq(worst).all()
    others = torch.arange(12) != 5
    assert torch.equal(indices.cpu()[others, -2:], torch.tensor([3, 7]).expand(11, 2))
    assert values.cpu()[others, -2:].eq(worst).all() and values.cpu()[others, :-2].isfinite().all()
    expected = reference.nearest_codes(x.cpu(), codebook.cpu(), 50, metric)
    assert torch.equal(values.cpu() == worst, expected[0] == worst)


def test_k_nearest_non_contiguous_and_empty(backend):
    x, codebook = make(24, 60, 16, device=backend.device)
    expected = ops.nearest_codes(x[::2, ::2].contiguous(), codebook[::3, ::2].contiguous(), 4)
    got = ops.nearest_codes(x[::2, ::2], codebook[::3, ::2], 4)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    values, indices = ops.nearest_codes(x[:0], codebook, 3)
    assert values.shape == indices.shape == (0, 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    codes=st.integers(1, 300),
    dim=st.integers(1, 40),
    k=st.integers(1, 128),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 99),
)
def test_random_shapes_of_the_k_nearest(backend, rows, codes, dim, k, metric, seed):
    x, codebook = make(rows, codes, dim, device=backend.device, seed=seed)
    k = min(k, codes)
    assert_k_nearest(*ops.nearest_codes(x, codebook, k, metric), x, codebook, k, metric)


def _emulated_or_skip():
    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))


def test_k_nearest_are_the_same_bits_wherever_multiply_add_is_fused():
    _emulated_or_skip()
    x, codebook = make(64, 100, 24)
    codebook = torch.cat([codebook, codebook + 1e-7, codebook - 1e-7])
    for metric in METRICS:
        with _library.emulated_cuda():
            expected = ops.nearest_codes(x, codebook, 30, metric)
        before = _library.simd_level()
        for level in _library.simd_levels():
            if level == "scalar":
                continue
            _library.set_simd_level(level)
            got = ops.nearest_codes(x, codebook, 30, metric)
            _library.set_simd_level(before)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), (level, metric)


# --- allowed subsets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_allowed_codes_are_a_search_of_their_own(backend, dtype, metric):
    x, codebook = make(70, 400, 12, dtype, backend.device)
    for share in (0.02, 0.5, 1.0):
        allowed = torch.rand(400, generator=torch.Generator().manual_seed(3)) < share
        ids = allowed.nonzero()[:, 0].to(backend.device)
        got = ops.nearest_code(x, codebook, metric, allowed=allowed.to(backend.device))
        assert torch.equal(got, ids[ops.nearest_code(x, codebook[ids], metric)])


def test_groups_of_rows_have_sets_of_their_own(backend):
    x, codebook = make(5 * 66, 300, 8, device=backend.device)
    allowed = torch.rand(5, 300, generator=torch.Generator().manual_seed(3)) < 0.5
    allowed = allowed.to(backend.device)
    got = ops.nearest_code(x, codebook, allowed=allowed)
    for group, own in enumerate(allowed):
        rows = slice(66 * group, 66 * (group + 1))
        assert torch.equal(got[rows], ops.nearest_code(x[rows], codebook, allowed=own))
    assert torch.equal(got.cpu(), reference.nearest_code(x.cpu(), codebook.cpu(), "l2", allowed.cpu()))
    assert torch.equal(
        ops.nearest_code(x, codebook, allowed=allowed[:1]), ops.nearest_code(x, codebook, allowed=allowed[0])
    )


def test_a_large_codebook_with_an_allowed_set_is_split(backend):
    x, codebook = make(6, 4096, 8, device=backend.device)
    allowed = torch.rand(2, 4096, generator=torch.Generator().manual_seed(3)) < 0.3
    got = ops.nearest_code(x, codebook, allowed=allowed.to(backend.device))
    for group in range(2):
        ids = allowed[group].nonzero()[:, 0].to(backend.device)
        rows = slice(3 * group, 3 * group + 3)
        assert_nearest(ops.nearest_code(x[rows], codebook[ids]), x[rows], codebook[ids], "l2")
        assert torch.equal(got[rows], ids[ops.nearest_code(x[rows], codebook[ids])])


@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_a_winner_among_the_allowed(backend, metric):
    x, codebook = make(8, 50, 8, device=backend.device)
    x[2] = NAN
    allowed = torch.zeros(2, 50, dtype=torch.bool, device=backend.device)
    allowed[0, 20:30] = True
    got = ops.nearest_code(x, codebook, metric, allowed=allowed)
    assert got[2] == 20 and ((got[:4] >= 20) & (got[:4] < 30)).all()
    assert got[4:].eq(-1).all()
    codebook[20:30] = NAN
    assert ops.nearest_code(x, codebook, metric, allowed=allowed[0]).eq(20).all()
    assert torch.equal(got.cpu(), reference.nearest_code(x.cpu(), make(8, 50, 8)[1], metric, allowed.cpu()))


# --- dual codebooks and residual depth --------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_concatenation_is_the_sum_of_two_distances(backend, weight, dtype):
    a, codebook_a = make(60, 500, 32, dtype, backend.device)
    b, codebook_b = make(60, 500, 8, dtype, backend.device, seed=1)
    a, b, codebook_a, codebook_b = (
        torch.nn.functional.normalize(t, dim=-1) for t in (a, b, codebook_a, codebook_b)
    )
    got = ops.nearest_code_dual(a, b, codebook_a, codebook_b, weight).cpu()
    score_a, error_a = scores(a, codebook_a, "l2")
    score_b, error_b = scores(b, codebook_b, "l2")
    exact = score_a + weight * score_b
    best, rows = exact.argmin(-1), torch.arange(60)
    # the rounding of the root (once each for row and code) and of the longer chain
    error = 2 * (error_a + weight * error_b) + 4 * 2.0**-24 * weight
    assert (exact[rows, got] - exact[rows, best] <= error[rows, got] + error[rows, best]).all()
    assert (got != best).sum() <= (0 if dtype == torch.float32 else 2)
    assert (reference.nearest_code_dual(a, b, codebook_a, codebook_b, weight).cpu() == best).sum() >= 58


def test_dual_with_mixed_dtypes():
    a, codebook_a = make(20, 90, 6)
    b, codebook_b = make(20, 90, 3, seed=1)
    half = ops.nearest_code_dual(a, b.half(), codebook_a, codebook_b.half())
    assert torch.equal(
        half, ops.nearest_code_dual(a, b.half().float(), codebook_a, codebook_b.half().float())
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_depth(backend, dtype):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 12, generator=g).to(dtype)
    # Every depth has smaller codes, as trained ones have.
    codebooks = (torch.randn(4, 80, 12, generator=g) * 0.5 ** torch.arange(4)[:, None, None]).to(dtype)
    indices, quantized = ops.residual_nearest_code(x.to(backend.device), codebooks.to(backend.device))
    assert indices.shape == (50, 4) and quantized.dtype == dtype
    residual = x.float()
    total = torch.zeros_like(residual)
    for depth, codebook in enumerate(codebooks.float()):
        chosen = codebook[indices.cpu()[:, depth]]
        assert assert_nearest(indices[:, depth], residual, codebook, "l2") <= (
            0 if dtype == torch.float32 else 3
        )
        residual, total = residual - chosen, total + chosen
    assert torch.equal(quantized.cpu(), total.to(dtype))
    by_reference = reference.residual_nearest_code(x, codebooks)
    assert (by_reference[0] != indices.cpu()).float().mean() <= 0.01
    alone = ops.residual_nearest_code(x[7:9].to(backend.device), codebooks.to(backend.device))
    assert torch.equal(alone[0], indices[7:9]) and torch.equal(alone[1], quantized[7:9])


@pytest.mark.parametrize("rows, count, dim", [(5, 300, 12), (70, 70, 40), (3, 260, 130), (2, 9, 5)])
def test_residual_depth_is_a_loop_of_nearest_codes(backend, rows, count, dim):
    """Bit for bit; few rows of a codebook in parts, and rows that a block keeps through all depths."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, dim, generator=g).to(backend.device)
    codebooks = torch.randn(3, count, dim, generator=g).to(backend.device)
    x[1, 1] = NAN
    indices, quantized = ops.residual_nearest_code(x, codebooks)
    residual, total = x.clone(), None
    for depth, codebook in enumerate(codebooks):
        index = ops.nearest_code(residual, codebook)
        assert torch.equal(indices[:, depth], index)
        residual = residual - codebook[index]
        total = codebook[index] if total is None else total + codebook[index]
    assert torch.equal(quantized, total) and indices[1].eq(0).all()


def test_more_depths_than_the_kernel_takes():
    x, codebook = make(4, 5, 3)
    books = codebook[None].repeat(70, 1, 1)
    indices, quantized = ops.residual_nearest_code(x, books)
    few, _ = ops.residual_nearest_code(x, books[:64])
    assert indices.shape == (4, 70) and torch.equal(indices[:, :64], few) and quantized.shape == x.shape


def test_one_depth_is_quantize_and_the_gradient_passes_straight_through():
    x, codebook = make(30, 40, 8)
    x.requires_grad_()
    _, quantized = ops.residual_nearest_code(x, codebook[None])
    assert torch.equal(quantized.detach(), ops.quantize(x.detach(), codebook)[0])
    slope = torch.randn(30, 8)
    quantized.backward(slope)
    assert torch.equal(x.grad, slope)
    y = x.detach().clone().requires_grad_()
    reference.residual_nearest_code(y, codebook[None])[1].backward(slope)
    assert torch.equal(y.grad, slope)
    assert ops.residual_nearest_code(x[:0], codebook[None])[1].shape == (0, 8)


# --- operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        _emulated_or_skip()
    packet = getattr(torch.ops, namespace)
    x, codebook = make(10, 20, 8)
    torch.library.opcheck(packet.nearest_codes, (x, codebook, 3, 0))
    torch.library.opcheck(packet.residual_codes, (x, [codebook[:10], codebook[10:]]))
    torch.library.opcheck(packet.nearest_code, (x, codebook, 1, torch.ones(2, 20, dtype=torch.bool)))


def test_searches_compile_without_graph_breaks_and_without_recompiling():
    _, codebook = make(1, 50, 8)
    allowed = torch.arange(50) % 3 == 0
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def search(x):
        values, indices = ops.nearest_codes(x, codebook, 5, "cosine")
        dual = ops.nearest_code_dual(x, x[:, :3], codebook, codebook[:, :3], 0.5)
        return (
            values,
            indices,
            dual,
            ops.nearest_code(x, codebook, allowed=allowed),
            *ops.residual_nearest_code(x, codebook.view(2, 25, 8)),
        )

    step = torch.compile(search, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 9):
        x, _ = make(rows, 1, 8)
        for got, expected in zip(step(x), search(x), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda x, c: ops.nearest_codes(x, c, 0),
            ValueError,
            r"expected k in \[1, 9\] \(at most K and 128\), got 0",
        ),
        (lambda x, c: ops.nearest_codes(x, c, 10), ValueError, r"expected k in \[1, 9\]"),
        (lambda x, c: ops.nearest_codes(x, c.repeat(30, 1), 129), ValueError, r"expected k in \[1, 128\]"),
        (lambda x, c: ops.nearest_codes(x[0], c, 1), ValueError, r"expected x \[N, 4\], got \[4\]"),
        (lambda x, c: ops.nearest_codes(x.int(), c, 1), TypeError, "expected x of float32"),
        (lambda x, c: ops.nearest_codes(x, c, 1, "l1"), ValueError, "expected a metric of"),
        (
            lambda x, c: ops.nearest_code(x, c, allowed=torch.ones(9)),
            TypeError,
            "a bool tensor, got torch.float32",
        ),
        (
            lambda x, c: ops.nearest_code(x, c, allowed=torch.ones(8, dtype=torch.bool)),
            ValueError,
            r"expected allowed \[9\] or \[B, 9\], got \[8\]",
        ),
        (
            lambda x, c: ops.nearest_code(x, c, allowed=torch.ones(4, 9, dtype=torch.bool)),
            ValueError,
            r"B a divisor of the 6 rows, got \[4, 9\]",
        ),
        (
            lambda x, c: ops.nearest_code_dual(x, x[:5], c, c),
            ValueError,
            "expected a and b of as many rows",
        ),
        (
            lambda x, c: ops.nearest_code_dual(x, x, c, c, -1.0),
            ValueError,
            "expected a finite weight >= 0, got -1",
        ),
        (
            lambda x, c: ops.nearest_code_dual(x, x, c, c[:, :3]),
            ValueError,
            r"expected b \[N, 3\], got \[6, 4\]",
        ),
        (lambda x, c: ops.residual_nearest_code(x, c), ValueError, r"expected codebooks \[Q, K, D\]"),
        (
            lambda x, c: ops.residual_nearest_code(x, c[None, :, :3]),
            ValueError,
            r"expected x \[N, 3\], got \[6, 4\]",
        ),
        (
            lambda x, c: ops.residual_nearest_code(x, [c]),
            TypeError,
            "expected codebooks to be a tensor, got list",
        ),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.zeros(6, 4), torch.zeros(9, 4))
