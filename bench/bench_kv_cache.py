"""Appending to a cache with normalised queries and keys against separate torch operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arimg import ops, reference
from conftest import OURS

HEADS, DIM = 16, 64


@pytest.mark.parametrize("peer", [OURS, "torch ops"])
@pytest.mark.parametrize("tokens", [1, 25, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_append_qk_norm(dtype: torch.dtype, tokens: int, peer: str, measure: Callable[..., float]) -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3, HEADS, DIM, generator=g).to(dtype)
    k, v = torch.zeros(2, 2, HEADS, 680, DIM, dtype=dtype)
    q_scale = torch.rand(HEADS, generator=g) + 3
    functions = {
        OURS: lambda: ops.append_qk_norm_(k, v, qkv, 100, q_scale, True),
        "torch ops": lambda: reference.append_qk_norm_(k, v, qkv, 100, q_scale, True),
    }
    ours = functions[OURS](), k.clone(), v.clone()
    theirs = functions["torch ops"](), k, v
    noise = 1e-5 if dtype == torch.float32 else 4e-2
    assert all((a - b).abs().max() < noise for a, b in zip(ours, theirs))
    group = f"append {tokens} tokens, 2 x {HEADS} x {DIM}, {str(dtype)[6:]}"
    measure(group, peer, functions[peer], bytes=2 * qkv.nbytes)
