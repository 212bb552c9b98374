"""Attention of new queries over a cache: ragged lengths, contiguous or paged, with an uncommitted suffix.

Storage is the cache's: k, v [B, Hkv, capacity, D], or pages [pages, Hkv, page_size, D] named by a page table.
float32, bfloat16 or float16, or one byte with a factor per key; scores and softmax in float32. See
docs/ops/attention.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_like, fake, kernels
from arimg.ops.attention import _check, _check_head_scale, _check_interval, _rows, _scale
from arimg.ops.kv_cache import ONE_BYTE, expect_cache

__all__ = ["cached_attention", "causal_intervals"]


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
    """Attention of new queries over the first `length` cached keys, all of which every query sees.

    q [B, H, Lq, D]. Contiguous: k_cache, v_cache [B, Hkv, capacity, D]; paged: [pages, Hkv, page_size, D]
    with page_table int32 [B, max_pages] (key n of entry b is key n % page_size of page page_table[b, n //
    page_size]; entries beyond a length are not read). length: an int, or int32 [B] on q's device, 0..capacity
    each. k_new, v_new [B, Hkv, Lnew, D]: keys that follow the cached ones without being stored ("peek");
    query i sees those of new_intervals = (row_start, row_end), int32 [Lq] or [B, Lq] (all without;
    `causal_intervals` for earlier ones alone). scale defaults to 1 / sqrt(D); head_scale float32 [H]
    multiplies the scores of each head. k_scale, v_scale float32 [B or pages, Hkv, capacity or page_size]: the
    factors of int8 or float8_e4m3fn caches, as `append_` writes them. Returns [B, H, Lq, D], zero where
    nothing is seen, laid out in memory as [B, Lq, H, D], so that `.transpose(1, 2).flatten(2)` is free. With
    a gradient asked for, the reference runs. Raises ValueError or TypeError for shapes, dtypes or devices
    that do not fit, and for lengths and pages outside the cache where they are on the CPU; on a GPU, where
    looking would mean waiting, lengths are cut to the capacity and pages are trusted.
    """
    new, scales = (k_new, v_new, new_intervals), (k_scale, v_scale)
    ops = None if torch.compiler.is_compiling() else kernels(q, k_cache, v_cache, k_new, v_new, head_scale)
    if ops is not None:
        # The checks take as long as a short decode: what is wrong is looked up once the operator refuses.
        try:
            return _run(ops, q, k_cache, v_cache, length, page_table, new, head_scale, scale, scales)
        except (RuntimeError, AttributeError, TypeError, IndexError):
            _check_all(q, k_cache, v_cache, length, page_table, new, head_scale, scales)
            raise
    _check_all(q, k_cache, v_cache, length, page_table, new, head_scale, scales)
    ops = kernels(q, k_cache, v_cache, k_new, v_new, head_scale)
    if ops is not None:
        return _run(ops, q, k_cache, v_cache, length, page_table, new, head_scale, scale, scales)
    return reference.cached_attention(
        q, k_cache, v_cache, length, page_table=page_table, k_new=k_new, v_new=v_new,
        new_intervals=new_intervals, scale=scale, head_scale=head_scale, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


_New = tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]
_Scales = tuple[Tensor | None, Tensor | None]


def _run(
    ops: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, page_table: Tensor | None,
    new: _New, head_scale: Tensor | None, scale: float | None, scales: _Scales,
) -> Tensor:  # fmt: skip
    if not q.device == k_cache.device == v_cache.device:
        raise RuntimeError("expected tensors of one device")  # what differs is said by the check that follows
    k_new, v_new, intervals = new
    start, end = (None, None) if intervals is None else (t.contiguous() for t in intervals)
    fixed, lengths = (-1, length.contiguous()) if isinstance(length, Tensor) else (length, None)
    out: Tensor = ops.cached_attention(
        _rows(q), _rows(k_cache), _rows(v_cache), fixed, lengths,
        None if page_table is None else page_table.contiguous(),
        None if k_new is None else _rows(k_new), None if v_new is None else _rows(v_new),
        start, end, head_scale, _scale(q, scale), *scales,
    )  # fmt: skip
    return out.transpose(1, 2)


def _check_all(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, page_table: Tensor | None,
    new: _New, head_scale: Tensor | None, scales: _Scales,
) -> None:  # fmt: skip
    if isinstance(k_cache, Tensor) and k_cache.dtype in ONE_BYTE:
        _check(q)
        _check_codes(q, k_cache, v_cache, *scales)
    else:
        _check(q, k_cache=k_cache, v_cache=v_cache)
        if scales != (None, None):
            raise ValueError(f"expected scales only with int8 or float8_e4m3fn caches, got {k_cache.dtype}")
    capacity = _check_cache(q, k_cache, v_cache, page_table)
    _check_length(q, length, capacity)
    _check_values(k_cache, length, page_table, capacity)
    _check_new(q, k_cache, *new)
    _check_head_scale(head_scale, q)


def causal_intervals(
    queries: int, keys: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Intervals of new keys: a query sees its own and those before; the last query sees all `keys`."""
    keys = queries if keys is None else keys
    end = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None) -> int:
    """The number of keys that an entry of the cache can hold."""
    B, H, _, D = q.shape
    heads = k_cache.shape[1]
    shared = heads > 0 and H % heads == 0 if H > 0 else heads == 0
    first = f"{B}" if page_table is None else "pages"
    if not (shared and k_cache.shape[3] == D and (page_table is not None or k_cache.shape[0] == B)):
        raise ValueError(
            f"expected k_cache [{first}, a divisor of {H}, {k_cache.shape[2]}, {D}], "
            f"got {list(k_cache.shape)}"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"expected v_cache {list(k_cache.shape)}, got {list(v_cache.shape)}")
    if page_table is None:
        return k_cache.shape[2]
    if page_table.dtype != torch.int32:
        raise TypeError(f"expected page_table of int32, got {page_table.dtype}")
    if page_table.dim() != 2 or page_table.shape[0] != B or page_table.device != q.device:
        raise ValueError(
            f"expected page_table [{B}, pages] on {q.device}, "
            f"got {list(page_table.shape)} on {page_table.device}"
        )
    return k_cache.shape[2] * page_table.shape[1]


def _check_codes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    expect_like("v_cache", v_cache, "k_cache", k_cache)
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        expect_cache(f"{name}_cache", cache, scale, f"{name}_scale")
        if cache.device != q.device:
            raise ValueError(f"expected {name}_cache on q's device {q.device}, got {cache.device}")


def _check_length(q: Tensor, length: int | Tensor, capacity: int) -> None:
    if not isinstance(length, Tensor):
        if not 0 <= length <= capacity:
            raise ValueError(f"expected a length of 0..{capacity}, got {length}")
        return
    if length.dtype != torch.int32:
        raise TypeError(f"expected lengths of int32, got {length.dtype}")
    if length.dim() != 1 or length.shape[0] != q.shape[0] or length.device != q.device:
        raise ValueError(
            f"expected lengths [{q.shape[0]}] on {q.device}, got {list(length.shape)} on {length.device}"
        )


def _check_values(k_cache: Tensor, length: int | Tensor, page_table: Tensor | None, capacity: int) -> None:
    """Lengths and pages on the host; on a device that would wait for it, and in a graph there are none."""
    given = [t for t in (length, page_table) if isinstance(t, Tensor)]
    if torch.compiler.is_compiling() or any(t.device.type != "cpu" for t in given):
        return
    if isinstance(length, Tensor):
        for n in length.tolist():
            if not 0 <= n <= capacity:
                raise ValueError(f"expected lengths of 0..{capacity}, got {n}")
    if page_table is None:
        return
    lengths = length.tolist() if isinstance(length, Tensor) else [length] * len(page_table)
    for row, n in zip(page_table.tolist(), lengths):
        for page in row[: -(-n // k_cache.shape[2]) if n else 0]:
            if not 0 <= page < k_cache.shape[0]:
                raise ValueError(f"expected pages of 0..{k_cache.shape[0] - 1} for all keys, got {page}")


def _check_new(
    q: Tensor,
    k_cache: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    new_intervals: tuple[Tensor, Tensor] | None,
) -> None:
    if (k_new is None) != (v_new is None) or (new_intervals is not None and k_new is None):
        raise ValueError("expected k_new and v_new together, and new_intervals only with them")
    if k_new is None or v_new is None:
        return
    B, _, _, D = q.shape
    for name, t in (("k_new", k_new), ("v_new", v_new)):
        expect_like(name, t, "q", q)
        fits = t.dim() == 4 and t.shape[0] == B and t.shape[1] == k_cache.shape[1] and t.shape[3] == D
        if not (fits and t.shape[2] == k_new.shape[2]):
            raise ValueError(
                f"expected {name} [{B}, {k_cache.shape[1]}, {k_new.shape[2]}, {D}], got {list(t.shape)}"
            )
    if new_intervals is not None:
        start, end = new_intervals
        _check_interval("row_start", start, q)
        _check_interval("row_end", end, q)
        if start.dim() != end.dim():
            raise ValueError(
                f"expected row_end of row_start's shape {list(start.shape)}, got {list(end.shape)}"
            )


@fake("cached_attention")
def _cached_attention_fake(q: Tensor, *_: object) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D))
