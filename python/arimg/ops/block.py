"""The arithmetic between a transformer block's linear layers, each one pass over memory.

x and y are [B, L, C]; scale, shift and gate are [B, 1, C] (slices of one modulation tensor need no copy).
float32, bfloat16 or float16; arithmetic in float32; results have x's dtype. See docs/ops/block.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["gated_residual", "gated_residual_norm", "norm_modulate"]


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm over C without parameters, then * (1 + scale) + shift (AdaLN; Peebles & Xie 2023, 3.2).

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(x, scale=scale, shift=shift)
    ops = kernels(x, scale, shift)
    if ops is None:
        return reference.norm_modulate(x, scale, shift, eps=eps)
    return ops.norm_modulate(x.contiguous(), _rows(scale, x), _rows(shift, x), eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    _check(x, y=y, gate=gate)
    ops = kernels(x, y, gate)
    if ops is None:
        return reference.gated_residual(x, y, gate)
    return ops.gated_residual(x.contiguous(), y.contiguous(), _rows(gate, x))


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x_new, norm_modulate(x_new, scale, shift)) with x_new = x + gate * y, in one pass.

    The statistics are taken from x_new as stored, so the result equals the two separate operations.
    """
    _check(x, y=y, gate=gate, scale=scale, shift=shift)
    ops = kernels(x, y, gate, scale, shift)
    if ops is None:
        return reference.gated_residual_norm(x, y, gate, scale, shift, eps=eps)
    return ops.gated_residual_norm(
        x.contiguous(), y.contiguous(), _rows(gate, x), _rows(scale, x), _rows(shift, x), eps
    )


def _check(x: Tensor, y: Tensor | None = None, **modulation: Tensor) -> None:
    expect_floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"expected x [B, L, C], got {list(x.shape)}")
    if y is not None:
        expect_like("y", y, "x", x)
        if y.shape != x.shape:
            raise ValueError(f"expected y of x's shape {list(x.shape)}, got {list(y.shape)}")
    for name, t in modulation.items():
        expect_like(name, t, "x", x)
        # Comparisons one by one: `in` on symbolic sizes does not trace under torch.compile.
        fits = t.dim() == 3 and (t.shape[0] == 1 or t.shape[0] == x.shape[0])
        if not (fits and t.shape[1] == 1 and t.shape[2] == x.shape[2]):
            raise ValueError(f"expected {name} [{x.shape[0]}, 1, {x.shape[2]}], got {list(t.shape)}")


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """[B, 1, C] with contiguous channels; a single row serves every batch entry with stride 0."""
    if t.stride(2) != 1:
        t = t.contiguous()
    return t.expand(x.shape[0], 1, x.shape[2])


@fake("norm_modulate")
def _norm_modulate_fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@fake("gated_residual")
def _gated_residual_fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake("gated_residual_norm")
def _gated_residual_norm_fake(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
