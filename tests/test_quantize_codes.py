"""Scalar codes: FSQ against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLEXTOK = [8, 8, 8, 5, 5, 5]
LEVELS = [[2], [3], [1000], FLEXTOK, [7, 5, 5, 5, 5], [4, 2, 9], [3] * 15, [3] * 17, [2] * 62]
LEVELS += [[999, 2, 31, 1000, 6]]


def make(rows, dim, dtype=torch.float32, device="cpu", seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, dim, generator=g) * scale).to(dtype).to(device)


def bound(z, levels):
    """What is rounded, in float64, and the largest error that float32 arithmetic may make in it."""
    L = torch.tensor(levels, dtype=torch.float64)
    half = (L - 1) * (1 + 1e-3) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).double()
    shift = torch.atanh(offset / half)
    # tanh to 2^-22; z + shift, half and the result round once each
    return torch.tanh(z.detach().cpu().double() + shift) * half - offset, (half + 1) * 2.0**-21


def assert_fsq(codes, indices, z, levels) -> int:
    """Every digit is the nearest level, or within rounding of it; counts the latter."""
    exact, error = bound(z, levels)
    width = torch.tensor([level // 2 for level in levels])
    assert codes.dtype == z.dtype and codes.shape == z.shape
    assert indices.dtype == torch.int64 and indices.shape == z.shape[:-1]
    rest, digits = indices.cpu(), []
    for level in levels:
        digits.append(rest % level)
        rest = rest // level
    assert (rest == 0).all()
    k = torch.stack(digits, -1) - width
    away = (k - exact).abs()
    assert (away <= 0.5 + error).all(), f"off by {(away - 0.5).max().item():.3e}"
    assert torch.equal(codes.cpu(), (k.float() / width).to(z.dtype))
    return int((k != exact.round()).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS, ids=lambda x: f"{len(x)}x{x[0]}")
def test_fsq(backend, levels, dtype):
    for rows in (1, 19, 70):
        z = make(rows, len(levels), dtype, backend.device)
        assert assert_fsq(*ops.fsq(z, levels), z, levels) <= rows * len(levels) // 100


def test_fsq_of_more_rows_than_a_block(backend):
    z = make(700, 6, device=backend.device)
    codes, indices = ops.fsq(z.view(7, 100, 6), FLEXTOK)
    assert assert_fsq(codes, indices, z.view(7, 100, 6), FLEXTOK) <= 2
    for rows in (slice(0, 1), slice(3, 8), slice(255, 258), slice(690, 700)):  # bit for bit
        alone = ops.fsq(z[rows], FLEXTOK)
        assert torch.equal(alone[0], codes.view(700, 6)[rows])
        assert torch.equal(alone[1], indices.view(700)[rows])


@pytest.mark.parametrize("levels", [FLEXTOK, [7, 5, 5, 5, 5]])
def test_all_indices_go_there_and_back(backend, levels):
    count = math.prod(levels)
    every = torch.arange(count, device=backend.device)
    if backend.name == "emulated":
        every = every[:: count // 3000]
    codes = ops.fsq_codes(every, levels)
    assert torch.equal(codes.cpu(), reference.fsq_codes(every.cpu(), levels))
    assert codes.min() == -1 and codes.max() == 1
    # The value whose bound is the level itself.
    k = codes.cpu().double() * torch.tensor([level // 2 for level in levels])
    L = torch.tensor(levels, dtype=torch.float64)
    half, offset = (L - 1) * (1 + 1e-3) / 2, torch.where(L % 2 == 0, 0.5, 0.0).double()
    z = (torch.atanh((k + offset) / half) - torch.atanh(offset / half)).float().to(backend.device)
    again, indices = ops.fsq(z, levels)
    assert torch.equal(indices, every) and torch.equal(again, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fsq_codes(backend, dtype):
    g = torch.Generator().manual_seed(0)
    for levels in LEVELS:
        count = math.prod(levels)
        indices = torch.randint(-(2**63), 2**63 - 1, (3, 50), generator=g)  # beyond the range: modulo
        indices[0] %= count
        indices[1, :4] = torch.tensor([0, count - 1, count, -1])
        got = ops.fsq_codes(indices.to(backend.device), levels, dtype=dtype)
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), reference.fsq_codes(indices, levels, dtype=dtype))
        assert torch.equal(got, ops.fsq_codes((indices % count).to(backend.device), levels, dtype=dtype))


def test_every_level_value_is_correctly_rounded(backend):
    for level in range(2, 1001, 97 if backend.name == "emulated" else 1):
        got = ops.fsq_codes(torch.arange(level, device=backend.device), [level])[:, 0].cpu()
        assert torch.equal(got, (torch.arange(level) - level // 2).float() / (level // 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", LEVELS[3:], ids=lambda x: f"{len(x)}x{x[0]}")
def test_fsq_gradient(backend, levels, dtype):
    z = make(41, len(levels), dtype, backend.device).requires_grad_()
    slope = make(41, len(levels), dtype, backend.device, seed=1)
    ops.fsq(z, levels)[0].backward(slope)

    def formula(z, slope):
        z = z.requires_grad_()
        return torch.autograd.grad(reference.fsq(z, levels)[0], z, slope)[0]

    assert z.grad.dtype == dtype
    assert_close(z.grad, formula, z, slope)


def test_fsq_of_extreme_values(backend):
    nan, inf = math.nan, math.inf
    rows = [[inf, -inf, 3e38], [-3e38, 0.0, nan], [nan, -0.0, 1e-40], [20.5, -20.5, 40.0]]
    z = torch.tensor(rows + rows, device=backend.device).repeat(5, 1).requires_grad_()  # vectors and tails
    codes, indices = ops.fsq(z, [8, 5, 8])
    expected = [[0.75, -1, 0.75], [-1, 0, nan], [nan, 0, 0], [0.75, -1, 0.75]]
    assert torch.equal(codes.detach().cpu().nan_to_num(9), torch.tensor(expected).repeat(10, 1).nan_to_num(9))
    assert indices.cpu().tolist() == [7 + 0 + 7 * 40, 0 + 16 + 0, 0 + 16 + 4 * 40, 7 + 0 + 7 * 40] * 10
    codes.nansum().backward()
    grad = z.grad.cpu()[:4]
    assert torch.equal(grad.isnan(), torch.tensor(rows).isnan())
    assert grad[0].abs().max() < 2e-17 and grad[1, 1] > 0.9


def test_fsq_layouts_and_empty(backend):
    z = make(24, 12, device=backend.device)
    expected = ops.fsq(z[::2, ::2].contiguous(), FLEXTOK)
    for got in (ops.fsq(z[::2, ::2], FLEXTOK), ops.fsq(z[::2, ::2].t().contiguous().t(), FLEXTOK)):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    storage = torch.cat([torch.zeros(1, device=z.device), z[:, :6].flatten()])
    flat = storage[1:].view(24, 6)  # not 16-byte aligned
    assert torch.equal(ops.fsq(flat, FLEXTOK)[1], ops.fsq(z[:, :6], FLEXTOK)[1])
    codes, indices = ops.fsq(z[:0, :6], FLEXTOK)
    assert codes.shape == (0, 6) and indices.shape == (0,)
    assert ops.fsq(z[0, :6], FLEXTOK)[1].shape == ()
    assert ops.fsq_codes(indices, FLEXTOK).shape == (0, 6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    levels=st.lists(st.integers(2, 40), min_size=1, max_size=10),
    seed=st.integers(0, 99),
)
def test_fsq_of_random_shapes(backend, rows, levels, seed):
    z = make(rows, len(levels), device=backend.device, seed=seed)
    codes, indices = ops.fsq(z, levels)
    assert_fsq(codes, indices, z, levels)
    assert torch.equal(ops.fsq_codes(indices, levels), codes)


def test_every_backend_gives_the_same_bits():
    emulated_or_skip()
    z, slope = make(2000, 6), make(2000, 6, seed=1)

    def run():
        codes, indices = ops.fsq(z, FLEXTOK)
        packet = torch.ops.arimg_emulated if _library.ops() is torch.ops.arimg_emulated else torch.ops.arimg
        return codes, indices, packet.fsq_backward(slope, z, FLEXTOK)

    with _library.emulated_cuda():
        expected = run()
    before = _library.simd_level()
    for level in _library.simd_levels():
        _library.set_simd_level(level)
        got = run()
        _library.set_simd_level(before)
        assert all(torch.equal(a, b) for a, b in zip(got, expected)), level


def emulated_or_skip():
    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        emulated_or_skip()
    packet = getattr(torch.ops, namespace)
    z = make(9, 6)
    torch.library.opcheck(packet.fsq, (z, FLEXTOK))
    torch.library.opcheck(packet.fsq_backward, (z, z, FLEXTOK))
    torch.library.opcheck(packet.fsq_codes, (torch.arange(9), FLEXTOK, torch.bfloat16))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(z):
        codes, indices = ops.fsq(z, FLEXTOK)
        return codes, indices, ops.fsq_codes(indices, FLEXTOK)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 9):
        z = make(rows, 6)
        for got, expected in zip(compiled(z), step(z)):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


def test_training_step_compiles():
    z = make(6, 6)
    grads = []
    for function in (
        lambda z: ops.fsq(z, FLEXTOK)[0].square().sum(),
        torch.compile(lambda z: ops.fsq(z, FLEXTOK)[0].square().sum(), fullgraph=True, backend="aot_eager"),
    ):
        leaf = z.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.fsq(torch.zeros(3, 5), FLEXTOK), ValueError, r"expected z \[..., 6\], got \[3, 5\]"),
        (lambda: ops.fsq(torch.zeros(3, 2).long(), [3, 3]), TypeError, "expected z of float32"),
        (lambda: ops.fsq([1.0], [3]), TypeError, "expected z to be a tensor, got list"),
        (lambda: ops.fsq(torch.zeros(3, 0), []), ValueError, r"expected levels of 2 to 1000, got \[\]"),
        (lambda: ops.fsq(torch.zeros(1), [1]), ValueError, r"expected levels of 2 to 1000, got \[1\]"),
        (lambda: ops.fsq(torch.zeros(1), [1001]), ValueError, "expected levels of 2 to 1000"),
        (lambda: ops.fsq(torch.zeros(7), [999] * 7), ValueError, r"product of at most 2\^62"),
        (lambda: ops.fsq_codes(torch.zeros(2), [3]), TypeError, "expected indices to be an int64 tensor"),
        (
            lambda: ops.fsq_codes(torch.zeros(2).long(), [3], dtype=torch.float64),
            TypeError,
            "expected dtype float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
