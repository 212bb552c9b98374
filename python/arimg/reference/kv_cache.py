"""Key/value cache writes and reads in plain torch: the oracle of `arimg.ops.kv_cache`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide

SMALLEST_AMAX = 2.0**-100
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Rope(NamedTuple):
    """Tables of a rotary position embedding: cos and sin [P, D / 2], float32.

    Row i rotates the pairs of channels of position i: (2j, 2j + 1) if interleaved, else (j, j + D / 2).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True


def split_qk_norm(qkv: Tensor, q_scale: Tensor | None, l2_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, L, 3, H, D] -> q, k, v [B, H, L, D]; with l2_norm q and k have length 1 per head and q is
    scaled.

    q_scale [H] multiplies the normalised queries. Differentiable.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if l2_norm:
        q, k = (F.normalize(wide(t), dim=-1, eps=1e-12) for t in (q, k))
        if q_scale is not None:
            q = q * wide(q_scale)[:, None, None]
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def rotate(x: Tensor, rope: Rope, index: Tensor) -> Tensor:
    """Rotates x [B, H, L, D] by the rows index [B or 1, L] of the tables; NaN where there is no such row."""
    rows = len(rope.cos)
    index = index.long()
    known = (index >= 0) & (index < rows)
    at = index.clamp(0, max(rows - 1, 0))
    cos, sin = (torch.where(known[..., None], t[at], torch.nan)[:, None].to(wide(x).dtype) for t in rope[:2])
    if rope.interleaved:
        a, b = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = wide(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def encode_vectors(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One-byte storage: codes of dtype int8 or float8_e4m3fn, and a float32 factor per vector x [..., D].

    value = code * factor with factor = max(amax, 2^-100) / limit, limit 127 or 448.
    """
    x, limit = x.float(), LIMITS[dtype]
    amax = x.abs().amax(-1).clamp_min(SMALLEST_AMAX) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # a number divided by a tensor would be a product with the reciprocal, rounded twice
    y = (x * (torch.full_like(amax, limit) / amax)[..., None]).nan_to_num(limit).clamp(-limit, limit)
    return (y.round() if dtype == torch.int8 else y).to(dtype), amax / limit


def decode_vectors(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale[..., None]).to(dtype)


def find_slots(
    positions: Tensor, page_table: Tensor | None, pages: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Page, offset and validity of positions [B, L]; without a table each row is one page."""
    batch = torch.arange(len(positions), device=positions.device)[:, None]
    if page_table is None:
        valid = (positions >= 0) & (positions < page_size)
        return batch.expand_as(positions), positions, valid
    number = positions.div(page_size, rounding_mode="floor")
    valid = (positions >= 0) & (number < page_table.shape[1])
    page = page_table.long()[batch, torch.where(valid, number, 0)]
    return page, positions - number * page_size, valid & (page >= 0) & (page < pages)


def append_(
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    start: int = 0,
    *,
    positions: Tensor | None = None,
    page_table: Tensor | None = None,
    norm: str | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    rope_index: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Normalises and rotates queries and keys, writes keys and values, returns the queries.

    Shapes and meaning as in `arimg.ops.append_`. Differentiable where the caches are not one-byte.
    """
    B, L = qkv.shape[:2]
    flat = qkv.flatten(2, -2)
    kv_heads = k_cache.shape[1]
    q, k, v = flat.transpose(1, 2).split([flat.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 1)
    side_by_side = positions is None and page_table is None
    if positions is None:
        positions = torch.arange(start, start + L, device=qkv.device)[None]
    positions = positions.long().expand(B, L)
    if norm is not None:
        q, k = _norm(q, norm, q_weight, eps), _norm(k, norm, k_weight, eps)
    if rope is not None:
        index = positions if rope_index is None else rope_index
        q, k = rotate(q, rope, index), rotate(k, rope, index)
    if side_by_side and k_scale is None:
        k_cache[:, :, start : start + L] = k
        v_cache[:, :, start : start + L] = v
        return q.to(qkv.dtype).contiguous()
    page, offset, valid = find_slots(positions, page_table, len(k_cache), k_cache.shape[2])
    at = page[valid], slice(None), offset[valid]
    for cache, scale, x in ((k_cache, k_scale, k), (v_cache, v_scale, v)):
        rows = x.transpose(1, 2)[valid]  # [n, H, D]
        if scale is None:
            cache[at] = rows.to(cache.dtype)
        else:
            codes, scale[at] = encode_vectors(rows, cache.dtype)
            cache.view(torch.int8)[at] = codes.view(torch.int8)  # index_put_ knows no fp8
    return q.to(qkv.dtype).contiguous()


def _norm(x: Tensor, norm: str, weight: Tensor | None, eps: float) -> Tensor:
    x = wide(x)
    if norm == "l2":
        x = F.normalize(x, dim=-1, eps=1e-12)
        return x if weight is None else x * wide(weight)[:, None, None]
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * wide(weight)


def append_qk_norm_(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> Tensor:
    """`append_` with queries and keys of length 1 (l2_norm) or as they are.

    k_cache, v_cache [B, H, Lmax, D], qkv [B, L, 3, H, D] -> q [B, H, L, D]; see `split_qk_norm`.
    """
    return append_(k_cache, v_cache, qkv, start, norm="l2" if l2_norm else None, q_weight=q_scale)


def read_cache(
    cache: Tensor,
    start: int,
    end: int,
    *,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions [start, end) of each row as one tensor [B, H, end - start, D]; see `arimg.ops.read_cache`."""
    batch = len(cache) if page_table is None else len(page_table)
    positions = torch.arange(start, end, device=cache.device)[None].expand(batch, -1)
    page, offset, valid = find_slots(positions, page_table, len(cache), cache.shape[2])
    if lengths is not None:
        valid = valid & (positions < lengths[:, None])
    page, offset = torch.where(valid, page, 0), torch.where(valid, offset, 0)
    if scale is None:
        rows = cache[page, :, offset]
    else:
        codes = cache.view(torch.int8)[page, :, offset].view(cache.dtype)
        rows = decode_vectors(codes, scale[page, :, offset], dtype)
    return rows.masked_fill(~valid[..., None, None], 0).transpose(1, 2).contiguous()
