"""Softmax attention without masks: one key interval per query row, or all of a cache.

q, k, v are [B, H, L, D]; any strides with contiguous channels are read in place (views of one qkv tensor need
no copy). float32, bfloat16 or float16; scores and softmax in float32. See docs/ops/attention.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["cached_attention", "row_interval_attention"]

MAX_HEAD_DIM = 256


def row_interval_attention(
    q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention in which query row i sees the keys row_start[i] <= j < row_end[i], zero where there are none.

    q, k, v [B, H, L, D] with D a multiple of 8 up to 256; row_start, row_end int32 [L] or [B, L], such as
    `Layout.intervals` gives; scale defaults to 1 / sqrt(D). Returns [B, H, L, D].
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(q, k=k, v=v)
    for name, t in (("k", k), ("v", v)):
        if t.shape != q.shape:
            raise ValueError(f"expected {name} of q's shape {list(q.shape)}, got {list(t.shape)}")
    for name, t in (("row_start", row_start), ("row_end", row_end)):
        _check_interval(name, t, q)
    if row_start.dim() != row_end.dim():
        raise ValueError(
            f"expected row_end of row_start's shape {list(row_start.shape)}, got {list(row_end.shape)}"
        )
    ops = kernels(q, k, v)
    if ops is None:
        return reference.row_interval_attention(q, k, v, row_start, row_end, scale=scale)
    return ops.row_interval_attention(
        _rows(q), _rows(k), _rows(v), row_start.contiguous(), row_end.contiguous(), _scale(q, scale)
    )


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, *, scale: float | None = None
) -> Tensor:
    """Attention of new queries over the first `length` cached keys, all of which every query sees.

    q [B, H, Lq, D], k_cache and v_cache [B, H, Lmax, D]; length 0..Lmax (0 gives zeros); scale defaults to
    1 / sqrt(D). Returns [B, H, Lq, D], laid out in memory as [B, Lq, H, D], so that
    `.transpose(1, 2).flatten(2)` is free.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(q, k_cache=k_cache, v_cache=v_cache)
    B, H, _, D = q.shape
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not (t.shape[0] == B and t.shape[1] == H and t.shape[2] == k_cache.shape[2] and t.shape[3] == D):
            raise ValueError(f"expected {name} [{B}, {H}, {k_cache.shape[2]}, {D}], got {list(t.shape)}")
    if not 0 <= length <= k_cache.shape[2]:
        raise ValueError(f"expected a length of 0..{k_cache.shape[2]}, got {length}")
    ops = kernels(q, k_cache, v_cache)
    if ops is None:
        return reference.cached_attention(q, k_cache, v_cache, length, scale=scale)
    out = ops.cached_attention(_rows(q), _rows(k_cache), _rows(v_cache), length, _scale(q, scale))
    return out.transpose(1, 2)


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


def _rows(t: Tensor) -> Tensor:
    """Contiguous channels; the other strides are free."""
    return t if t.stride(3) == 1 else t.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[3]) ** -0.5 if scale is None else scale


@fake("row_interval_attention")
def _row_interval_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


@fake("cached_attention")
def _cached_attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, scale: float) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D))
