"""Resampling of maps and tokens, and its gradient, against torch in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["area", "bilinear", "bicubic"]
# images, channels, one size and the other
SIZES = [
    (1, 1, (1, 1), (1, 1)),
    (1, 3, (1, 1), (5, 4)),
    (2, 5, (4, 4), (16, 16)),
    (3, 32, (13, 13), (16, 16)),
    (1, 7, (3, 8), (9, 11)),
    (2, 33, (2, 5), (7, 5)),
    (1, 40, (6, 6), (6, 6)),
    (1, 2, (9, 3), (4, 17)),
    (1, 17, (1, 33), (2, 7)),
    (1, 2, (40, 36), (90, 80)),
]


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(device)


def interpolate(x, size, mode):
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, size=size, mode=mode).to(x.dtype)


def gradient(grad, from_size, mode):
    """What the gradient of a result becomes on the way back to a map of from_size."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    x = torch.zeros(*grad.shape[:2], *from_size, dtype=wide.dtype, requires_grad=True)
    F.interpolate(x, size=grad.shape[2:], mode=mode).backward(wide)
    return x.grad.to(grad.dtype)


def rounding(formula, x, *rest):
    """The rounding of as many terms as one element sums, each at most twice the element of |x|."""
    sizes = [*x.shape[2:], *rest[0]]
    terms = 8 + 4 * sum(math.ceil(max(a, b) / min(a, b)) for a, b in zip(sizes[:2], sizes[2:]))
    return 2 * terms * 2.0**-24 * formula(x.cpu().double().abs(), *rest).abs().max().item()


def assert_resampled(got, x, size, mode):
    assert_close(got, interpolate, x, size, mode, floor=rounding(interpolate, x, size, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SIZES)
def test_resize(backend, case, dtype, mode):
    B, C, one, other = case
    for from_size, size in ((one, other), (other, one)):
        x = randn(B, C, *from_size, dtype=dtype, device=backend.device).requires_grad_()
        y = ops.resize(x, size, mode)
        assert y.dtype == dtype and y.shape == (B, C, *size)
        assert_resampled(y.detach(), x.detach(), size, mode)
        grad = randn(B, C, *size, dtype=dtype, device=backend.device, seed=1)
        y.backward(grad)
        floor = rounding(gradient, grad, from_size, mode)
        assert_close(x.grad, gradient, grad, from_size, mode, floor=floor)


def test_the_old_names_are_modes(backend):
    x = randn(2, 3, 5, 9, device=backend.device)
    assert torch.equal(ops.area_down(x, (3, 4)), ops.resize(x, (3, 4), "area"))
    assert torch.equal(ops.bilinear_up(x, (8, 12)), ops.resize(x, (8, 12), "bilinear"))
    assert torch.equal(ops.bicubic_up(x, (8, 12)), ops.resize(x, (8, 12), "bicubic"))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 40),
    from_size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    mode=st.sampled_from(MODES),
)
def test_resize_between_random_sizes(backend, channels, from_size, size, mode):
    x = randn(1, channels, *from_size, device=backend.device).requires_grad_()
    y = ops.resize(x, size, mode)
    assert_resampled(y.detach(), x.detach(), size, mode)
    grad = randn(1, channels, *size, device=backend.device, seed=1)
    (got,) = torch.autograd.grad(y, x, grad)
    assert_close(got, gradient, grad, from_size, mode, floor=rounding(gradient, grad, from_size, mode))


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_transpose_and_its_gradient_the_map(backend, mode):
    def columns(of, size):  # the matrix, column by column, through one call on a batch of unit maps
        unit = torch.eye(size[0] * size[1], device=backend.device).view(-1, 1, *size)
        return of(unit).flatten(1).T

    small, large = (3, 4), (7, 5)
    forward = columns(lambda x: ops.resize(x, large, mode), small)

    def transposed(grad):
        x = torch.zeros(len(grad), 1, *small, device=backend.device, requires_grad=True)
        return torch.autograd.grad(ops.resize(x, large, mode), x, grad, create_graph=True)[0]

    assert torch.allclose(columns(transposed, large), forward.T, atol=1e-6)
    grad = randn(1, 1, *large, device=backend.device).requires_grad_()
    again = randn(1, 1, *small, device=backend.device, seed=1)
    (twice,) = torch.autograd.grad(transposed(grad), grad, again)
    assert torch.allclose(twice.flatten(), forward @ again.flatten(), atol=1e-5)


def test_trilinear_over_one_time_step_is_bilinear(backend):
    """As Infinity resamples: [B, C, 1, h, w] with mode "trilinear"."""
    x = randn(2, 5, 1, 6, 4, device=backend.device)
    theirs = F.interpolate(x, size=(1, 9, 16), mode="trilinear")
    flat = F.interpolate(x[:, :, 0], size=(9, 16), mode="bilinear")
    assert torch.allclose(theirs[:, :, 0], flat, atol=1e-6)
    got = ops.resize(x, (1, 9, 16), "trilinear")
    assert torch.equal(got[:, :, 0], ops.bilinear_up(x[:, :, 0], (9, 16)))
    assert_close(got, interpolate, x, (1, 9, 16), "trilinear", floor=16 * 2.0**-24 * x.abs().max().item())


@pytest.mark.parametrize("mode", ["area", "trilinear"])
@pytest.mark.parametrize("size", [(3, 5, 2), (5, 4, 6), (2, 8, 9), (1, 1, 1)])
def test_resize_with_a_time_axis(backend, size, mode):
    x = randn(2, 3, 3, 4, 6, device=backend.device).requires_grad_()
    y = ops.resize(x, size, mode)
    floor = 64 * 2.0**-24 * x.abs().max().item()
    assert_close(y, interpolate, x, size, mode, floor=floor)
    grad = torch.autograd.grad(y.square().sum(), x)[0]
    exact = x.detach().cpu().double().requires_grad_()
    F.interpolate(exact, size=size, mode=mode).square().sum().backward()
    assert torch.allclose(grad.cpu().double(), exact.grad, atol=1e-4)


def test_equal_sizes_copy(backend):
    x = randn(2, 3, 4, 5, device=backend.device)
    x[0, 0, 0, 0] = float("inf")  # would spread as NaN if it took part in a weighted sum
    for mode in MODES:
        y = ops.resize(x, (4, 5), mode)
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
        wider = ops.resize(x, (4, 9), mode)  # rows stay as they are
        assert torch.equal(wider[:, :, 1:], ops.resize(x[:, :, 1:], (3, 9), mode))


def test_a_nan_reaches_what_is_made_of_it(backend):
    x = torch.zeros(2, 20, 16, 16, device=backend.device)
    x[1, 3, 8, 8] = float("nan")
    reached = {"area": 4, "bilinear": 16, "bicubic": 64}  # pixels at twice the size
    for mode in MODES:
        y = ops.resize(x, (32, 32), mode)
        assert y.isnan().sum() == y[1, 3].isnan().sum() == reached[mode]
        assert y[1, 3, 16:18, 16:18].isnan().all()


def test_resize_of_other_layouts_and_of_nothing(backend):
    x = randn(2, 6, 8, 10, device=backend.device)
    view = x[:, ::2].transpose(2, 3)
    last = x.to(memory_format=torch.channels_last)
    for mode in MODES:
        for size in ((3, 4), (20, 9), (8, 10)):
            assert torch.equal(ops.resize(view, size, mode), ops.resize(view.contiguous(), size, mode))
            got = ops.resize(last, size, mode)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got, ops.resize(x, size, mode))
        assert ops.resize(x[:0], (2, 2), mode).shape == (0, 6, 2, 2)


def test_resize_of_one_image_does_not_depend_on_the_batch_nor_on_threads(backend):
    x = randn(3, 19, 11, 14, device=backend.device)
    before = torch.get_num_threads()
    for mode in MODES:
        torch.set_num_threads(2)
        whole = ops.resize(x, (16, 9), mode)
        torch.set_num_threads(1)
        for b in range(3):
            assert torch.equal(ops.resize(x[b : b + 1], (16, 9), mode), whole[b : b + 1])
    torch.set_num_threads(before)


def test_area_is_nested_on_powers_of_two_and_not_on_the_scales_of_var(backend):
    """FlowAR's pyramid: averaging an average is averaging, if each size divides the next."""
    x = randn(2, 16, 16, 16, device=backend.device)
    for scales, nested in (([1, 2, 4, 8, 16], True), ([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], False)):
        worst = 0.0
        for small, middle in itertools.pairwise(scales):
            twice = ops.area_down(ops.area_down(x, (middle, middle)), (small, small))
            worst = max(worst, (twice - ops.area_down(x, (small, small))).abs().max().item())
        assert worst < 1e-6 if nested else worst > 0.1


# --- tokens on a grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_pool_tokens(backend, dtype, mode):
    """Keys and values of a segment of a cache, as heads first and as tokens first."""
    cache = randn(2, 3, 40, 20, dtype=dtype, device=backend.device)
    got = ops.pool_tokens(cache, (5, 6), (2, 3), start=4, mode=mode)
    assert got.shape == (2, 3, 6, 20)

    def formula(x):
        maps = x[:, :, 4:34].reshape(6, 5, 6, 20).permute(0, 3, 1, 2)
        return interpolate(maps, (2, 3), mode).flatten(2).transpose(1, 2).reshape(2, 3, 6, 20)

    assert_close(got, formula, cache, floor=64 * 2.0**-24 * cache.abs().max().item())
    tokens_first = cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.pool_tokens(tokens_first, (5, 6), (2, 3), start=4, mode=mode), got)
    assert torch.equal(ops.pool_tokens(cache[1:], (5, 6), (2, 3), start=4, mode=mode), got[1:])
    wide = cache.transpose(2, 3).contiguous().transpose(2, 3)  # channels not side by side
    assert torch.equal(ops.pool_tokens(wide, (5, 6), (2, 3), start=4, mode=mode), got)
    assert torch.equal(ops.pool_tokens(cache, (5, 6), (5, 6), mode=mode), cache[:, :, :30])
    assert ops.pool_tokens(cache[:0], (5, 6), (2, 3)).shape == (0, 3, 6, 20)


def test_pooled_tokens_pass_their_gradient(backend):
    cache = randn(2, 3, 14, 7, device=backend.device).requires_grad_()
    grad = randn(2, 3, 4, 7, device=backend.device, seed=1)
    ops.pool_tokens(cache, (3, 4), (2, 2), start=2).backward(grad)
    exact = cache.detach().cpu().double().requires_grad_()
    reference.pool_tokens(exact, (3, 4), (2, 2), 2).backward(grad.cpu().double())
    assert torch.allclose(cache.grad.cpu().double(), exact.grad, atol=1e-6)
    assert not cache.grad[:, :, :2].any()


# --- the framework's view -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    for transposed in (False, True):
        for mode in range(3):
            torch.library.opcheck(packet.resize_planes, (randn(2, 4, 5, 6), 2, 9, mode, transposed))
            torch.library.opcheck(packet.resize_rows, (randn(2, 3, 6, 4), 2, 3, 4, 1, mode, transposed))


def test_compiles_without_graph_breaks():
    def step(x, k):
        y = ops.bicubic_up(ops.area_down(x, (3, 5)), (7, 6)) + ops.bilinear_up(x, (7, 6))
        return y.square().sum() + ops.pool_tokens(k, (2, 3), (1, 2)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (1, 3):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = randn(B, 8, 4, 6).to(memory_format=layout).requires_grad_()
            k = randn(B, 2, 6, 8).requires_grad_()
            got = torch.autograd.grad(compiled(x, k), (x, k))
            expected = torch.autograd.grad(step(x, k), (x, k))
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


def resize(**change):
    arguments = dict(x=torch.zeros(1, 2, 4, 4), size=(2, 2), mode="area") | change
    return ops.resize(**arguments)


def area(**change):
    return ops.area_down(**(dict(x=torch.zeros(1, 2, 4, 4), size=(2, 2)) | change))


def pool(**change):
    return ops.pool_tokens(**(dict(x=torch.zeros(1, 2, 4, 4), grid=(2, 2), size=(1, 1)) | change))


@pytest.mark.parametrize(
    "function, change, error, text",
    [
        (area, dict(x=torch.zeros(2, 4, 4)), ValueError, r"expected x \[B, C, H, W\], got \[2, 4, 4\]"),
        (resize, dict(x=torch.zeros(2, 4, 4)), ValueError, r"expected x \[B, C, H, W\] or"),
        (resize, dict(x=torch.zeros(2, 4, 0, 4)), ValueError, "with H, W, T > 0"),
        (resize, dict(x=torch.zeros(1, 2, 4, 4).int()), TypeError, "expected x of float"),
        (resize, dict(x=None), TypeError, "expected x to be a tensor, got NoneType"),
        (resize, dict(size=(0, 3)), ValueError, r"expected a size of two positive numbers, got \(0, 3\)"),
        (resize, dict(size=(2,)), ValueError, r"expected a size of two positive numbers, got \(2,\)"),
        (resize, dict(mode="trilinear"), ValueError, "expected a mode of area, bilinear, bicubic for 2 axes"),
        (
            resize,
            dict(x=torch.zeros(1, 1, 2, 2, 2), mode="bicubic"),
            ValueError,
            "expected a mode of area, trilinear for 3 axes, got 'bicubic'",
        ),
        (pool, dict(x=torch.zeros(2, 4, 4)), ValueError, r"expected x \[B, H, L, D\]"),
        (pool, dict(grid=(2, 3)), ValueError, r"expected tokens 0..6 within 4"),
        (pool, dict(start=1), ValueError, r"expected tokens 1..5 within 4"),
        (pool, dict(size=(0, 1)), ValueError, "expected a size of two positive numbers"),
        (pool, dict(mode="nearest"), ValueError, "expected a mode of area, bilinear, bicubic, got 'nearest'"),
    ],
)
def test_bad_input_is_refused(function, change, error, text):
    with pytest.raises(error, match=text):
        function(**change)
