"""Softmax attention without masks: one key interval per query row.

q is [B, H, L, D], k and v [B, Hkv, keys, D]; any strides with contiguous channels are read in place (views of
one qkv tensor need no copy). float32, bfloat16 or float16; scores and softmax in float32. See
docs/ops/attention.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["TilePlan", "row_interval_attention"]

MAX_HEAD_DIM = 256
KEY_ROWS = 64  # keys per entry of TilePlan.key_rows, kAttentionKeyRows in csrc/attention/contract.h


class TilePlan(NamedTuple):
    """How the rows of a layout are cut into tiles, made once on the host (`Layout.visibility`)."""

    row_tiles: Tensor  # int32 [tiles + 1]: tile t is the rows [row_tiles[t], row_tiles[t + 1])
    tile_rows: int  # of the longest
    key_rows: Tensor  # int32 [ceil(keys / 64), 2]: the rows that see some of these 64 keys lie within


def row_interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    *,
    scale: float | None = None,
    head_scale: Tensor | None = None,
    sinks: int = 0,
    self_key: bool = False,
    plan: TilePlan | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention in which query row i sees the keys row_start[i] <= j < row_end[i], zero where there are none.

    q [B, H, L, D]; k, v [B, Hkv, keys, D] with H a multiple of Hkv; D a multiple of 8 up to 256; row_start,
    row_end int32 [L] or [B, L], such as `Layout.intervals` gives. sinks: keys 0..sinks-1 are seen by all
    rows; self_key: row i also sees key i + keys - L. scale defaults to 1 / sqrt(D); head_scale float32 [H]
    multiplies the scores of each head. plan: of the layout, for speed alone. Differentiable in q, k, v and
    head_scale. Returns [B, H, L, D], laid out in memory as [B, L, H, D], so that `.transpose(1,
    2).flatten(2)` is free; with return_lse also the float32 logarithm of each row's sum of exponentials, [B,
    H, L], without a gradient. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    rule = _Rule(row_start, row_end, plan, sinks, self_key, scale)
    if torch.compiler.is_compiling():
        rule.check(q, k, v, head_scale)
    ops = kernels(q.detach())
    if ops is None:
        rule.check(q, k, v, head_scale)
        return reference.row_interval_attention(
            q, k, v, row_start, row_end, scale=scale, head_scale=head_scale, sinks=sinks, self_key=self_key,
            return_lse=return_lse,
        )  # fmt: skip
    # The checks take as long as a short call: what is wrong is looked up once the operator refuses.
    try:
        out, lse = _attend(ops, q, k, v, head_scale, rule, return_lse)
    except (RuntimeError, AttributeError, TypeError, IndexError):
        rule.check(q, k, v, head_scale)
        raise
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


def _attend(
    ops: Any, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, rule: _Rule, return_lse: bool
) -> tuple[Tensor, Tensor]:
    if not (q.device == k.device == v.device == rule.row_start.device == rule.row_end.device):
        raise RuntimeError("expected tensors of one device")  # what differs is said by the check that follows
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, head_scale)):
        out: tuple[Tensor, Tensor] = _RowIntervalAttention.apply(q, k, v, head_scale, rule)
        return out
    return rule.forward(ops, _rows(q), _rows(k), _rows(v), head_scale, return_lse)


class _Rule(NamedTuple):
    """What does not depend on the values."""

    row_start: Tensor
    row_end: Tensor
    plan: TilePlan | None
    sinks: int
    self_key: bool
    scale: float | None

    def check(self, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None) -> None:
        _check(q, k=k, v=v)
        _check_heads(q, k=k, v=v)
        for name, t in (("row_start", self.row_start), ("row_end", self.row_end)):
            _check_interval(name, t, q)
        if self.row_start.dim() != self.row_end.dim():
            raise ValueError(
                f"expected row_end of row_start's shape {list(self.row_start.shape)}, "
                f"got {list(self.row_end.shape)}"
            )
        if self.sinks < 0:
            raise ValueError(f"expected sinks >= 0, got {self.sinks}")
        if self.self_key and k.shape[2] < q.shape[2]:
            raise ValueError(f"expected a key per query ({q.shape[2]}) for self_key, got {k.shape[2]} keys")
        _check_head_scale(head_scale, q)

    def forward(
        self, ops: Any, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """(out [B, L, H, D], lse)."""
        tiles, rows = (None, 0) if self.plan is None else (self.plan.row_tiles, self.plan.tile_rows)
        out: tuple[Tensor, Tensor] = ops.row_interval_attention(
            q, k, v, self.row_start.contiguous(), self.row_end.contiguous(), tiles, rows, head_scale,
            self.sinks, self.self_key, _scale(q, self.scale), with_lse,
        )  # fmt: skip
        return out


class _RowIntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None, rule: _Rule
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_rows(t.detach()) for t in (q, k, v))
        ops = kernels(q)
        assert ops is not None
        out, lse = rule.forward(ops, q, k, v, head_scale, True)
        ctx.save_for_backward(q, k, v, head_scale, out, lse)
        ctx.rule = rule
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, head_scale, out, lse = ctx.saved_tensors
        rule: _Rule = ctx.rule
        ops = kernels(q)
        assert ops is not None
        key_rows = None if rule.plan is None else rule.plan.key_rows
        grad = _rows(grad.transpose(1, 2))
        grad_q, grad_k, grad_v = ops.row_interval_attention_backward(
            grad, q, k, v, out.transpose(1, 2), lse, rule.row_start.contiguous(),
            rule.row_end.contiguous(), key_rows, head_scale, rule.sinks, rule.self_key, _scale(q, rule.scale),
        )  # fmt: skip
        grad_scale = None
        if head_scale is not None:
            if ctx.needs_input_grad[3]:
                grad_scale = (q.float() * grad_q.float()).sum((0, 2, 3)).to(head_scale.dtype)
            grad_q = (grad_q * head_scale[:, None, None]).to(q.dtype)
        return grad_q, grad_k, grad_v, grad_scale, None


def _check(q: Tensor, **others: Tensor) -> None:
    expect_floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"expected q [B, H, L, D], got {list(q.shape)}")
    D = q.shape[3]
    if not (0 < D <= MAX_HEAD_DIM and D % 8 == 0):
        raise ValueError(f"expected a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {D}")
    for name, t in others.items():
        expect_like(name, t, "q", q)
        if t.dim() != 4:
            raise ValueError(f"expected {name} [B, H, L, D], got {list(t.shape)}")


def _check_heads(q: Tensor, *, k: Tensor, v: Tensor) -> None:
    B, H, _, D = q.shape
    shared = k.shape[1] > 0 and H % k.shape[1] == 0 if H > 0 else k.shape[1] == 0
    if not (k.shape[0] == B and k.shape[3] == D and shared):
        raise ValueError(f"expected k [{B}, a divisor of {H}, keys, {D}], got {list(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"expected v of k's shape {list(k.shape)}, got {list(v.shape)}")


def _check_interval(name: str, t: Tensor, q: Tensor) -> None:
    B, _, L, _ = q.shape
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise TypeError(f"expected {name} of int32, got {t.dtype}")
    if t.device != q.device:
        raise ValueError(f"expected {name} on q's device {q.device}, got {t.device}")
    fits = (t.dim() == 1 and t.shape[0] == L) or (t.dim() == 2 and t.shape[0] == B and t.shape[1] == L)
    if not fits:
        raise ValueError(f"expected {name} [{L}] or [{B}, {L}], got {list(t.shape)}")


def _check_head_scale(head_scale: Tensor | None, q: Tensor) -> None:
    if head_scale is None:
        return
    if not isinstance(head_scale, Tensor) or head_scale.dtype != torch.float32:
        got = head_scale.dtype if isinstance(head_scale, Tensor) else type(head_scale).__name__
        raise TypeError(f"expected head_scale of float32, got {got}")
    if head_scale.dim() != 1 or head_scale.shape[0] != q.shape[1] or head_scale.device != q.device:
        raise ValueError(
            f"expected head_scale [{q.shape[1]}] on {q.device}, "
            f"got {list(head_scale.shape)} on {head_scale.device}"
        )


def _rows(t: Tensor) -> Tensor:
    """Contiguous channels; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[3]) ** -0.5 if scale is None else scale


@fake("row_interval_attention")
def _row_interval_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor | None,
    row_end: Tensor | None,
    row_tiles: Tensor | None,
    tile_rows: int,
    head_scale: Tensor | None,
    sinks: int,
    self_key: bool,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    B, H, L, D = q.shape
    lse = q.new_empty((B if with_lse else 0, H, L), dtype=torch.float32)
    return q.new_empty((B, L, H, D)), lse


@fake("row_interval_attention_backward")
def _row_interval_attention_backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
