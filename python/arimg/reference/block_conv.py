"""Convolutions and group norm in plain torch: the oracle of `arimg.ops.block_conv`.

Arithmetic is float32, results have the type of x. All functions are differentiable.
"""

import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    up: int = 1,
) -> Tensor:
    """conv(silu(x * scale + shift) at `up` times the size) + residual; x [B, C, H, W], scale and shift
    [B, C].
    """
    h = wide(x)
    if scale is not None and shift is not None:
        h = F.silu(h * wide(scale)[:, :, None, None] + wide(shift)[:, :, None, None])
    if up > 1:
        h = F.interpolate(h, scale_factor=float(up), mode="nearest")
    out = F.conv2d(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype), padding=1)
    return (out if residual is None else out + wide(residual)).to(x.dtype)


def group_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Group norm (Wu & He 2018) of x [B, C, ...] as scale and shift per channel, [B, C]."""
    grouped = wide(x).reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    inverse = (grouped.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
    scale = (inverse * weight.to(mean.dtype).view(groups, -1)).flatten(1)
    return scale, bias.to(mean.dtype) - mean.expand(-1, -1, x.shape[1] // groups).flatten(1) * scale
