"""Linear layers of a few rows over weights larger than the cache, against torch. GB/s are of the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops
from conftest import OURS, SMOKE

IN, OUT = (256, 512) if SMOKE else (4096, 16384)
GROUP = 128
PEERS = {
    "fp32": "torch linear",
    "bf16": "torch linear",
    "int8": "torch int8pack_mm",
    "int4": "torch int4pack_mm",
}
# bfloat16 rows with bfloat16 weights; codes with rows of the type that the peer is fast in as well
CASES = [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float32)]
CASES += [("int4", torch.bfloat16)]


@cache
def make_weight(kind: str) -> Tensor | ops.QuantizedWeight:
    make_weight.cache_clear()  # one at a time
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5
    if kind == "bf16":
        return w.bfloat16()
    return w if kind == "fp32" else ops.quantize_weight(w, int(kind[3:]), GROUP if kind == "int4" else None)


def functions_of(kind: str, x: Tensor) -> tuple[dict[str, Callable[[], Tensor]], int]:
    weight = make_weight(kind)
    if isinstance(weight, Tensor):
        return {
            OURS: lambda: ops.linear_rows(x, weight),
            PEERS[kind]: lambda: F.linear(x, weight),
        }, weight.nbytes
    nbytes = weight.codes.nbytes + weight.scales.nbytes
    ours = lambda: ops.linear_rows(x, weight)  # noqa: E731
    if kind == "int8":
        scales = weight.scales[:, 0].to(x.dtype)
        return {OURS: ours, PEERS[kind]: lambda: torch._weight_int8pack_mm(x, weight.codes, scales)}, nbytes
    # torch takes values 0 to 15 with scale and zero per group, [groups, O, 2], where a value stands for
    # (value - 8) scale + zero.
    low, high = weight.codes.view(OUT, -1, 16) & 15, weight.codes.view(OUT, -1, 16) >> 4
    values = torch.stack((low, high), 2).view(OUT, IN).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    scales = weight.scales.T.contiguous().to(x.dtype)
    both = torch.stack((scales, torch.zeros_like(scales)), -1)
    return {
        OURS: ours,
        PEERS[kind]: lambda: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, both),
    }, nbytes


@pytest.mark.parametrize("peer", ["ours", "torch"])
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=[f"{k}-x{str(d)[6:]}" for k, d in CASES])
def test_linear_rows(
    kind: str, dtype: torch.dtype, rows: int, peer: str, measure: Callable[..., float]
) -> None:
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    functions, nbytes = functions_of(kind, x)
    results = [f().float() for f in functions.values()]
    assert (results[0] - results[1]).abs().max() < (1e-4 if dtype == torch.float32 else 6e-2)
    name = OURS if peer == "ours" else PEERS[kind]
    group = f"linear, {rows} rows of {str(dtype)[6:]}, {kind} weight {OUT} x {IN} ({nbytes / 1e6:.0f} MB)"
    flops = 2 * rows * IN * OUT
    measure(group, name, functions[name], bytes=nbytes, flops=flops, rounds=12, ceiling="read")


@pytest.mark.parametrize("peer", [OURS, "torch ops"])
def test_gated_pair(peer: str, measure: Callable[..., float]) -> None:
    weight = make_weight("bf16")
    assert isinstance(weight, Tensor)
    gate, up = weight.chunk(2)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    functions = {
        OURS: lambda: ops.gated_linear_rows(x, gate, up),
        "torch ops": lambda: F.silu(F.linear(x, gate)) * F.linear(x, up),
    }
    ours, theirs = functions[OURS](), functions["torch ops"]()
    assert ((ours - theirs).abs() <= 3e-2 * (1 + theirs.abs())).all()  # torch rounds both products
    group = f"SwiGLU pair, 2 rows, bf16 weights 2 x {OUT // 2} x {IN} ({weight.nbytes / 1e6:.0f} MB)"
    measure(group, peer, functions[peer], bytes=weight.nbytes, rounds=12, ceiling="read")
