"""Appending to a cache against separate torch operations, and reads of paged and one-byte caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops, reference
from arimg.nn.rope import rope_2d
from arimg.ops import Rope
from conftest import OURS

HEADS, DIM = 16, 64
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(tokens: int, dtype: torch.dtype, heads: int = 3 * HEADS) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, heads, DIM, generator=g).to(dtype)


def agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    # torch rounds to bfloat16 after each operation
    noise = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(((a - b).abs() <= noise * (1 + b.abs().max())).all() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("peer", [OURS, "torch ops"])
@pytest.mark.parametrize("tokens", [1, 25, 256])
@DTYPES
def test_append_qk_norm(dtype: torch.dtype, tokens: int, peer: str, measure: Callable[..., float]) -> None:
    qkv = make(tokens, dtype).view(2, tokens, 3, HEADS, DIM)
    k, v = torch.zeros(2, 2, HEADS, 680, DIM, dtype=dtype)
    q_scale = torch.rand(HEADS) + 3
    functions = {
        OURS: lambda: ops.append_qk_norm_(k, v, qkv, 100, q_scale, True),
        "torch ops": lambda: reference.append_qk_norm_(k, v, qkv, 100, q_scale, True),
    }
    agree((functions[OURS](), k.clone(), v.clone()), (functions["torch ops"](), k, v), dtype)
    group = f"append {tokens} tokens, 2 x {HEADS} x {DIM}, {str(dtype)[6:]}"
    measure(group, peer, functions[peer], bytes=2 * qkv.nbytes)


def separate(
    k_cache: Tensor, v_cache: Tensor, qkv: Tensor, start: int, weights: tuple[Tensor, Tensor], rope: Rope
) -> Tensor:
    """RMS norm, rotation and writes, one torch operation after another, in qkv's dtype as models do."""
    tokens, kv_heads = qkv.shape[1], k_cache.shape[1]
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    cos, sin = (t[start : start + tokens, None].to(qkv.dtype) for t in rope[:2])

    def turn(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, (DIM,), weight, 1e-6)
        if rope.interleaved:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).transpose(1, 2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).transpose(1, 2)

    k_cache[:, :, start : start + tokens] = turn(k, weights[1])
    v_cache[:, :, start : start + tokens] = v.transpose(1, 2)
    return turn(q, weights[0]).contiguous()


@pytest.mark.parametrize("peer", [OURS, "torch ops"])
@pytest.mark.parametrize("pairing", ["pairs", "halves"])
@pytest.mark.parametrize("tokens", [1, 25, 256])
@DTYPES
def test_append_rope(
    dtype: torch.dtype, tokens: int, pairing: str, peer: str, measure: Callable[..., float]
) -> None:
    """RMS norm and rotation, 16 query heads over 4 key heads."""
    qkv = make(tokens, dtype, HEADS + 8)
    k, v = torch.zeros(2, 2, 4, 680, DIM, dtype=dtype)
    rope = rope_2d(20, 34, DIM)._replace(interleaved=pairing == "pairs")
    weights = torch.ones(DIM, dtype=dtype) * 1.5, torch.ones(DIM, dtype=dtype)
    wide = [w.float() for w in weights]
    functions = {
        OURS: lambda: ops.append_(k, v, qkv, 100, norm="rms", q_weight=wide[0], k_weight=wide[1], rope=rope),
        "torch ops": lambda: separate(k, v, qkv, 100, weights, rope),
    }
    agree((functions[OURS](), k.clone(), v.clone()), (functions["torch ops"](), k, v), dtype)
    shape = f"2 x (16 + 2 x 4) x {DIM}, {str(dtype)[6:]}"
    group = f"append {tokens} tokens with RMS norm and RoPE by {pairing}, {shape}"
    measure(group, peer, functions[peer], bytes=2 * qkv.nbytes)


@pytest.mark.parametrize("peer", [OURS, "torch ops"])
@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_append_one_byte(storage: torch.dtype, peer: str, measure: Callable[..., float]) -> None:
    qkv = make(256, torch.bfloat16)
    k, v = (torch.zeros(2, HEADS, 680, DIM, dtype=storage) for _ in "kv")
    scales = dict(zip(("k_scale", "v_scale"), torch.zeros(2, 2, HEADS, 680)))
    table = torch.arange(2, dtype=torch.int32)[:, None]

    def theirs() -> Tensor:
        q, *kv = qkv.view(2, 256, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        for cache, scale, x in zip((k, v), scales.values(), kv):
            codes, factor = reference.encode_vectors(x, storage)
            cache[:, :, 100:356] = codes
            scale[:, :, 100:356] = factor
        return q.contiguous()

    functions = {OURS: lambda: ops.append_(k, v, qkv, 100, page_table=table, **scales), "torch ops": theirs}
    agree((functions[OURS](), k.float()), (functions["torch ops"](), k.float()), torch.float32)
    name = str(storage)[6:].split("_")[0]
    measure(
        f"append 256 tokens into {name}, 2 x {HEADS} x {DIM}, bfloat16", peer, functions[peer],
        bytes=qkv.nbytes * 4 / 3 + 2 * k.numel() * 256 / 680,
    )  # fmt: skip


def in_pages(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The tokens of cache [B, H, L, ...] in pages that lie in random order, and the page table."""
    B, H, L = cache.shape[:3]
    number = -(-L // size)
    order = torch.randperm(B * number, generator=torch.Generator().manual_seed(1))
    whole = torch.zeros(B, H, number * size, *cache.shape[3:], dtype=cache.dtype)
    whole[:, :, :L] = cache
    pages = whole.unflatten(2, (number, size)).transpose(1, 2).flatten(0, 1)
    spread = torch.empty_like(pages, memory_format=torch.contiguous_format)
    for there, page in zip(order.tolist(), pages):
        spread[there] = page
    return spread, order.view(B, number).int()


@pytest.mark.parametrize("peer", [OURS, "pages of 16", "pages of 64", "pages of 16, torch index", "clone"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_read(storage: str, peer: str, measure: Callable[..., float]) -> None:
    """The arimg row reads a contiguous cache."""
    kind, B, L = getattr(torch, storage), 2, 680
    one_byte = kind.itemsize == 1
    if one_byte and peer in ("clone", "pages of 16, torch index"):
        pytest.skip("torch has no one-byte read")
    cache = make(L, torch.float32, HEADS).transpose(1, 2).contiguous()
    scale = None
    if one_byte:
        cache, scale = reference.encode_vectors(cache, kind)
    cache = cache.to(kind)
    functions: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ops.read_cache(cache, 0, L, scale=scale),
        "clone": cache.clone,
    }
    for size in (16, 64):
        pages, table = in_pages(cache, size)
        factors = None if scale is None else in_pages(scale, size)[0]
        functions[f"pages of {size}"] = partial(ops.read_cache, pages, 0, L, page_table=table, scale=factors)
        if size == 16:
            number = table.long()
            functions["pages of 16, torch index"] = lambda pages=pages, number=number: (
                pages[number].transpose(1, 2).reshape(B, HEADS, -1, DIM)[:, :, :L]
            )
    assert torch.equal(functions[OURS](), functions[peer]())
    out = B * HEADS * L * DIM * (4 if one_byte else kind.itemsize)
    group = f"read 2 x {HEADS} x {L} x {DIM} from {storage}"
    measure(group, peer, functions[peer], bytes=cache.nbytes + out)
