"""Attention over key intervals and over a cache in plain torch: the oracle of `arimg.ops.attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_interval_attention(
    q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, row_end: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax attention in which query row i sees the keys [row_start[i], row_end[i]).

    q, k, v [B, H, L, D]; row_start, row_end int32 [L] or [B, L]; scale defaults to 1 / sqrt(D). Returns
    [B, H, L, D], zero where the interval is empty. Differentiable.
    """
    start, end = (t[:, None, :, None] if t.dim() == 2 else t[:, None] for t in (row_start, row_end))
    column = torch.arange(k.shape[-2], device=q.device, dtype=row_start.dtype)
    mask = (column >= start) & (column < end)
    empty = ~mask.any(-1, keepdim=True)
    # an empty row attends to everything and is zeroed after: a softmax over nothing would be NaN, and so its
    # gradient
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale)
    return out.masked_fill(empty, 0.0)


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, *, scale: float | None = None
) -> Tensor:
    """Attention of new queries over the first `length` cached keys, all of which every query sees.

    q [B, H, Lq, D], k_cache, v_cache [B, H, Lmax, D] -> [B, H, Lq, D], laid out in memory as [B, Lq, H, D].
    """
    out = F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length], scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
