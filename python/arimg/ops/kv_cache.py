"""Writes to and reads from a key/value cache, contiguous or paged.

float32, bfloat16 or float16 inputs; caches of the same dtype, int8 or float8_e4m3fn. Arithmetic in float32.
See docs/ops/kv_cache.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, expect_floating, expect_like, fake, kernels
from arimg.reference.kv_cache import Rope

__all__ = ["Rope", "append_", "append_qk_norm_", "read_cache"]

MAX_HEAD_DIM = 256
ONE_BYTE = (torch.int8, torch.float8_e4m3fn)
NORMS = {None: 0, "l2": 1, "rms": 2}


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
    """Writes the keys and values of new tokens and returns their queries [B, Hq, L, D].

    qkv [B, L, Hq + 2 Hkv, D] (or [B, L, 3, H, D]), D at most 256: queries, keys, values. Caches
    [pages, Hkv, page_size, D] with contiguous rows; page_table int32 [B, max_pages] names the pages of each
    row, -1 for none; without it row b is page b. Token t goes to position start + t, or positions[b, t]
    (int32 [B or 1, L]); positions without a page, negative ones among them, are not written.

    norm: "l2" (length 1; queries times q_weight [Hq]) or "rms" (times q_weight, k_weight [D]); then the
    rotation by row rope_index[b, t] (int32 [B or 1, L], default the position) of rope's tables [P, D / 2].
    int8 and float8_e4m3fn caches take k_scale, v_scale float32 [pages, Hkv, page_size]: value = code * scale.
    Raises ValueError or TypeError, leaving the cache as it was, for input that does not fit.
    """
    flat = _check(k_cache, v_cache, qkv, k_scale, v_scale, page_table)
    B, L, heads, D = flat.shape
    for name, index in (("positions", positions), ("rope_index", rope_index)):
        if index is not None:
            _check_index(name, index, B, L, qkv)
    if positions is None and page_table is None and (start < 0 or start + L > k_cache.shape[2]):
        raise ValueError(f"expected positions within 0..{k_cache.shape[2]}, got {start}..{start + L}")
    _check_norm(norm, q_weight, k_weight, heads - 2 * k_cache.shape[1], D, qkv)
    if rope is not None:
        _check_rope(rope, D, qkv)
    # A cache that carries gradients is written by the reference, which autograd can follow.
    given = (qkv, k_cache, v_cache, q_weight, k_weight, *(() if rope is None else rope[:2]))
    ops = kernels(*given)
    if ops is None:
        return reference.append_(
            k_cache, v_cache, qkv, start,
            positions=positions, page_table=page_table, norm=norm, q_weight=q_weight, k_weight=k_weight,
            eps=eps, rope=rope, rope_index=rope_index, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    return ops.append_(
        k_cache, v_cache, k_scale, v_scale, flat.contiguous(), start, _contiguous(positions),
        _contiguous(page_table), NORMS[norm], _floats(q_weight), _floats(k_weight), eps,
        None if rope is None else _floats(rope.cos), None if rope is None else _floats(rope.sin),
        _contiguous(rope_index), rope is None or rope.interleaved,
    )  # fmt: skip


def append_qk_norm_(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, q_scale: Tensor | None, l2_norm: bool
) -> Tensor:
    """Writes the keys and values of new tokens at positions [start, start + L) and returns their queries.

    k_cache, v_cache [B, H, Lmax, D] with contiguous rows, qkv [B, L, 3, H, D], D at most 256. With l2_norm,
    q and k become x / max(|x|, 1e-12) per head, and q is multiplied by q_scale [H] (query-key normalisation;
    Henry et al. 2020); without, they are copied. Returns q [B, H, L, D]. `append_` in one of its forms.
    Raises ValueError or TypeError, leaving the cache as it was, for input that does not fit.
    """
    if isinstance(qkv, Tensor) and qkv.dim() != 5:
        raise ValueError(f"expected qkv [B, L, 3, H, D], got {list(qkv.shape)}")
    if q_scale is not None and not l2_norm:
        raise ValueError("expected q_scale only with l2_norm, got q_scale without it")
    if q_scale is not None and q_scale.shape != qkv.shape[3:4]:
        raise ValueError(f"expected q_scale [{qkv.shape[3]}], got {list(q_scale.shape)}")
    return append_(k_cache, v_cache, qkv, start, norm="l2" if l2_norm else None, q_weight=q_scale)


def read_cache(
    cache: Tensor,
    start: int,
    end: int,
    *,
    page_table: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Positions [start, end) of each row as one tensor [B, H, end - start, D].

    cache, page_table and scale as in `append_`; one-byte storage is multiplied out to `dtype` (float32).
    Positions without a page, and from lengths[b] (int32 [B]) on, are zero.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    one_byte = expect_cache("cache", cache, scale, "scale")
    if not one_byte and dtype not in (None, cache.dtype):
        raise TypeError(f"expected the cache's dtype {cache.dtype}, got {dtype}")
    dtype = (dtype or torch.float32) if one_byte else cache.dtype
    if dtype not in FLOATING:
        raise TypeError(f"expected float32, bfloat16 or float16, got {dtype}")
    if page_table is not None:
        _check_table(page_table, None, cache)
    batch = cache.shape[0] if page_table is None else page_table.shape[0]
    if lengths is not None:
        _check_int32("lengths", lengths, cache)
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            raise ValueError(f"expected lengths [{batch}], got {list(lengths.shape)}")
    if not 0 <= start <= end:
        raise ValueError(f"expected 0 <= start <= end, got {start} and {end}")
    ops = kernels(cache)
    if ops is None:
        return reference.read_cache(
            cache, start, end, page_table=page_table, lengths=lengths, scale=scale, dtype=dtype
        )
    table, number = _contiguous(page_table), FLOATING.index(dtype)
    return ops.read_cache(cache, scale, table, _contiguous(lengths), batch, start, end - start, number)


def _check(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    page_table: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns qkv as [B, L, Hq + 2 Hkv, D]."""
    expect_floating("qkv", qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        flat = qkv.flatten(2, 3)
    elif qkv.dim() == 4:
        flat = qkv
    else:
        raise ValueError(f"expected qkv [B, L, Hq + 2 Hkv, D] or [B, L, 3, H, D], got {list(qkv.shape)}")
    B, _, heads, D = flat.shape
    if D > MAX_HEAD_DIM:
        raise ValueError(f"expected a head dim of at most {MAX_HEAD_DIM}, got {D}")
    one_byte = [
        expect_cache(name, cache, scale, f"{name[0]}_scale")
        for name, cache, scale in (("k_cache", k_cache, k_scale), ("v_cache", v_cache, v_scale))
    ]
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not one_byte[0]:
            expect_like(name, t, "qkv", qkv)
        elif t.dtype != k_cache.dtype:
            raise TypeError(f"expected {name} of k_cache's dtype {k_cache.dtype}, got {t.dtype}")
        elif t.device != qkv.device:
            raise ValueError(f"expected {name} on qkv's device {qkv.device}, got {t.device}")
        H = heads // 3 if qkv.dim() == 5 else k_cache.shape[1]
        rows = B if page_table is None else t.shape[0]
        if t.shape[0] != rows or t.shape[1] != H or t.shape[3] != D:
            first = f"{B}" if page_table is None else "pages"
            raise ValueError(f"expected {name} [{first}, {H}, Lmax, {D}], got {list(t.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"expected v_cache of k_cache's shape {list(k_cache.shape)}, got {list(v_cache.shape)}"
        )
    if heads <= 2 * k_cache.shape[1]:
        raise ValueError(f"expected more than {2 * k_cache.shape[1]} heads in qkv (Hq + 2 Hkv), got {heads}")
    if page_table is not None:
        _check_table(page_table, B, k_cache)
    return flat


def expect_cache(name: str, t: Tensor, scale: Tensor | None, scale_name: str) -> bool:
    """A cache that these kernels can read, with factors if it is one-byte; returns whether it is."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(t).__name__}")
    one_byte = t.dtype in ONE_BYTE
    if not one_byte:
        expect_floating(name, t)
    if t.dim() != 4:
        raise ValueError(f"expected {name} [pages, H, page_size, D], got {list(t.shape)}")
    if t.stride(3) != 1 or t.stride(2) != t.shape[3]:
        raise ValueError(f"expected {name} with contiguous rows, got strides {list(t.stride())}")
    if (scale is not None) != one_byte:
        raise ValueError(f"expected {scale_name} with int8 or float8_e4m3fn storage, and only there")
    if scale is not None:
        if scale.dtype != torch.float32:
            raise TypeError(f"expected {scale_name} of float32, got {scale.dtype}")
        if scale.shape != t.shape[:3] or not scale.is_contiguous() or scale.device != t.device:
            raise ValueError(
                f"expected contiguous {scale_name} {list(t.shape[:3])} on {t.device}, "
                f"got {list(scale.shape)} on {scale.device}"
            )
    return one_byte


def _check_int32(name: str, t: Tensor, like: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise TypeError(f"expected {name} of int32, got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"expected {name} on {like.device}, got {t.device}")


def _check_table(page_table: Tensor, batch: int | None, cache: Tensor) -> None:
    _check_int32("page_table", page_table, cache)
    if page_table.dim() != 2 or (batch is not None and page_table.shape[0] != batch):
        rows = "B" if batch is None else batch
        raise ValueError(f"expected page_table [{rows}, max_pages], got {list(page_table.shape)}")
    if cache.shape[2] == 0:
        raise ValueError("expected pages of at least one token, got a page size of 0")


def _check_index(name: str, index: Tensor, batch: int, tokens: int, qkv: Tensor) -> None:
    _check_int32(name, index, qkv)
    if index.dim() != 2 or index.shape[0] not in (1, batch) or index.shape[1] != tokens:
        raise ValueError(f"expected {name} [{batch} or 1, {tokens}], got {list(index.shape)}")


def _check_norm(
    norm: str | None, q_weight: Tensor | None, k_weight: Tensor | None, q_heads: int, dim: int, qkv: Tensor
) -> None:
    if norm not in NORMS:
        raise ValueError(f"expected a norm of 'l2', 'rms' or None, got {norm!r}")
    size = q_heads if norm == "l2" else dim
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        if norm is None or (norm == "l2" and name == "k_weight"):
            raise ValueError(f"expected no {name} with norm {norm!r}, got one")
        if weight.dim() != 1 or weight.shape[0] != size:
            raise ValueError(f"expected {name} [{size}], got {list(weight.shape)}")
        if weight.device != qkv.device:
            raise ValueError(f"expected {name} on qkv's device {qkv.device}, got {weight.device}")


def _check_rope(rope: Rope, dim: int, qkv: Tensor) -> None:
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        if table.dim() != 2 or table.shape[1] * 2 != dim or table.shape != rope.cos.shape:
            raise ValueError(f"expected rope.{name} [P, {dim / 2:g}], got {list(table.shape)}")
        if table.device != qkv.device:
            raise ValueError(f"expected rope.{name} on qkv's device {qkv.device}, got {table.device}")


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@fake("append_")
def _append_fake(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, qkv: Tensor, start: int,
    positions: Tensor | None, page_table: Tensor | None, norm: int, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rope_index: Tensor | None,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    B, L, heads, D = qkv.shape
    return qkv.new_empty((B, heads - 2 * k_cache.shape[1], L, D))


@fake("read_cache")
def _read_cache_fake(
    cache: Tensor, scale: Tensor | None, page_table: Tensor | None, lengths: Tensor | None, batch: int,
    start: int, tokens: int, dtype: int,
) -> Tensor:  # fmt: skip
    kind = FLOATING[dtype] if cache.dtype in ONE_BYTE else cache.dtype
    return cache.new_empty((batch, cache.shape[1], tokens, cache.shape[3]), dtype=kind)
