"""A decoder's 3x3 convolutions on the CPU, with the group norm, SiLU, doubling and residual around them.

float32, bfloat16 or float16; arithmetic in float32; results have x's dtype. CPU kernels alone: on a GPU the
formula runs in torch, whose library has Winograd kernels of its own. See docs/ops/block.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import cpu_kernels, expect_floating, expect_like, fake

__all__ = ["conv3x3", "group_norm_affine"]


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
    """conv(silu(x * scale + shift) at `up` times the size) + residual, with zero padding of 1.

    x [B, C, H, W], best channels last; weight [N, C, 3, 3]; bias [N]; scale and shift [B, C] (without them
    x itself is convolved); up 1 or 2 (nearest neighbour); residual [B, N, up H, up W]. Returns [B, N, up H,
    up W], channels last on the CPU. Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv 1509.09308): errors of a few
    1e-6 of the sum of magnitudes. An image's result does not depend on the batch it is in.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(x, weight, bias, scale, shift, residual, up)
    ops = cpu_kernels(x, weight, bias, scale, shift, residual)
    if ops is None:
        return reference.conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual, up=up)
    if scale is not None and shift is not None:
        scale, shift = scale.float().contiguous(), shift.float().contiguous()
    if residual is not None:
        residual = _channels_last(residual)
    out: Tensor = ops.conv3x3(
        _channels_last(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        scale,
        shift,
        residual,
        up,
    )
    return out.permute(0, 3, 1, 2)


def group_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Group norm (Wu & He 2018) of x [B, C, H, W] as float32 scale and shift per channel, [B, C].

    group_norm(x) = x * scale + shift. One pass over x; sums in double. weight and bias [C].
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"expected x [B, C, H, W], got {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"expected groups that divide {x.shape[1]} channels, got {groups}")
    for name, t in (("weight", weight), ("bias", bias)):
        _expect_vector(name, t, x.shape[1], x)
    ops = cpu_kernels(x, weight, bias)
    if ops is None:
        return reference.group_norm_affine(x, weight, bias, groups, eps=eps)
    result: tuple[Tensor, Tensor] = ops.group_norm_affine(
        _channels_last(x), weight.float().contiguous(), bias.float().contiguous(), groups, eps
    )
    return result


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _expect_vector(name: str, t: Tensor, count: int, x: Tensor) -> None:
    expect_floating(name, t)
    if t.dim() != 1 or t.shape[0] != count:
        raise ValueError(f"expected {name} [{count}], got {list(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"expected {name} on x's device {x.device}, got {t.device}")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    up: int,
) -> None:
    expect_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"expected x [B, C, H, W], got {list(x.shape)}")
    B, C, H, W = x.shape
    expect_floating("weight", weight)
    if weight.dim() != 4 or weight.shape[1] != C or weight.shape[2] != 3 or weight.shape[3] != 3:
        raise ValueError(f"expected weight [N, {C}, 3, 3], got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"expected weight on x's device {x.device}, got {weight.device}")
    N = weight.shape[0]
    if bias is not None:
        _expect_vector("bias", bias, N, x)
        expect_like("bias", bias, "weight", weight)
    if (scale is None) != (shift is None):
        raise ValueError("expected scale and shift together, got one without the other")
    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            continue
        expect_floating(name, t)
        if t.dim() != 2 or t.shape[0] != B or t.shape[1] != C:
            raise ValueError(f"expected {name} [{B}, {C}], got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {t.device}")
    if up != 1 and up != 2:
        raise ValueError(f"expected up of 1 or 2, got {up}")
    if residual is not None:
        expect_like("residual", residual, "x", x)
        if residual.shape != (B, N, up * H, up * W):
            raise ValueError(f"expected residual [{B}, {N}, {up * H}, {up * W}], got {list(residual.shape)}")


@fake("conv3x3")
def _conv3x3_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    up: int,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] * up, x.shape[2] * up, weight.shape[0]))


@fake("group_norm_affine")
def _group_norm_affine_fake(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[3])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
