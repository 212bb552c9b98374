"""Writes to a key/value cache.

float32, bfloat16 or float16; lengths are summed in float32. See docs/ops/kv_cache.md.
"""

from __future__ import annotations

from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["append_qk_norm_"]

MAX_HEAD_DIM = 256


def append_qk_norm_(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> Tensor:
    """Writes the keys and values of new tokens at positions [start, start + L) and returns their queries.

    k_cache, v_cache [B, H, Lmax, D] with contiguous rows, qkv [B, L, 3, H, D], D at most 256. With l2_norm,
    q and k become x / max(|x|, 1e-12) per head, and q is multiplied by q_scale [H] (query-key normalisation;
    Henry et al. 2020); without, they are copied. Returns q [B, H, L, D].
    Raises ValueError or TypeError, leaving the cache as it was, for input that does not fit.
    """
    _check(k_cache, v_cache, qkv, start, q_scale, l2_norm)
    # A cache that carries gradients is written by the reference, which autograd can follow.
    ops = kernels(qkv, k_cache, v_cache, q_scale)
    if ops is None:
        return reference.append_qk_norm_(k_cache, v_cache, qkv, start, q_scale, l2_norm)
    if q_scale is not None:
        q_scale = q_scale.float().contiguous()
    return ops.append_qk_norm_(k_cache, v_cache, qkv.contiguous(), start, q_scale, l2_norm)


def _check(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> None:
    expect_floating("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"expected qkv [B, L, 3, H, D], got {list(qkv.shape)}")
    B, L, _, H, D = qkv.shape
    if D > MAX_HEAD_DIM:
        raise ValueError(f"expected a head dim of at most {MAX_HEAD_DIM}, got {D}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect_like(name, t, "qkv", qkv)
        if t.dim() != 4 or t.shape[0] != B or t.shape[1] != H or t.shape[3] != D:
            raise ValueError(f"expected {name} [{B}, {H}, Lmax, {D}], got {list(t.shape)}")
        if t.stride(3) != 1 or t.stride(2) != D:
            raise ValueError(f"expected {name} with contiguous rows, got strides {list(t.stride())}")
        if start < 0 or start + L > t.shape[2]:
            raise ValueError(f"expected positions within 0..{t.shape[2]}, got {start}..{start + L}")
    if q_scale is not None:
        if not l2_norm:
            raise ValueError("expected q_scale only with l2_norm, got q_scale without it")
        if q_scale.dim() != 1 or q_scale.shape[0] != H:
            raise ValueError(f"expected q_scale [{H}], got {list(q_scale.shape)}")
        if q_scale.device != qkv.device:
            raise ValueError(f"expected q_scale on qkv's device {qkv.device}, got {q_scale.device}")


@fake("append_qk_norm_")
def _append_qk_norm_fake(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> Tensor:
    B, L, _, H, D = qkv.shape
    return qkv.new_empty((B, H, L, D))
