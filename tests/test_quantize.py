"""Nearest codes against a float64 oracle; lookup and straight-through quantisation against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = ["l2", "cosine", "dot"]
# rows, codes, dimensions: tails of every tile, every specialised dimension, more than one block of codes
SHAPES = [
    (1, 1, 1),
    (5, 3, 2),
    (7, 33, 4),
    (65, 130, 7),
    (13, 700, 8),
    (20, 257, 16),
    (64, 64, 32),
    (9, 100, 33),
    (6, 40, 64),
    (3, 50, 256),
]


def make(rows, codes, dim, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g).to(dtype)
    return x.to(device), torch.randn(codes, dim, generator=g).to(dtype).to(device)


def scores(x, codebook, metric):
    """Lower is nearer, in float64, and the largest rounding error that float32 arithmetic may add to each."""
    x, codes = x.detach().cpu().double(), codebook.detach().cpu().double()
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1)
    offset = 0.5 * codes.square().sum(-1) if metric == "l2" else codes.new_zeros(len(codes))
    terms = offset + x.abs() @ codes.abs().T  # sum of the magnitudes of what is added up
    return offset - x @ codes.T, (codes.shape[1] + 4) * 2.0**-24 * terms


def assert_nearest(index, x, codebook, metric) -> int:
    """Each index is the lowest score's, or one whose score is the same within rounding; counts the latter."""
    exact, error = scores(x, codebook, metric)
    index = index.cpu()
    assert index.dtype == torch.int64 and index.shape == (len(x),)
    if len(x) == 0:
        return 0
    best = exact.argmin(-1)
    rows = torch.arange(len(x))
    gap = exact[rows, index] - exact[rows, best]
    band = error[rows, index] + error[rows, best]
    assert (gap <= band).all(), f"{int((gap > band).sum())} rows are beyond rounding from their nearest code"
    return int((index != best).sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_code(backend, shape, dtype, metric):
    x, codebook = make(*shape, dtype, backend.device)
    flips = assert_nearest(ops.nearest_code(x, codebook, metric), x, codebook, metric)
    assert flips <= len(x) // 4 if dtype != torch.float32 else flips == 0


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_x_and_codebook_may_differ_in_dtype(backend, pair):
    x, codebook = make(30, 90, 12, device=backend.device)
    x, codebook = x.to(pair[0]), codebook.to(pair[1])
    got = ops.nearest_code(x, codebook)
    assert torch.equal(got, ops.nearest_code(x.float(), codebook.float()))


def test_large_codebooks_and_the_split_over_codes(backend):
    # 16384 codes: many blocks per chunk on the CPU, several parts of the codebook on the GPU.
    for rows, codes, dim in [(3, 16384, 8), (70, 4096, 32)]:
        x, codebook = make(rows, codes, dim, device=backend.device)
        assert assert_nearest(ops.nearest_code(x, codebook), x, codebook, "l2") == 0


@pytest.mark.parametrize("metric", METRICS)
def test_equal_codes_give_the_lowest_index(backend, metric):
    x, codebook = make(40, 20, 8, device=backend.device)
    many = codebook.repeat(30, 1)
    got = ops.nearest_code(x, many, metric)
    assert (got < 20).all()
    assert_nearest(got, x, codebook, metric)
    same = torch.ones(500, 8, device=backend.device)
    assert ops.nearest_code(x, same, metric).eq(0).all()


def test_integers_have_exact_ties_that_go_to_the_lowest_index(backend):
    # Small integers are exact in float32: every tie is a true one, so the whole result must be equal.
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (200, 4), generator=g).float()
    codebook = torch.randint(-2, 3, (300, 4), generator=g).float()
    for metric in ("l2", "dot"):
        exact, _ = scores(x, codebook, metric)
        got = ops.nearest_code(x.to(backend.device), codebook.to(backend.device), metric)
        assert torch.equal(got.cpu(), exact.argmin(-1))  # argmin: the first


def test_negative_zero_ties_with_zero(backend):
    x = torch.zeros(1, 1, device=backend.device)
    codebook = torch.tensor([[1.0], [-1.0]], device=backend.device).repeat(200, 1)
    assert ops.nearest_code(x, codebook, "dot").item() == 0
    assert ops.nearest_code(x, -codebook, "dot").item() == 0


@pytest.mark.parametrize("dim", [3, 8, 40])
def test_a_row_does_not_depend_on_the_batch(backend, dim):
    # Exact distances tie in pairs, so that any difference in rounding would show.
    x, codebook = make(100, 300, dim, device=backend.device)
    codebook = torch.cat([codebook, codebook + 1e-7])
    whole = ops.nearest_code(x, codebook)
    for rows in (slice(0, 1), slice(3, 7), slice(17, 64), slice(50, 100)):
        assert torch.equal(ops.nearest_code(x[rows], codebook), whole[rows])


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity(backend, metric):
    nan, inf = float("nan"), float("inf")
    x, codebook = make(12, 50, 8, device=backend.device)
    clean = ops.nearest_code(x, codebook, metric)
    x[5, 3] = nan
    got = ops.nearest_code(x, codebook, metric)
    assert got[5] == 0
    keep = torch.arange(12, device=x.device) != 5
    assert torch.equal(got[keep], clean[keep])

    x, codebook = make(12, 50, 8, device=backend.device)
    codebook[7] = nan
    codebook[0, 1] = nan
    got = ops.nearest_code(x, codebook, metric)
    assert not ((got == 7) | (got == 0)).any()
    assert torch.equal(got.cpu(), reference.nearest_code(x.cpu(), codebook.cpu(), metric))
    assert ops.nearest_code(x, torch.full_like(codebook, nan), metric).eq(0).all()
    if metric == "l2":
        codebook[9] = inf  # infinitely far
        assert torch.equal(ops.nearest_code(x, codebook, metric), got)


def test_non_contiguous_and_empty(backend):
    x, codebook = make(24, 60, 16, device=backend.device)
    expected = ops.nearest_code(x[::2, ::2].contiguous(), codebook[::3, ::2].contiguous())
    assert torch.equal(ops.nearest_code(x[::2, ::2], codebook[::3, ::2]), expected)
    assert torch.equal(ops.nearest_code(x.t().contiguous().t(), codebook), ops.nearest_code(x, codebook))
    assert ops.nearest_code(x[:0], codebook).shape == (0,)
    storage = torch.cat([torch.zeros(1, device=x.device), x.flatten()])[1:].view_as(x)  # not 16-byte aligned
    assert torch.equal(ops.nearest_code(storage, codebook), ops.nearest_code(x, codebook))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    codes=st.integers(1, 200),
    dim=st.integers(1, 70),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 99),
)
def test_random_shapes(backend, rows, codes, dim, metric, seed):
    x, codebook = make(rows, codes, dim, device=backend.device, seed=seed)
    assert_nearest(ops.nearest_code(x, codebook, metric), x, codebook, metric)


def test_every_backend_with_fused_multiply_add_gives_the_same_bits():
    _emulated_or_skip()
    # Near-ties by the thousand: equal indices mean equal scores.
    x, codebook = make(64, 100, 24)
    codebook = torch.cat([codebook, codebook + 1e-7, codebook - 1e-7])
    for metric in METRICS:
        with _library.emulated_cuda():
            expected = ops.nearest_code(x, codebook, metric)
        before = _library.simd_level()
        for level in _library.simd_levels():
            if level == "scalar":
                continue
            _library.set_simd_level(level)
            got = ops.nearest_code(x, codebook, metric)
            _library.set_simd_level(before)
            assert torch.equal(got, expected), (level, metric)


# --- lookup and quantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes, dim", [(1, 1), (20, 7), (100, 33), (70, 64)])
def test_lookup_and_its_gradient(backend, dtype, codes, dim):
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(0, codes, (3, 41), generator=g)
    weight = torch.randn(3, 41, dim, generator=g).to(dtype).to(backend.device)
    codebook = make(1, codes, dim, dtype, backend.device)[1].requires_grad_()
    out = ops.lookup(indices.to(backend.device), codebook)
    assert torch.equal(out.detach().cpu(), codebook.detach().cpu()[indices])
    (out * weight).sum().backward()
    rows = weight.cpu().float().flatten(0, 1)
    expected = torch.zeros(codes, dim).index_add_(0, indices.flatten(), rows)  # in row order, in float32
    assert torch.equal(codebook.grad.cpu(), expected.to(dtype))
    assert codebook.grad.dtype == dtype


def test_lookup_equals_embedding(backend):
    indices = torch.tensor([[3, 0, 3]], device=backend.device)
    codebook = make(1, 5, 6, device=backend.device)[1]
    assert torch.equal(ops.lookup(indices, codebook), torch.nn.functional.embedding(indices, codebook))
    empty = ops.lookup(indices[:, :0], codebook.requires_grad_())
    assert empty.shape == (1, 0, 6)
    empty.sum().backward()
    assert codebook.grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_straight_through(backend, dtype):
    x, codebook = make(24, 30, 8, dtype, backend.device)
    x = x.reshape(2, 3, 4, 8).requires_grad_()
    codebook.requires_grad_()
    z_q, indices = ops.quantize(x, codebook)
    assert indices.shape == (2, 3, 4) and z_q.dtype == dtype
    assert torch.equal(z_q.detach(), codebook.detach()[indices])
    slope = torch.randn(z_q.shape).to(dtype).to(backend.device)
    z_q.backward(slope)
    assert torch.equal(x.grad, slope) and codebook.grad is None
    plain, same = ops.quantize(x.detach(), codebook.detach())
    assert torch.equal(plain, z_q.detach()) and torch.equal(same, indices)


def _emulated_or_skip():
    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        _emulated_or_skip()
    packet = getattr(torch.ops, namespace)
    x, codebook = make(9, 20, 8)
    torch.library.opcheck(packet.nearest_code, (x, codebook, 0))
    torch.library.opcheck(packet.lookup_backward, (x, torch.arange(9) % 4, 6))


def test_compiles_without_graph_breaks_and_without_recompiling():
    _, codebook = make(1, 50, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda x: ops.quantize(x, codebook, "cosine"), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (3, 5, 9):
        x, _ = make(rows, 1, 8)
        for got, expected in zip(step(x), ops.quantize(x, codebook, "cosine")):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


def test_training_step_compiles():
    x, codebook = make(6, 20, 8)
    indices = torch.tensor([1, 1, 4, 0, 1, 2])

    def loss(x, codebook):
        z_q, _ = ops.quantize(x, codebook)
        return (z_q.square() + ops.lookup(indices, codebook)).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        a, b = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        function(a, b).backward()
        grads.append((a.grad, b.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(3)), ValueError, r"expected x \[N, 4\], got \[3\]"),
        (dict(x=torch.zeros(3, 5)), ValueError, r"expected x \[N, 4\], got \[3, 5\]"),
        (dict(x=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "expected x of float"),
        (dict(x=[1.0]), TypeError, "expected x to be a tensor, got list"),
        (
            dict(codebook=torch.zeros(0, 4)),
            ValueError,
            r"expected codebook \[K, D\] with K, D > 0, got \[0, 4\]",
        ),
        (dict(codebook=torch.zeros(2, 2, 4)), ValueError, r"expected codebook \[K, D\]"),
        (dict(codebook=torch.zeros(2, 4).int()), TypeError, "expected codebook of float"),
        (
            dict(codebook=torch.zeros(2, 4, device="meta")),
            ValueError,
            "expected codebook on x's device cpu, got meta",
        ),
        (dict(metric="l1"), ValueError, "expected a metric of l2, cosine, dot, got 'l1'"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    arguments = dict(x=torch.zeros(3, 4), codebook=torch.zeros(2, 4), metric="l2") | change
    with pytest.raises(error, match=text):
        ops.nearest_code(**arguments)


def test_bad_lookup_is_refused():
    with pytest.raises(TypeError, match=r"expected indices to be an int64 tensor, got torch.int32"):
        ops.lookup(torch.zeros(2, dtype=torch.int32), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"expected codebook \[K, D\], got \[3\]"):
        ops.lookup(torch.zeros(2, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(IndexError):
        ops.lookup(torch.tensor([3]), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"expected x \[..., 4\], got \[2, 3\]"):
        ops.quantize(torch.zeros(2, 3), torch.zeros(5, 4))


def test_the_reference_agrees():
    for metric in METRICS:
        x, codebook = make(50, 200, 24)
        assert assert_nearest(reference.nearest_code(x, codebook, metric), x, codebook, metric) == 0
        assert math.isfinite(reference.quantize(x, codebook, metric)[0].sum().item())
