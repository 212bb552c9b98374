"""Convolutions in Winograd's form against torch's, and linear layers in 16 bits against float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.nn import conv as conv_module
from arimg.nn.conv import Conv3x3, norm_silu_conv, upsample_conv
from arimg.nn.linear import linear


def case(
    c_in: int, c_out: int, h: int, w: int, batch: int = 1
) -> tuple[nn.GroupNorm, Conv3x3, Tensor, Tensor]:
    torch.manual_seed(c_in + h)
    norm, conv = nn.GroupNorm(8, c_in, eps=1e-6), Conv3x3(c_in, c_out, fast=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv, torch.randn(batch, c_in, h, w) * 3 + 5, torch.randn(batch, c_out, h, w)


def activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight.to(x), norm.bias.to(x), norm.eps))


def direct(norm: nn.GroupNorm, conv: Conv3x3, x: Tensor, residual: Tensor) -> Tensor:
    return F.conv2d(activated(norm, x), conv.weight.to(x), conv.bias.to(x), padding=1) + residual


def assert_close(out: Tensor, exact: Tensor, conv: Conv3x3, x: Tensor) -> None:
    """F(4x4, 3x3) rounds values that its transforms have enlarged by up to 8 in each direction: the bound is
    8 * 8 units of roundoff of the sum of magnitudes. (The error of torch's own convolution, which is another
    one on each machine, is no measure.)
    """
    magnitude = F.conv2d(x.abs(), conv.weight.to(x).abs(), padding=1)
    assert (out - exact).abs().max() < 64 * 2.0**-24 * magnitude.max()


@pytest.mark.parametrize(
    ("c_in", "c_out", "h", "w"), [(32, 40, 64, 64), (64, 32, 36, 116), (32, 32, 4, 1024)]
)
def test_winograd_is_the_convolution(c_in: int, c_out: int, h: int, w: int) -> None:
    norm, conv, x, residual = case(c_in, c_out, h, w)
    with torch.no_grad():
        assert conv._suits(x)
        exact = direct(norm, conv, x.double(), residual.double())
        assert_close(norm_silu_conv(norm, conv, x, residual), exact, conv, activated(norm, x.double()))
        bare = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        assert_close(conv(x), bare, conv, x.double())


def test_upsampling_is_part_of_the_convolution() -> None:
    _, conv, x, _ = case(32, 40, 36, 58, batch=2)
    with torch.no_grad():
        assert conv._suits(x, scale=2) and not conv._suits(x)
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert torch.equal(upsample_conv(conv, x), conv(larger))
        small = x[:, :, :4, :4]
        assert not conv._suits(small, scale=2)
        assert torch.equal(upsample_conv(conv, small), conv(F.interpolate(small, scale_factor=2.0)))


def test_each_image_is_worked_alone() -> None:
    norm, conv, x, residual = case(32, 32, 64, 64, batch=3)
    with torch.no_grad():
        together = norm_silu_conv(norm, conv, x, residual)
        for b in range(3):
            assert torch.equal(norm_silu_conv(norm, conv, x[b : b + 1], residual[b : b + 1])[0], together[b])


def test_the_strips_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv, x, residual = case(32, 32, 64, 64)
    with torch.no_grad():
        whole = norm_silu_conv(norm, conv, x, residual)
        monkeypatch.setattr(conv_module, "_STRIP_TILES", 48)  # 12 rows: the last strip is shorter
        assert torch.allclose(norm_silu_conv(norm, conv, x, residual), whole, atol=1e-5)


def test_gradients_small_images_and_slow_layers_go_to_torch() -> None:
    norm, conv, x, residual = case(32, 32, 64, 64)
    assert not conv._suits(x)  # the weight wants a gradient
    out = norm_silu_conv(norm, conv, x, residual)
    assert torch.allclose(out, direct(norm, conv, x, residual), atol=1e-5)
    out.sum().backward()
    assert conv.weight.grad is not None and norm.weight.grad is not None
    with torch.no_grad():
        assert (
            not conv._suits(x[:, :, :32, :32])
            and not conv._suits(x[:, :, :62])
            and not conv._suits(x.double())
        )
        assert not Conv3x3(32, 32)._suits(x)
        before = conv(x)
        conv.weight.data.mul_(2)
        conv.bias.data.mul_(2)
        assert torch.allclose(conv(x), 2 * before, rtol=1e-4, atol=1e-3)


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
