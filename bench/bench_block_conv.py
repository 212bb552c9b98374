"""The decoder's group norm, SiLU, 3x3 convolution and residual against torch's separate operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops

SHAPES = {
    "160 channels, 256 x 256": (160, 160, 256),
    "320 channels, 64 x 64": (320, 320, 64),
    "640 channels, 16 x 16": (640, 640, 16),
}


def fused(x, norm, weight, bias, residual):
    scale, shift = ops.group_norm_affine(x, *norm, 32)
    return ops.conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual)


def separate(x, norm, weight, bias, residual):
    return F.conv2d(F.silu(F.group_norm(x, 32, *norm, eps=1e-6)), weight, bias, padding=1) + residual


@pytest.mark.parametrize("peer", ["arimg", "torch", "torch, channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_silu_conv(shape, dtype, peer, measure):
    C, N, side = SHAPES[shape]
    torch.manual_seed(0)
    x, residual = torch.randn(1, C, side, side, dtype=dtype), torch.randn(1, N, side, side, dtype=dtype)
    weight, bias = (torch.randn(N, C, 3, 3) / (9 * C) ** 0.5).to(dtype), torch.randn(N, dtype=dtype)
    norm = (torch.randn(2, C) * 0.1 + 1).to(dtype)
    if peer != "torch":
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    arguments = (x, norm, weight, bias, residual)
    ours, theirs = fused(*arguments), separate(*arguments)
    assert torch.allclose(ours, theirs, atol=1e-4 if dtype == torch.float32 else 0.1)
    function = fused if peer == "arimg" else separate
    # Winograd's products: a quarter of the direct form's.
    flops = 2 * 36 / 16 * C * N * side * side
    group = f"norm + SiLU + 3x3 + residual, {shape}, {str(dtype).removeprefix('torch.')}"
    with torch.inference_mode():
        measure(group, peer, lambda: function(*arguments), bytes=3 * x.nbytes, flops=flops)
