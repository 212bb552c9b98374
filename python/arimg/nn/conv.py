"""3x3 convolutions with the group norm and SiLU before them, fast on the CPU where no gradient is needed.

`arimg.ops.conv3x3` takes a quarter of the direct form's products and reads and writes nothing but the input,
the residual and the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import _library, ops


class Conv3x3(nn.Conv2d):
    """3x3 convolution of stride 1 and padding 1; where no gradient is wanted, in Winograd's form (errors of a
    few 1e-6).
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3x3(_stored(x), self.weight, self.bias) if suits(self, x) else super().forward(x)


def suits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `ops.conv3x3` takes x and this 3x3 convolution (stride 1, padding 1), and is the faster way."""
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (x.dtype == conv.weight.dtype or torch.is_autocast_enabled("cpu"))
        and _library.simd_level() in ("avx2", "avx512")  # without, torch's own convolution is faster
        and not (torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad))
    )


def _stored(x: Tensor) -> Tensor:
    """x in the type of a convolution's result: under autocast the 16-bit one."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) + residual, x and the result [B, C, H, W]."""
    if suits(conv, x):
        x = _stored(x)
        scale, shift = ops.group_norm_affine(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps)
        residual = None if residual is None else residual.to(x.dtype)
        return ops.conv3x3(x, conv.weight, conv.bias, scale=scale, shift=shift, residual=residual)
    out = conv(F.silu(norm(x), inplace=True))
    return out if residual is None else out + residual


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x at twice the size by nearest neighbour): [B, C, H, W] -> [B, N, 2H, 2W]."""
    if suits(conv, x):  # no tensor of the larger size is written but the result
        return ops.conv3x3(_stored(x), conv.weight, conv.bias, up=2)
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
