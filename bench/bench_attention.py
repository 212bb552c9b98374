"""Attention over key intervals and over a cache against torch's attention (SDPA, FlexAttention).

flops counts the pairs that the rule allows, so a peer that computes all pairs shows a lower rate. "peak MB":
the most memory that one call took beyond its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops
from arimg.cache import KVCache
from arimg.layout import Layout, Visibility
from conftest import OURS, SMOKE

HEADS, DIM = 16, 64
LAYOUTS = {
    680: Layout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
    2240: Layout.scales([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
    9451: Layout.scales([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]),
}
if SMOKE:
    LAYOUTS = {14: Layout.scales([1, 2, 3])}
NOISE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PEERS = [OURS, "SDPA + bool mask", "SDPA dense (no mask)", "SDPA per step", "FlexAttention, compiled"]
RULES = ["level-causal", "level-diagonal"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def heads(length: int) -> int:
    return HEADS if length < 9000 else 4  # the longest would take minutes


def agree(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    assert (got - want).abs().max() < NOISE[got.dtype] * factor


def functions(layout: Layout, rule: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    seen = layout.visibility(rule)
    mask = seen.mask()

    def per_step() -> Tensor:
        parts = []
        for first, last in layout.segments:
            begin = 0 if rule == "level-causal" else first
            keys = k[:, :, begin:last], v[:, :, begin:last]
            parts.append(F.scaled_dot_product_attention(q[:, :, first:last], *keys))
        return torch.cat(parts, 2)

    return {
        OURS: lambda: ops.row_interval_attention(q, k, v, seen.row_start, seen.row_end, plan=seen.plan),
        "SDPA + bool mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "SDPA dense (no mask)": lambda: F.scaled_dot_product_attention(q, k, v),
        "SDPA per step": per_step,
    }


def flex(seen: Visibility, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= seen.row_start[row]) & (key < seen.row_end[row])

    blocks = create_block_mask(sees, None, None, seen.length, seen.keys, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks)


def peak_bytes(function: Callable[[], object]) -> int:
    """Resident memory at its highest during a call, over that before it (Linux)."""

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # or memory of earlier calls would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) * 1024


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rule", RULES)
@DTYPES
@pytest.mark.parametrize("length", LAYOUTS)
def test_row_interval_attention(
    length: int, dtype: torch.dtype, rule: str, peer: str, measure: Callable[..., float]
) -> None:
    layout, g = LAYOUTS[length], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads(length), length, DIM, generator=g).to(dtype) for _ in range(3))
    peers = functions(layout, rule, q, k, v)
    seen = layout.visibility(rule)
    if peer.startswith("Flex"):
        if SMOKE:
            pytest.skip("compiling takes longer than the smoke run may")
        peers[peer] = flex(seen, q, k, v)
    if peer not in (OURS, "SDPA dense (no mask)"):
        agree(peers[OURS](), peers[peer]())
    measure(
        f"{rule} attention, 1 x {heads(length)} x {length} x {DIM}, {str(dtype)[6:]}",
        peer,
        peers[peer],
        flops=4 * heads(length) * DIM * seen.pairs,
        peak=peak_bytes(peers[peer]),
        rounds=2 if length > 9000 else None,
    )


@pytest.mark.parametrize("peer", PEERS[:4])  # FlexAttention has no backward on CPUs
@pytest.mark.parametrize("rule", RULES)
@DTYPES
@pytest.mark.parametrize("length", LAYOUTS)
def test_forward_and_backward(
    length: int, dtype: torch.dtype, rule: str, peer: str, measure: Callable[..., float]
) -> None:
    layout, g = LAYOUTS[length], torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, heads(length), length, DIM, generator=g).to(dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    peers = functions(layout, rule, q, k, v)

    def train(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(peers[name](), inputs, grad)

    if peer not in (OURS, "SDPA dense (no mask)"):
        for ours, theirs in zip(train(OURS), train(peer)):
            agree(ours, theirs, 10.0)
    measure(
        f"{rule} attention, forward and backward, 1 x {heads(length)} x {length} x {DIM}, {str(dtype)[6:]}",
        peer,
        lambda: train(peer),
        flops=14 * heads(length) * DIM * layout.visibility(rule).pairs,
        peak=peak_bytes(lambda: train(peer)),
        rounds=2 if length > 9000 else None,
    )


@pytest.mark.parametrize("peer", [OURS, "SDPA on a slice", "SDPA + mask on a static cache"])
@pytest.mark.parametrize(
    "queries, length, capacity",
    [
        (1, 1, 680),
        (1, 576, 576),
        (1, 576, 680),
        (1, 576, 1024),
        (1, 4096, 4096),
        (64, 155, 680),
        (256, 680, 680),
    ],
)
@DTYPES
def test_cached_attention(
    dtype: torch.dtype, queries: int, length: int, capacity: int, peer: str, measure: Callable[..., float]
) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, queries, DIM, generator=g).to(dtype)
    k, v = (torch.randn(2, HEADS, capacity, DIM, generator=g).to(dtype) for _ in range(2))
    mask = (torch.arange(capacity) < length)[None, None, None]
    peers = {
        OURS: lambda: ops.cached_attention(q, k, v, length),
        "SDPA on a slice": lambda: F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length]),
        "SDPA + mask on a static cache": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    agree(peers[OURS](), peers[peer]())
    measure(
        f"{queries} new queries on {length} of {capacity} keys, 2 x {HEADS} x {DIM}, {str(dtype)[6:]}",
        peer,
        peers[peer],
        bytes=2 * 2 * HEADS * length * DIM * k.element_size(),
        flops=4 * 2 * HEADS * DIM * queries * length,
    )


@pytest.mark.parametrize("peer", [OURS, "pages of 64", "pages of 16"])
@pytest.mark.parametrize(
    "storage",
    [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn],
    ids=["fp32", "bf16", "int8", "fp8"],
)
@pytest.mark.parametrize("queries", [1, 64])
def test_paged_cached_attention(
    queries: int, storage: torch.dtype, peer: str, measure: Callable[..., float]
) -> None:
    """A paged cache against a contiguous one of the same tokens; one-byte ones with queries in float32."""
    length, g = 14 if SMOKE else 576, torch.Generator().manual_seed(0)
    dtype = torch.float32 if storage.itemsize == 1 else storage
    qkv = torch.randn(2, length, 3 * HEADS, DIM, generator=g).to(dtype)
    q = torch.randn(2, HEADS, queries, DIM, generator=g).to(dtype)
    whole = KVCache(2, HEADS, length, DIM, storage)
    cache = whole if peer == OURS else KVCache(2, HEADS, length, DIM, storage, page_size=int(peer[-2:]))
    for held in (whole, cache):
        held.truncate(0)
        for first in range(0, length, 16):  # rows in turn, so that their pages alternate
            held.append(qkv[:, first : first + 16])
    assert torch.equal(cache.attend(q), whole.attend(q))
    measure(
        f"{queries} new queries on {length} keys in pages, 2 x {HEADS} x {DIM}, {str(storage)[6:]}",
        peer,
        lambda: cache.attend(q),
        bytes=2 * 2 * HEADS * length * DIM * storage.itemsize,
        flops=4 * 2 * HEADS * DIM * queries * length,
    )
