"""3x3 convolutions in Winograd's form against torch's, and linear layers in 16 bits against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import _library, ops, reference
from arimg.nn.conv import Conv3x3, norm_silu_conv, upsample_conv
from arimg.nn.linear import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=_library.SIMD_LEVELS)
def level(request: pytest.FixtureRequest):
    """The convolution has CPU kernels alone."""
    if request.param not in _library.simd_levels():
        pytest.skip(f"this machine has no {request.param}")
    before = _library.simd_level()
    _library.set_simd_level(request.param)
    yield request.param
    _library.set_simd_level(before)


def case(batch, c_in, c_out, h, w, up=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(c_in + h)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    x, weight, bias = normal(batch, c_in, h, w), normal(c_out, c_in, 3, 3), normal(c_out)
    affine = torch.randn(2, batch, c_in, generator=g)
    keywords = {"scale": affine[0], "shift": affine[1], "residual": normal(batch, c_out, h * up, w * up)}
    return x, weight, bias, {**keywords, "up": up}


def assert_rounding(got: Tensor, x, weight, bias, scale=None, shift=None, residual=None, up=1) -> None:
    """F(4x4, 3x3) rounds values that its transforms have enlarged by up to 8 in each direction: the bound is
    8 * 8 units of roundoff of the sum of magnitudes, and the rounding to the storage type. (The error of
    torch's own convolution, which is another one on each machine, is no measure.)
    """
    wide = [None if t is None else t.double() for t in (x, weight, bias, scale, shift, residual)]
    x, weight, bias, scale, shift, residual = wide
    exact = reference.conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual, up=up)
    h = x if scale is None else F.silu(x * scale[..., None, None] + shift[..., None, None])
    h = F.interpolate(h, scale_factor=up, mode="nearest") if up > 1 else h
    magnitude = F.conv2d(h.abs(), weight.abs(), padding=1).max() + exact.abs().max()
    error = (got.double() - exact).abs()
    stored = torch.finfo(got.dtype).eps / 2 * exact.abs() if got.dtype != torch.float32 else 0
    assert (error <= 64 * 2.0**-24 * magnitude + stored).all(), f"error {error.max():.2e}"


SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 4, 4),
    (1, 7, 33, 5, 3),
    (2, 16, 32, 8, 12),
    (1, 33, 3, 9, 30),
    (3, 20, 70, 17, 6),
    (1, 160, 64, 36, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("up", [1, 2])
def test_conv3x3_is_the_convolution(level, shape, up) -> None:
    x, weight, bias, keywords = case(*shape, up=up)
    got = ops.conv3x3(x, weight, bias, **keywords)
    assert got.shape == keywords["residual"].shape
    assert_rounding(got, x, weight, bias, **keywords)
    assert_rounding(ops.conv3x3(x, weight, up=up), x, weight, None, up=up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_types(level, dtype) -> None:
    x, weight, bias, keywords = case(2, 24, 40, 10, 9, dtype=dtype)
    got = ops.conv3x3(x, weight, bias, **keywords)
    assert got.dtype == dtype
    assert_rounding(got, x, weight, bias, **keywords)
    mixed = ops.conv3x3(x, weight.float(), bias.float(), **keywords)  # the same numbers
    assert torch.equal(mixed, got)


def test_any_layout_of_x_gives_the_same_bits(level) -> None:
    x, weight, bias, keywords = case(2, 20, 33, 12, 8)
    got = ops.conv3x3(x, weight, bias, **keywords)
    for layout in (torch.contiguous_format, torch.channels_last):
        again = x.contiguous(memory_format=layout)
        residual = keywords["residual"].contiguous(memory_format=layout)
        assert torch.equal(ops.conv3x3(again, weight, bias, **{**keywords, "residual": residual}), got)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(
        ops.conv3x3(strided, weight.transpose(2, 3).contiguous().transpose(2, 3), bias, **keywords), got
    )


def test_each_image_is_worked_alone_whatever_the_threads(level) -> None:
    # 40 x 200 pixels of 64 channels are more than one chunk; one row of tiles is not.
    for h, w in ((40, 200), (4, 8)):
        x, weight, bias, keywords = case(3, 64, 70, h, w)
        together = ops.conv3x3(x, weight, bias, **keywords)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(ops.conv3x3(x, weight, bias, **keywords), together)
            for b in range(3):
                one = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in keywords.items()}
                assert torch.equal(ops.conv3x3(x[b : b + 1], weight, bias, **one)[0], together[b])
        finally:
            torch.set_num_threads(threads)


def test_chunks_leave_no_seam(level) -> None:
    """Rows far from the border of a tall image equal the same rows of a short one, in another chunk."""
    x, weight, bias, _ = case(1, 64, 32, 80, 200)
    whole, part = ops.conv3x3(x, weight, bias), ops.conv3x3(x[:, :, 20:60], weight, bias)
    assert torch.equal(whole[:, :, 24:56], part[:, :, 4:36])


def test_nan_and_infinity_stay_near_their_pixel(level) -> None:
    x, weight, bias, keywords = case(1, 8, 6, 24, 24)
    clean = ops.conv3x3(x, weight, bias, **keywords)
    for bad in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[0, 3, 9, 9] = bad
        got = ops.conv3x3(dirty, weight, bias, **keywords)
        reached = ~got.isfinite()
        assert reached[0, :, 8:11, 8:11].all()
        assert not reached[0, :, :4].any() and not reached[0, :, 16:].any()  # the tile and those beside it
        assert torch.equal(got[0, :, 16:], clean[0, :, 16:])


def test_empty_inputs(level) -> None:
    weight = torch.randn(5, 4, 3, 3)
    assert ops.conv3x3(torch.empty(0, 4, 8, 8), weight).shape == (0, 5, 8, 8)
    assert ops.conv3x3(torch.empty(2, 4, 0, 8), weight, up=2).shape == (2, 5, 0, 16)
    bias = torch.randn(5)
    none = ops.conv3x3(torch.empty(1, 0, 3, 3), torch.empty(5, 0, 3, 3), bias)
    assert torch.equal(none, bias[None, :, None, None].expand(1, 5, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_affine(level, dtype) -> None:
    torch.manual_seed(0)
    for shape, groups in (((2, 12, 5, 7), 3), ((1, 160, 40, 40), 32), ((2, 8, 1, 1), 8)):
        x = (torch.randn(shape) * 3 + 50).to(dtype)
        weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
        scale, shift = ops.group_norm_affine(x, weight, bias, groups)
        exact_scale, exact_shift = reference.group_norm_affine(x.double(), weight, bias, groups)
        assert torch.allclose(scale.double(), exact_scale, rtol=1e-5)
        # b - mean * scale: the mean's relative error, 2^-24 and its sum's, times what is taken away
        assert (shift - exact_shift).abs().max() < 1e-6 * (exact_shift.abs() + exact_scale.abs() * 50).max()
        normed = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps=1e-6)
        got = x.double() * exact_scale[..., None, None] + exact_shift[..., None, None]
        assert torch.allclose(got, normed, atol=1e-6 * max(1, exact_scale.abs().max()))


def test_a_batch_norms_each_image_alone(level) -> None:
    x, weight, bias = torch.randn(3, 32, 60, 60), torch.randn(32), torch.randn(32)
    scale, shift = ops.group_norm_affine(x, weight, bias, 8)
    for b in range(3):
        alone = ops.group_norm_affine(x[b : b + 1], weight, bias, 8)
        assert torch.equal(alone[0][0], scale[b]) and torch.equal(alone[1][0], shift[b])


def test_opcheck_and_compile() -> None:
    x, weight, bias, keywords = case(2, 6, 5, 8, 12, up=2)
    last = x.permute(0, 2, 3, 1).contiguous()
    residual = keywords["residual"].permute(0, 2, 3, 1).contiguous()
    arguments = (last, weight, bias, keywords["scale"], keywords["shift"], residual, 2)
    torch.library.opcheck(torch.ops.arimg.conv3x3, arguments)
    torch.library.opcheck(torch.ops.arimg.group_norm_affine, (last, torch.randn(6), torch.randn(6), 3, 1e-6))

    @torch.compile(fullgraph=True, backend="eager")
    def block(x, residual):
        scale, shift = ops.group_norm_affine(x, weight[:, 0, 0, 0].new_ones(6), weight.new_zeros(6), 3)
        return ops.conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual, up=2)

    scale, shift = ops.group_norm_affine(x, torch.ones(6), torch.zeros(6), 3)
    eager = ops.conv3x3(x, weight, bias, scale=scale, shift=shift, residual=keywords["residual"], up=2)
    assert torch.equal(block(x, keywords["residual"]), eager)


def test_gradients_go_through_the_formula() -> None:
    x, weight, bias, keywords = case(1, 3, 4, 5, 6, dtype=torch.float64)
    x, weight, residual = (t.requires_grad_() for t in (x, weight, keywords["residual"]))
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        ops.conv3x3(x, weight, bias)
    torch.autograd.gradcheck(
        lambda x, w, r: reference.conv3x3(
            x, w, bias, scale=keywords["scale"].double(), shift=keywords["shift"].double(), residual=r
        ),
        (x, weight, residual),
    )
    single = [t.detach().float().requires_grad_() for t in (x, weight)]
    ops.conv3x3(*single).sum().backward()
    assert all(t.grad is not None for t in single)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 4, 8)}, ValueError, r"expected x \[B, C, H, W\], got \[2, 4, 8\]"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        (
            {"weight": torch.randn(5, 3, 3, 3)},
            ValueError,
            r"expected weight \[N, 4, 3, 3\], got \[5, 3, 3, 3\]",
        ),
        ({"bias": torch.randn(4)}, ValueError, r"expected bias \[5\], got \[4\]"),
        ({"bias": torch.randn(5).half()}, TypeError, "weight's dtype"),
        ({"scale": torch.randn(2, 4)}, ValueError, "together"),
        ({"scale": torch.randn(2, 4), "shift": torch.randn(2, 5)}, ValueError, r"expected shift \[2, 4\]"),
        ({"residual": torch.randn(2, 5, 8, 7)}, ValueError, r"expected residual \[2, 5, 8, 8\]"),
        ({"up": 3}, ValueError, "expected up of 1 or 2, got 3"),
    ],
)
def test_bad_input_is_named(change, error, message) -> None:
    good = {"x": torch.randn(2, 4, 8, 8), "weight": torch.randn(5, 4, 3, 3), "bias": torch.randn(5)}
    with pytest.raises(error, match=message):
        ops.conv3x3(**{**good, **change})
    with pytest.raises(ValueError, match="groups that divide 4 channels, got 3"):
        ops.group_norm_affine(good["x"], torch.ones(4), torch.zeros(4), 3)


def modules(c_in: int, c_out: int) -> tuple[nn.GroupNorm, Conv3x3]:
    torch.manual_seed(c_in)
    norm, conv = nn.GroupNorm(8, c_in, eps=1e-6), Conv3x3(c_in, c_out)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv


@pytest.mark.skipif(_library.simd_level() == "scalar", reason="the fast form is taken from AVX2 on")
def test_modules_take_the_fast_form_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv = modules(32, 40)
    x, residual = torch.randn(2, 32, 20, 24) * 3 + 5, torch.randn(2, 40, 20, 24)
    calls = []
    run = ops.conv3x3
    monkeypatch.setattr(ops, "conv3x3", lambda *a, **k: calls.append(1) or run(*a, **k))
    slow = norm_silu_conv(norm, conv, x, residual)  # the weight wants a gradient
    slow.sum().backward()
    assert not calls and conv.weight.grad is not None and norm.weight.grad is not None
    with torch.no_grad():
        assert torch.allclose(norm_silu_conv(norm, conv, x, residual), slow, atol=1e-4)
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert torch.equal(upsample_conv(conv, x), conv(larger))
        assert len(calls) == 3
        before = conv(x)
        conv.weight.data.mul_(2)  # nothing of the filters is kept
        conv.bias.data.mul_(2)
        assert torch.allclose(conv(x), 2 * before, rtol=1e-4, atol=1e-3)
        assert len(calls) == 5
        with torch.autocast("cpu", dtype=torch.bfloat16):  # x and the result are rounded, the weights are not
            half = norm_silu_conv(norm, conv, x, residual)
            assert half.dtype == torch.bfloat16 and len(calls) == 6
        exact = norm_silu_conv(norm, conv, x.bfloat16().float(), residual.bfloat16().float())
        assert ((half - exact).abs() <= 2.0**-8 * exact.abs() + 1e-3).all()
        conv.double()(x.double())
        assert len(calls) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 9, 100])
def test_16_bit_products_accumulate_in_float32(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 256), torch.randn(64, 256) / 16, torch.randn(64)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    got = linear(x, weight, bias)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()
