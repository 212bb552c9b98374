"""FSQ and LFQ of vector-quantize-pytorch as they are and under `arimg.accelerate`, in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import arimg
from conftest import OURS, SMOKE

PACKAGE = "vector-quantize-pytorch"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "FSQ 8x8x8x5x5x5": ("FSQ", dict(levels=[8, 8, 8, 5, 5, 5])),
    "FSQ 8x8x8x5x5x5 of 256 channels": ("FSQ", dict(levels=[8, 8, 8, 5, 5, 5], dim=256)),
    "ResidualFSQ 4 x 8x5x5x3": ("ResidualFSQ", dict(levels=[8, 5, 5, 3], dim=4, num_quantizers=4)),
    "ResidualFSQ 4 x 5x5x5x5x5x5": ("ResidualFSQ", dict(levels=[5] * 6, dim=6, num_quantizers=4)),
    "LFQ 18 bits": ("LFQ", dict(codebook_size=2**18)),
    "BSQ 18 bits": ("LFQ", dict(codebook_size=2**18, spherical=True)),
    "ResidualLFQ 4 x 10 bits": ("ResidualLFQ", dict(dim=10, codebook_size=2**10, num_quantizers=4)),
}


@pytest.mark.parametrize("peer", [OURS, PACKAGE])
@pytest.mark.parametrize("way", ["codes", "back"])
@pytest.mark.parametrize("tokens", [256, 16384])
@pytest.mark.parametrize("case", CASES)
def test_scalar_codes(case: str, tokens: int, way: str, peer: str, measure: Callable[..., float]) -> None:
    package: Any = pytest.importorskip("vector_quantize_pytorch")
    name, options = CASES[case]
    if way == "back" and name.startswith("Residual"):
        pytest.skip("the package looks these up in a table")
    torch.manual_seed(0)
    theirs = getattr(package, name)(**options).eval()
    ours = copy.deepcopy(theirs)
    arimg.accelerate(ours)
    x = torch.randn(1, 64 if SMOKE else tokens, options.get("dim", getattr(theirs, "dim", None)))
    module = {OURS: ours, PACKAGE: theirs}[peer]
    with torch.no_grad():
        want = theirs(x)
        if way == "back":
            assert torch.equal(ours.indices_to_codes(want[1]), theirs.indices_to_codes(want[1]))
            measure(f"{case}, codes of indices, N={tokens}", peer, lambda: module.indices_to_codes(want[1]))
        else:
            assert (ours(x)[1] != want[1]).sum() <= 1 + tokens // 10000  # within rounding of a half
            measure(f"{case}, N={tokens}", peer, lambda: module(x))
