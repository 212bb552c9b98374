"""Attention over key intervals and over a cache against torch's scaled_dot_product_attention (SDPA).

flops counts the pairs that the rule allows, so a peer that computes all pairs shows a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from arimg import ops
from arimg.layout import Layout
from conftest import OURS, SMOKE

HEADS, DIM = 16, 64
LAYOUTS = {
    680: Layout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
    2240: Layout.scales([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
}
if SMOKE:
    LAYOUTS = {14: Layout.scales([1, 2, 3])}
NOISE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() < NOISE[got.dtype]


@pytest.mark.parametrize("peer", [OURS, "SDPA + bool mask", "SDPA dense (no mask)", "SDPA per step"])
@pytest.mark.parametrize("rule", ["level-causal", "level-diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", LAYOUTS)
def test_row_interval_attention(
    length: int, dtype: torch.dtype, rule: str, peer: str, measure: Callable[..., float]
) -> None:
    layout = LAYOUTS[length]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=g).to(dtype) for _ in range(3))
    start, end = layout.intervals(rule)
    column = torch.arange(length, dtype=torch.int32)
    mask = (column >= start[:, None]) & (column < end[:, None])

    def per_step() -> torch.Tensor:
        parts = []
        for first, last in layout.segments:
            begin = 0 if rule == "level-causal" else first
            seen = k[:, :, begin:last], v[:, :, begin:last]
            parts.append(F.scaled_dot_product_attention(q[:, :, first:last], *seen))
        return torch.cat(parts, 2)

    functions = {
        OURS: lambda: ops.row_interval_attention(q, k, v, start, end),
        "SDPA + bool mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "SDPA dense (no mask)": lambda: F.scaled_dot_product_attention(q, k, v),
        "SDPA per step": per_step,
    }
    for name, function in functions.items():
        if name != "SDPA dense (no mask)":
            agree(functions[OURS](), function())
    flops = 4 * HEADS * DIM * int(mask.sum())
    group = f"{rule} attention, 1 x {HEADS} x {length} x {DIM}, {str(dtype)[6:]}"
    measure(group, peer, functions[peer], flops=flops)


@pytest.mark.parametrize("peer", [OURS, "SDPA"])
@pytest.mark.parametrize("queries, length", [(1, 1), (1, 680), (25, 55), (256, 680)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cached_attention(
    dtype: torch.dtype, queries: int, length: int, peer: str, measure: Callable[..., float]
) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, queries, DIM, generator=g).to(dtype)
    k, v = (torch.randn(2, HEADS, 680, DIM, generator=g).to(dtype) for _ in range(2))

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length])

    functions = {OURS: lambda: ops.cached_attention(q, k, v, length), "SDPA": sdpa}
    agree(functions[OURS](), sdpa())
    measure(
        f"{queries} new queries on {length} keys, 2 x {HEADS} x {DIM}, {str(dtype)[6:]}",
        peer,
        functions[peer],
        bytes=2 * 2 * HEADS * length * DIM * k.element_size(),
        flops=4 * 2 * HEADS * DIM * queries * length,
    )
