"""Attention that carries a gated state of constant size in place of keys and values.

float32, bfloat16 or float16; sums and the state in float32. See docs/ops/attention_linear.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, expect_floating, expect_like, fake, kernels
from arimg.ops.attention import row_interval_attention
from arimg.ops.attention_cached import cached_attention

__all__ = ["gated_linear_attention"]

MAX_DIM = 256
DEFAULT_CHUNK = 32  # of the causal form


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    state: Tensor | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    inner: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Attention over a carried state: q, k [B, H, L, N], v [B, H, L, P], gate [B, H, L] (log decays, <= 0).

    inner="softmax" (ARFlow): the tokens of one chunk see each other by softmax, and what came before the
    chunk by the state; L must be a multiple of chunk (default: L, one chunk). N = P, a multiple of 8.
    inner="causal": plain gated linear attention; chunk (default 32) is a matter of speed alone.
    state [B, H, N, P] float32, from the call before (None: zeros); scale defaults to 1 / sqrt(N).
    Returns out [B, H, L, P], laid out in memory as [B, L, H, P], and the state after the last token.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check(q, k, v, gate)
    B, H, L, N = q.shape
    if inner not in ("softmax", "causal"):
        raise ValueError(f'expected inner "softmax" or "causal", got {inner!r}')
    softmax = inner == "softmax"
    if chunk is None:
        chunk = L if softmax else DEFAULT_CHUNK
    if softmax and (v.shape[3] != N or N % 8 != 0):
        raise ValueError(f"expected q and v of one head dim, a multiple of 8, got {N} and {v.shape[3]}")
    if (L > 0 and chunk < 1) or (softmax and L > 0 and L % chunk != 0):
        raise ValueError(f"expected a chunk that divides the length {L}, got {chunk}")
    check_state(state, q, (B, H, N, v.shape[3]))
    ops = kernels(q, k, v, gate, state)
    if ops is None:
        return reference.gated_linear_attention(
            q, k, v, gate, state=state, chunk=chunk, scale=scale, inner=inner
        )
    scale = float(N) ** -0.5 if scale is None else scale
    base = _softmax_within(q, k, v, chunk, scale) if softmax else None
    q, k, v, chunk = rows(q), rows(k), rows(v), max(chunk, 1)
    out, new_state = ops.gated_scan(
        q, k, v, gate.float(), None, None, base, whole(state), chunk, scale, not softmax
    )
    return out.transpose(1, 2), new_state


def _softmax_within(q: Tensor, k: Tensor, v: Tensor, chunk: int, scale: float) -> Tensor:
    """Attention of each chunk to itself."""
    if chunk == q.shape[2]:
        return cached_attention(q, k, v, chunk, scale=scale)
    start = torch.arange(q.shape[2], dtype=torch.int32, device=q.device) // chunk * chunk
    return row_interval_attention(q, k, v, start, start + chunk, scale=scale)


def check_state(state: Tensor | None, like: Tensor, sizes: tuple[int, int, int, int]) -> None:
    if state is None:
        return
    if not isinstance(state, Tensor):
        raise TypeError(f"expected state to be a tensor, got {type(state).__name__}")
    if state.dtype != torch.float32:
        raise TypeError(f"expected state of float32, got {state.dtype}")
    if state.device != like.device:
        raise ValueError(f"expected state on device {like.device}, got {state.device}")
    # Comparisons one by one: `!=` on tuples of symbolic sizes does not trace under torch.compile.
    if not (state.dim() == 4 and all(n == size for n, size in zip(state.shape, sizes))):
        raise ValueError(f"expected state {list(sizes)}, got {list(state.shape)}")


def check_head_dim(name: str, size: int) -> None:
    if not 0 < size <= MAX_DIM:
        raise ValueError(f"expected {name} of 1 to {MAX_DIM} channels per head, got {size}")


def _check(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> None:
    expect_floating("q", q)
    if q.dim() != 4:
        raise ValueError(f"expected q [B, H, L, N], got {list(q.shape)}")
    expect_like("k", k, "q", q)
    if k.shape != q.shape:
        raise ValueError(f"expected k of q's shape {list(q.shape)}, got {list(k.shape)}")
    expect_like("v", v, "q", q)
    B, H, L, N = q.shape
    if not (v.dim() == 4 and v.shape[0] == B and v.shape[1] == H and v.shape[2] == L):
        raise ValueError(f"expected v [{B}, {H}, {L}, P], got {list(v.shape)}")
    check_head_dim("q", N)
    check_head_dim("v", v.shape[3])
    check_small("gate", gate, q)
    if not (gate.dim() == 3 and gate.shape[0] == B and gate.shape[1] == H and gate.shape[2] == L):
        raise ValueError(f"expected gate [{B}, {H}, {L}], got {list(gate.shape)}")


def check_small(name: str, t: Tensor, like: Tensor) -> None:
    """A small tensor of any floating dtype, converted to float32 before use."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATING:
        raise TypeError(f"expected {name} of float32, bfloat16 or float16, got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"expected {name} on device {like.device}, got {t.device}")


def rows(t: Tensor) -> Tensor:
    """Contiguous channels; the other strides are free."""
    return t if t.stride(3) == 1 else t.contiguous()


def whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@fake("gated_scan")
def _gated_scan_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    rate: Tensor | None,
    skip: Tensor | None,
    base: Tensor | None,
    state: Tensor | None,
    chunk: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    B, H, L, P = v.shape
    return v.new_empty((B, L, H, P)), v.new_empty((B, H, q.shape[3], P), dtype=torch.float32)
