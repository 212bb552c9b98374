"""The arithmetic between a transformer block's linear layers, each one pass over memory.

x and y are [B, L, C]; scale, shift and gate are [B, 1, C] (slices of one modulation tensor need no copy).
float32, bfloat16 or float16; arithmetic in float32; results have x's dtype. See docs/ops/block.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arimg import _library, reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["gated_residual", "gated_residual_norm", "norm_modulate"]

_MAX_CHANNELS = 7168  # of the gradient's kernel; beyond, the gradient goes through the reference


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, norm: str = "layer"
) -> Tensor:
    """LayerNorm over C without parameters, then * (1 + scale) + shift (AdaLN; Peebles & Xie 2023, 3.2).

    norm: "layer", or "rms" for x / sqrt(mean x^2 + eps). Raises ValueError or TypeError for shapes, dtypes or
    devices that do not fit.
    """
    _check(x, scale=scale, shift=shift)
    rms = _is_rms(norm)
    ops, grad = _kernels(x, scale, shift)
    if ops is None:
        return reference.norm_modulate(x, scale, shift, eps=eps, norm=norm)
    arguments = x.contiguous(), _rows(scale, x), _rows(shift, x), eps, rms
    result: Tensor = _NormModulate.apply(*arguments) if grad else ops.norm_modulate(*arguments)
    return result


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    _check(x, y=y, gate=gate)
    ops, grad = _kernels(x, y, gate)
    if ops is None:
        return reference.gated_residual(x, y, gate)
    arguments = x.contiguous(), y.contiguous(), _rows(gate, x)
    result: Tensor = _GatedResidual.apply(*arguments) if grad else ops.gated_residual(*arguments)
    return result


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """(x_new, norm_modulate(x_new, scale, shift)) with x_new = x + gate * y, in one pass.

    The statistics are taken from x_new as stored, so the result equals the two separate operations.
    """
    _check(x, y=y, gate=gate, scale=scale, shift=shift)
    rms = _is_rms(norm)
    ops, grad = _kernels(x, y, gate, scale, shift)
    if ops is None:
        return reference.gated_residual_norm(x, y, gate, scale, shift, eps=eps, norm=norm)
    arguments = x.contiguous(), y.contiguous(), _rows(gate, x), _rows(scale, x), _rows(shift, x), eps, rms
    result: tuple[Tensor, Tensor] = (
        _GatedResidualNorm.apply(*arguments) if grad else ops.gated_residual_norm(*arguments)
    )
    return result


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, rms: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.rms = eps, rms
        out: Tensor = _namespace().norm_modulate(x, scale, shift, eps, rms)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        grads = _namespace().norm_backward(x, grad.contiguous(), None, scale, None, None, ctx.eps, ctx.rms)
        return grads[0], grads[1], grads[2], None, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        out: Tensor = _namespace().gated_residual(x, y, gate)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        grads = _namespace().norm_backward(y, None, grad.contiguous(), None, y, gate, 0.0, False)
        return grad, grads[3], grads[4]


class _GatedResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        x_new, out = _namespace().gated_residual_norm(x, y, gate, scale, shift, eps, rms)
        ctx.save_for_backward(x_new, y, gate, scale)
        ctx.eps, ctx.rms = eps, rms
        return x_new, out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_x: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x_new, y, gate, scale = ctx.saved_tensors
        grads = _namespace().norm_backward(
            x_new, grad_out.contiguous(), grad_x.contiguous(), scale, y, gate, ctx.eps, ctx.rms
        )
        return grads[0], grads[3], grads[4], grads[1], grads[2], None, None


def _kernels(x: Tensor, *others: Tensor) -> tuple[Any | None, bool]:
    """The operators, or None for the reference, and whether a gradient is asked for."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others))
    if not grad:
        return kernels(x, *others), False
    return (kernels(x.detach()) if x.shape[2] <= _MAX_CHANNELS else None), True


def _namespace() -> Any:
    ops = _library.ops()
    assert ops is not None
    return ops


def _is_rms(norm: str) -> bool:
    if norm not in ("layer", "rms"):
        raise ValueError(f"expected the norm layer or rms, got {norm!r}")
    return norm == "rms"


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
def _norm_modulate_fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float, rms: bool) -> Tensor:
    return torch.empty_like(x)


@fake("gated_residual")
def _gated_residual_fake(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake("gated_residual_norm")
def _gated_residual_norm_fake(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@fake("norm_backward")
def _norm_backward_fake(
    x: Tensor,
    grad_out: Tensor | None,
    grad_residual: Tensor | None,
    scale: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    normed, gated = int(grad_out is not None), int(y is not None)
    return (
        torch.empty_like(x),
        x.new_empty(batch, normed, channels),
        x.new_empty(batch, normed, channels),
        x.new_empty(batch, length * gated, channels),
        x.new_empty(batch, gated, channels),
    )
