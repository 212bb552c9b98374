"""VAR's multi-scale encode and its per-scale step against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arimg import ops, reference
from conftest import OURS, SMOKE

SCALES = [(n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
PHI = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
CHANNELS, SIZE, CODES = 32, (16, 16), 4096


def tensors(images: int, codes: int = CODES) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    f = torch.randn(images, CHANNELS, *SIZE, generator=g)
    codebook = torch.randn(codes, CHANNELS, generator=g)
    weights = torch.randn(4, CHANNELS, CHANNELS, 3, 3, generator=g) * (9 * CHANNELS) ** -0.5
    return f, codebook, weights, torch.randn(4, CHANNELS, generator=g) * 0.1


@pytest.mark.parametrize("peer", [OURS, "torch"])
@pytest.mark.parametrize("images", [1, 8])
def test_encode(images: int, peer: str, measure: Callable[..., float]) -> None:
    codes = 256 if SMOKE else CODES
    arguments = (*tensors(images, codes), SCALES, PHI)
    ours, theirs = ops.encode(*arguments), reference.encode(*arguments)
    # An index that differs by rounding makes the residuals part, so one scale and the last may differ.
    # The tests replay every choice in float64.
    for b in range(images):
        equal = [bool((i[b] == j[b]).all()) for i, j in zip(ours[0], theirs[0])]
        assert sum(equal) >= len(SCALES) - 2, equal
    function = {OURS: ops.encode, "torch": reference.encode}[peer]
    pixels = sum(h * w for h, w in SCALES)
    search = 2 * pixels * codes * CHANNELS
    phi = len(SCALES) * 2 * 9 * CHANNELS * CHANNELS * SIZE[0] * SIZE[1]
    group = f"VAR encode, {images} x 32 x 16 x 16, 10 scales, {codes} codes"
    measure(group, peer, lambda: function(*arguments), flops=images * (search + phi))


@pytest.mark.parametrize("peer", [OURS, "torch"])
@pytest.mark.parametrize("images, side", [(1, 1), (1, 10), (2, 10), (2, 16), (16, 10)])
def test_accumulate(images: int, side: int, peer: str, measure: Callable[..., float]) -> None:
    f, _, weights, biases = tensors(images, 64)
    h = f[:, :, :side, :side].contiguous()
    ours, theirs = f.clone(), f.clone()
    ops.accumulate_(ours, h, weights[0], biases[0])
    reference.accumulate_(theirs, h, weights[0], biases[0])
    assert torch.allclose(ours, theirs, atol=1e-5)
    target = torch.zeros_like(f)
    function = {OURS: ops.accumulate_, "torch": reference.accumulate_}[peer]
    flops = 2 * 9 * CHANNELS * CHANNELS * images * SIZE[0] * SIZE[1]
    measure(
        f"accumulate, {images} x 32, {side} x {side} to 16 x 16",
        peer,
        lambda: function(target, h, weights[0], biases[0]),
        flops=flops,
    )


@pytest.mark.parametrize("peer", [OURS, "torch"])
@pytest.mark.parametrize("kind", ["area_down", "bicubic_up"])
def test_resample(kind: str, peer: str, measure: Callable[..., float]) -> None:
    small, large = (10, 10), (16, 16)
    x = torch.randn(8, CHANNELS, *(large if kind == "area_down" else small))
    size = small if kind == "area_down" else large
    ours, theirs = getattr(ops, kind), getattr(reference, kind)
    assert torch.allclose(ours(x, size), theirs(x, size), atol=1e-5)
    function = {OURS: ours, "torch": theirs}[peer]
    measure(f"{kind}, 8 x 32", peer, lambda: function(x, size), bytes=4 * 8 * 32 * (100 + 256))
