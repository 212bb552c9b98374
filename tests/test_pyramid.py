"""Resampling, accumulate and the multi-scale encode against torch, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from test_quantize import scores
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VAR_SCALES = [(n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
VAR_PHI = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
# images, channels, input size, output size
RESIZES = [
    (1, 1, (1, 1), (1, 1)),
    (1, 3, (1, 1), (5, 4)),
    (2, 5, (4, 4), (16, 16)),
    (3, 32, (13, 13), (16, 16)),
    (1, 7, (3, 8), (9, 11)),
    (2, 33, (2, 5), (7, 5)),
    (1, 40, (6, 6), (6, 6)),
]


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(device)


def assert_resampled(got, x, size, mode):
    # A bicubic pixel is 8 products deep, with weights that sum to at most 2; torch may happen to be exact.
    floor = 8 * 2.0**-24 * 2 * x.abs().max().item()
    assert_close(got, lambda x: interpolate(x, size, mode), x, floor=floor)


def interpolate(x, size, mode):
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, size=size, mode=mode).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RESIZES)
def test_resampling(backend, case, dtype):
    B, C, small, large = case
    x = randn(B, C, *large, dtype=dtype, device=backend.device)
    assert_resampled(ops.area_down(x, small), x, small, "area")
    x = randn(B, C, *small, dtype=dtype, device=backend.device)
    assert_resampled(ops.bicubic_up(x, large), x, large, "bicubic")


def test_resampling_in_the_other_direction_follows_torch_too(backend):
    x = randn(2, 3, 5, 9, device=backend.device)
    assert_resampled(ops.bicubic_up(x, (3, 4)), x, (3, 4), "bicubic")
    assert_resampled(ops.area_down(x, (8, 12)), x, (8, 12), "area")


def test_equal_sizes_copy(backend):
    x = randn(2, 3, 4, 5, device=backend.device)
    x[0, 0, 0, 0] = float("inf")  # would spread as NaN if it took part in a weighted sum
    for resize in (ops.area_down, ops.bicubic_up):
        y = resize(x, (4, 5))
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


def test_resampling_of_non_contiguous_and_empty_maps(backend):
    x = randn(2, 6, 8, 10, device=backend.device)
    view = x[:, ::2].transpose(2, 3)
    assert torch.equal(ops.area_down(view, (3, 4)), ops.area_down(view.contiguous(), (3, 4)))
    assert torch.equal(ops.bicubic_up(view, (20, 9)), ops.bicubic_up(view.contiguous(), (20, 9)))
    assert ops.area_down(x[:0], (2, 2)).shape == (0, 6, 2, 2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 40),
    small=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_resampling_of_random_shapes(backend, channels, small, more):
    large = (small[0] + more[0], small[1] + more[1])
    x = randn(1, channels, *large, device=backend.device)
    assert_resampled(ops.area_down(x, small), x, small, "area")
    x = randn(1, channels, *small, device=backend.device)
    assert_resampled(ops.bicubic_up(x, large), x, large, "bicubic")


# --- accumulate ---------------------------------------------------------------------------------------------

ACCUMULATES = [
    (1, 1, (1, 1), (1, 1)),
    (2, 3, (1, 1), (2, 3)),
    (1, 5, (3, 2), (5, 19)),
    (2, 32, (1, 1), (16, 16)),
    (2, 32, (10, 10), (16, 16)),
    (1, 32, (16, 16), (16, 16)),
    (1, 20, (4, 6), (9, 6)),
    (1, 40, (4, 4), (7, 13)),
]


def filters(channels, count=None, dtype=torch.float32, device="cpu"):
    shape = (channels, channels, 3, 3)
    weight = randn(*(shape if count is None else (count, *shape)), seed=7) * (9 * channels) ** -0.5
    bias = randn(*((channels,) if count is None else (count, channels)), seed=8) * 0.1
    return weight.to(dtype).to(device), bias.to(dtype).to(device)


def assert_added(got, f_hat, h, weight, bias, ratio, residual=None):
    # One chain of 9 C roundings, each of a partial sum that is about as large as h.
    floor = (9 * h.shape[1]) ** 0.5 * 2.0**-24 * h.abs().max().item()
    assert_close(got, added, f_hat, h, weight, bias, ratio, residual, floor=floor)


def added(f_hat, h, weight, bias, ratio, residual=None):
    """What accumulate_ makes of f_hat (or of residual), out of place."""
    dtype = f_hat.dtype
    f_hat, h, weight, bias = (t if t.dtype == torch.float64 else t.float() for t in (f_hat, h, weight, bias))
    size = f_hat.shape[-2:]
    v = h if h.shape[-2:] == size else F.interpolate(h, size=size, mode="bicubic")
    u = (1 - ratio) * v + ratio * F.conv2d(v, weight, bias, padding=1)
    return (f_hat + u if residual is None else residual.to(u.dtype) - u).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ACCUMULATES)
def test_accumulate(backend, case, dtype):
    B, C, small, size = case
    f_hat = randn(B, C, *size, dtype=dtype, device=backend.device)
    residual = randn(B, C, *size, dtype=dtype, device=backend.device, seed=1)
    h = randn(B, C, *small, dtype=dtype, device=backend.device, seed=2)
    weight, bias = filters(C, dtype=dtype, device=backend.device)
    got, rest = f_hat.clone(), residual.clone()
    ops.accumulate_(got, h, weight, bias, 0.5, rest)
    assert_added(got, f_hat, h, weight, bias, 0.5)
    assert_added(rest, f_hat, h, weight, bias, 0.5, residual)
    alone = f_hat.clone()
    ops.accumulate_(alone, h, weight, bias, 0.5)
    assert torch.equal(alone, got)


def test_accumulate_with_other_ratios_dtypes_and_layouts(backend):
    C, device = 6, backend.device
    f_hat = randn(2, C, 5, 7, device=device)
    codes = randn(2, 12, C, device=device, seed=2)  # as looked up: rows of channels
    h = codes.transpose(1, 2).reshape(2, C, 3, 4)
    weight, bias = filters(C, device=device)
    for ratio in (0.0, 0.3, 1.0):
        got = f_hat.clone()
        ops.accumulate_(got, h, weight, bias, ratio)
        assert_added(got, f_hat, h, weight, bias, ratio)
        view = f_hat.clone()
        ops.accumulate_(view, codes.view(2, 3, 4, C).permute(0, 3, 1, 2), weight, bias, ratio)
        assert torch.equal(view, got)
    mixed = f_hat.bfloat16()
    ops.accumulate_(mixed, h, weight, bias)
    assert_added(mixed, f_hat.bfloat16(), h, weight, bias, 0.5)

    strided = randn(2, 5, 7, C, device=device).permute(0, 3, 1, 2)
    residual, dense = strided.clone(memory_format=torch.preserve_format), strided.contiguous()
    rest = residual.contiguous()
    ops.accumulate_(strided, h.transpose(2, 3), weight, bias, 0.5, residual)
    ops.accumulate_(dense, h.transpose(2, 3).contiguous(), weight, bias, 0.5, rest)
    assert torch.equal(strided, dense) and torch.equal(residual, rest)
    ops.accumulate_(f_hat[:0], h[:0], weight, bias)


def test_accumulate_of_one_image_does_not_depend_on_the_batch(backend):
    f_hat, h = randn(3, 32, 16, 16, device=backend.device), randn(3, 32, 5, 5, device=backend.device)
    weight, bias = filters(32, device=backend.device)
    whole = f_hat.clone()
    ops.accumulate_(whole, h, weight, bias)
    for b in range(3):
        alone = f_hat[b : b + 1].clone()
        ops.accumulate_(alone, h[b : b + 1], weight, bias)
        assert torch.equal(alone, whole[b : b + 1])


def test_accumulate_keeps_a_nan_near_where_it_is(backend):
    f_hat, h = torch.zeros(2, 3, 16, 16, device=backend.device), randn(2, 3, 16, 16, device=backend.device)
    h[0, 1, 8, 8] = float("nan")
    weight, bias = filters(3, device=backend.device)
    ops.accumulate_(f_hat, h, weight, bias)
    assert f_hat[0, :, 7:10, 7:10].isnan().all() and f_hat.isnan().sum() == 27


def test_accumulate_is_differentiable_through_the_reference():
    h = randn(1, 4, 2, 2).requires_grad_()
    weight, bias = filters(4)
    f_hat = torch.zeros(1, 4, 4, 4)
    ops.accumulate_(f_hat, h, weight, bias)
    f_hat.sum().backward()
    assert h.grad is not None and h.grad.abs().sum() > 0


# --- encode -------------------------------------------------------------------------------------------------


def problem(B, C, K, H, W, dtype=torch.float32, device="cpu", phis=4, seed=0):
    f = randn(B, C, H, W, dtype=dtype, device=device, seed=seed)
    codebook = randn(K, C, dtype=dtype, device=device, seed=seed + 1)
    return f, codebook, *filters(C, phis, dtype, device)


def assert_encodes(result, f, codebook, weights, biases, scales, phi, ratio=0.5) -> int:
    """Replays the indices in float64: at each scale the code must be the nearest to the residual that the
    codes chosen so far leave (or tie with it within rounding; counted), and f_hat must be their sum."""
    indices, f_hat = result
    f, codebook, weights, biases = (t.detach().cpu().double() for t in (f, codebook, weights, biases))
    B, C = f.shape[:2]
    residual, total, flips = f.clone(), torch.zeros_like(f), 0
    for (h, w), k, index in zip(scales, phi, indices):
        index = index.cpu()
        assert index.shape == (B, h * w) and index.dtype == torch.int64
        rows = F.interpolate(residual, size=(h, w), mode="area").permute(0, 2, 3, 1).reshape(-1, C)
        exact, error = scores(rows, codebook, "l2")
        # The residual of a float32 run carries the rounding of the scales before it: up to some units in the
        # last place of the largest values that were added.
        error = error + 32 * 2.0**-24 * (f.abs().max() + total.abs().max()) * codebook.abs().sum(-1)
        chosen = index.reshape(-1)
        at = torch.arange(len(chosen))
        best = exact.argmin(-1)
        assert (exact[at, chosen] - exact[at, best] <= error[at, chosen] + error[at, best]).all()
        flips += int((chosen != best).sum())
        codes = codebook[index].transpose(1, 2).reshape(B, C, h, w)
        u = added(torch.zeros_like(f), codes, weights[k], biases[k], ratio)
        total, residual = total + u, residual - u
    # one rounding to f_hat's dtype, and some in float32
    unit = torch.finfo(f_hat.dtype).eps / 2 + 64 * 2.0**-24
    assert ((f_hat.cpu().double() - total).abs() <= unit * (1 + total.abs().max())).all()
    return flips


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode(backend, dtype):
    arguments = problem(2, 8, 60, 6, 7, dtype, backend.device, phis=2)
    scales, phi = [(1, 1), (2, 3), (4, 4), (6, 7)], [0, 1, 1, 0]
    assert assert_encodes(ops.encode(*arguments, scales, phi), *arguments, scales, phi) == 0


def test_encode_of_var(backend):
    arguments = problem(1, 32, 500, 16, 16, device=backend.device)
    got = ops.encode(*arguments, VAR_SCALES, VAR_PHI)
    assert assert_encodes(got, *arguments, VAR_SCALES, VAR_PHI) <= 2
    expected = reference.encode(*(t.cpu() for t in arguments), VAR_SCALES, VAR_PHI)
    same = [torch.equal(a.cpu(), b) for a, b in zip(got[0], expected[0])]
    assert sum(same) >= 9, same


def test_encode_of_one_image_does_not_depend_on_the_batch(backend):
    f, *rest = problem(3, 16, 80, 8, 8, device=backend.device, phis=1)
    scales, phi = [(1, 1), (3, 3), (8, 8)], [0, 0, 0]
    indices, f_hat = ops.encode(f, *rest, scales, phi)
    for b in range(3):
        alone, sum_alone = ops.encode(f[b : b + 1], *rest, scales, phi)
        assert torch.equal(sum_alone, f_hat[b : b + 1])
        assert all(torch.equal(a, i[b : b + 1]) for a, i in zip(alone, indices))


def test_encode_equals_its_steps(backend):
    f, codebook, weights, biases = problem(2, 16, 80, 8, 8, device=backend.device, phis=2)
    scales, phi = [(1, 1), (3, 3), (8, 8)], [0, 1, 0]
    indices, f_hat = ops.encode(f, codebook, weights, biases, scales, phi)
    residual, total = f.clone(), torch.zeros_like(f)
    for (h, w), k, index in zip(scales, phi, indices):
        rows = ops.area_down(residual, (h, w)).permute(0, 2, 3, 1).reshape(-1, 16)
        assert torch.equal(ops.nearest_code(rows, codebook).reshape(2, -1), index)
        codes = ops.lookup(index, codebook).transpose(1, 2).reshape(2, 16, h, w)
        ops.accumulate_(total, codes, weights[k], biases[k], 0.5, residual)
    assert torch.equal(total, f_hat)


def test_encode_of_nothing_and_of_mixed_dtypes(backend):
    f, codebook, weights, biases = problem(2, 8, 30, 4, 4, device=backend.device, phis=1)
    scales, phi = [(2, 2), (4, 4)], [0, 0]
    indices, f_hat = ops.encode(f[:0], codebook, weights, biases, scales, phi)
    assert [i.shape for i in indices] == [(0, 4), (0, 16)] and f_hat.shape == (0, 8, 4, 4)
    mixed = (f.bfloat16(), codebook, weights.half(), biases.half())
    assert_encodes(ops.encode(*mixed, scales, phi), *mixed, scales, phi)
    requires = f.clone().requires_grad_()
    assert torch.equal(
        ops.encode(requires, codebook, weights, biases, scales, phi)[0][1],
        ops.encode(f, codebook, weights, biases, scales, phi)[0][1],
    )


def test_threads_do_not_change_a_bit():
    arguments = problem(3, 32, 300, 16, 16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.encode(*arguments, VAR_SCALES, VAR_PHI))
    torch.set_num_threads(before)
    for indices, f_hat in results[1:]:
        assert torch.equal(f_hat, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(indices, results[0][0]))


# --- the framework's view -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    f, codebook, weights, biases = problem(2, 4, 10, 5, 6, phis=2)
    torch.library.opcheck(packet.area_down, (f, 2, 3))
    torch.library.opcheck(packet.bicubic_up, (f, 9, 8))
    small = randn(2, 4, 2, 2)
    torch.library.opcheck(packet.accumulate_, (f, small, weights[0], biases[0], 0.5, None))
    torch.library.opcheck(packet.accumulate_, (f, small, weights[0], biases[0], 0.5, f.clone()))
    torch.library.opcheck(packet.encode, (f, codebook, weights, biases, [1, 1, 5, 6], [0, 1], 0.5))


def test_compiles_without_graph_breaks():
    _, codebook, weights, biases = problem(2, 8, 20, 6, 6, phis=2)
    scales, phi = [(2, 2), (6, 6)], [0, 1]

    def step(f):
        indices, f_hat = ops.encode(f, codebook, weights, biases, scales, phi)
        total = torch.zeros_like(f)
        ops.accumulate_(total, ops.area_down(f, (3, 3)), weights[0], biases[0])
        return indices, f_hat, total + ops.bicubic_up(f, (6, 6))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (1, 3):
        f = randn(B, 8, 6, 6)
        (a, b, c), (x, y, z) = compiled(f), step(f)
        assert torch.equal(b, y) and torch.equal(c, z) and all(torch.equal(i, j) for i, j in zip(a, x))


def resize(**change):
    arguments = dict(x=torch.zeros(1, 2, 4, 4), size=(2, 2)) | change
    return ops.area_down(**arguments), ops.bicubic_up(**arguments)


def accumulate(**change):
    C = 2
    arguments = dict(
        f_hat=torch.zeros(1, C, 4, 4),
        h=torch.zeros(1, C, 2, 2),
        weight=torch.zeros(C, C, 3, 3),
        bias=torch.zeros(C),
        residual=None,
    )
    ops.accumulate_(**(arguments | change))


def encode(**change):
    arguments = dict(
        f=torch.zeros(1, 2, 4, 4),
        codebook=torch.zeros(5, 2),
        weights=torch.zeros(1, 2, 2, 3, 3),
        biases=torch.zeros(1, 2),
        scales=[(1, 1), (4, 4)],
        phi=[0, 0],
    )
    ops.encode(**(arguments | change))


@pytest.mark.parametrize(
    "function, change, error, text",
    [
        (resize, dict(x=torch.zeros(2, 4, 4)), ValueError, r"expected x \[B, C, H, W\]"),
        (resize, dict(x=torch.zeros(1, 2, 4, 4).int()), TypeError, "expected x of float"),
        (resize, dict(size=(0, 3)), ValueError, r"expected a size of two positive numbers, got \(0, 3\)"),
        (accumulate, dict(f_hat=torch.zeros(2, 4, 4)), ValueError, r"expected f_hat \[B, C, H, W\]"),
        (
            accumulate,
            dict(h=torch.zeros(1, 3, 2, 2)),
            ValueError,
            r"expected h \[1, 2, h, w\], got \[1, 3, 2, 2\]",
        ),
        (accumulate, dict(h=torch.zeros(1, 2, 2, 2, device="meta")), ValueError, "expected h on device cpu"),
        (accumulate, dict(weight=torch.zeros(2, 2, 1, 1)), ValueError, r"expected weight \[2, 2, 3, 3\]"),
        (accumulate, dict(bias=torch.zeros(2).half()), TypeError, "expected bias of weight's dtype"),
        (
            accumulate,
            dict(residual=torch.zeros(1, 2, 4, 5)),
            ValueError,
            "expected residual of f_hat's shape",
        ),
        (encode, dict(f=torch.zeros(1, 2, 4)), ValueError, r"expected f \[B, C, H, W\]"),
        (encode, dict(codebook=torch.zeros(5, 3)), ValueError, r"expected codebook \[K, 2\]"),
        (encode, dict(weights=torch.zeros(2, 2, 3, 3)), ValueError, "expected weights"),
        (encode, dict(scales=[(1, 1), (3, 4)]), ValueError, r"expected scales \(h, w\) within \(4, 4\)"),
        (encode, dict(phi=[0, 1]), ValueError, r"expected a phi of 0..0 for each of 2 scales, got \[0, 1\]"),
    ],
)
def test_bad_input_is_refused(function, change, error, text):
    with pytest.raises(error, match=text):
        function(**change)
