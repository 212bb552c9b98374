"""Attention over key intervals and over a cache in plain torch: the oracle of `arimg.ops.attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    row_start: Tensor, row_end: Tensor, keys: int, *, sinks: int = 0, self_key: bool = False
) -> Tensor:
    """The mask of the intervals, bool [L, keys] or [B, 1, L, keys].

    Row i sees the keys row_start[i] <= j < row_end[i], the keys j < sinks, and with self_key its own,
    j = i + keys - L.
    """
    start, end = (t[:, None, :, None] if t.dim() == 2 else t[:, None] for t in (row_start, row_end))
    column = torch.arange(keys, device=row_start.device, dtype=torch.int32)
    mask = ((column >= start) & (column < end)) | (column < sinks)
    if self_key:
        queries = row_start.shape[-1]
        row = torch.arange(queries, device=row_start.device, dtype=torch.int32)[:, None]
        mask = mask | (column == row + (keys - queries))
    return mask


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query row i sees the keys [row_start[i], row_end[i]).

    q [B, H, L, D]; k, v [B, Hkv, keys, D] with H a multiple of Hkv; row_start, row_end int32 [L] or [B, L];
    scale defaults to 1 / sqrt(D); head_scale [H] multiplies the scores of each head; sinks, self_key: see
    `visible`. Returns [B, H, L, D], zero where nothing is seen, and with return_lse the logarithm of each
    row's sum of exponentials, [B, H, L] (-inf where nothing is seen). Differentiable.
    """
    mask = visible(row_start, row_end, k.shape[-2], sinks=sinks, self_key=self_key)
    q, k, v = _heads(q, k, v, head_scale)
    empty = ~mask.any(-1, keepdim=True)
    # an empty row attends to everything and is zeroed after: a softmax over nothing would be NaN, and so its
    # gradient
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale)
    out = out.masked_fill(empty, 0.0)
    if not return_lse:
        return out
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.float() @ k.float().transpose(-1, -2) * factor
    return out, scores.masked_fill(~mask, -torch.inf).logsumexp(-1)


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    *,
    page_table: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    new_intervals: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    head_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of new queries over the cached keys of each batch entry, and over new keys after them.

    q [B, H, Lq, D]. Contiguous: k_cache, v_cache [B, Hkv, capacity, D]; paged: [pages, Hkv, page_size, D]
    with page_table int32 [B, max_pages]. length: an int, or int32 [B]. Every query sees all cached keys and,
    of k_new, v_new [B, Hkv, Lnew, D], those of new_intervals = (row_start, row_end) (all without). k_scale,
    v_scale: the factors of one-byte caches, of k_cache's shape without D. Returns [B, H, Lq, D], laid out in
    memory as [B, Lq, H, D].
    """
    if k_scale is not None and v_scale is not None:
        k_cache = (k_cache.float() * k_scale[..., None]).to(q.dtype)
        v_cache = (v_cache.float() * v_scale[..., None]).to(q.dtype)
    B, L = q.shape[0], q.shape[2]
    lengths = [int(length)] * B if isinstance(length, int) else [int(n) for n in length]
    rows = []
    for b, n in enumerate(lengths):
        k, v = (_cached_rows(t, b, n, page_table) for t in (k_cache, v_cache))
        if k_new is not None and v_new is not None:
            k, v = torch.cat((k, k_new[b]), 1), torch.cat((v, v_new[b]), 1)
        start, end = torch.zeros(L, dtype=torch.int32), torch.full((L,), k.shape[1], dtype=torch.int32)
        start, end = start.to(q.device), end.to(q.device)
        sinks = 0
        if new_intervals is not None:
            start, end = (n + (t[b] if t.dim() == 2 else t) for t in new_intervals)
            start, sinks = start.clamp(min=n), n
        out = row_interval_attention(
            q[b : b + 1], k[None], v[None], start, end, scale=scale, head_scale=head_scale, sinks=sinks
        )
        assert isinstance(out, Tensor)
        rows.append(out)
    return torch.cat(rows).transpose(1, 2).contiguous().transpose(1, 2) if rows else torch.empty_like(q)


def _cached_rows(cache: Tensor, b: int, length: int, page_table: Tensor | None) -> Tensor:
    """The first `length` rows of batch entry b: [Hkv, length, D]."""
    if page_table is None:
        return cache[b, :, :length]
    pages = page_table[b, : -(-length // cache.shape[2])].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length]


def _heads(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q times the factor of its head, and keys and values repeated for the heads that share them."""
    if head_scale is not None:
        q = q * head_scale.to(q.dtype)[:, None, None]
    repeat = q.shape[1] // max(k.shape[1], 1)
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return q, k, v
