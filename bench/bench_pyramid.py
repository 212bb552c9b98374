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
@pytest.mark.parametrize("images", [1, 8])
def test_features(images: int, peer: str, measure: Callable[..., float]) -> None:
    f, *rest = tensors(images, 256)
    indices, f_hat = ops.encode(f, *rest, SCALES, PHI)
    arguments = (indices, *rest, SCALES, PHI)
    assert torch.allclose(reference.features(*arguments), f_hat, atol=1e-4)
    function = {OURS: ops.features, "torch": reference.features}[peer]
    flops = images * len(SCALES) * 2 * 9 * CHANNELS * CHANNELS * SIZE[0] * SIZE[1]
    measure(f"VAR features, {images} x 32 x 16 x 16", peer, lambda: function(*arguments), flops=flops)


@pytest.mark.parametrize("peer", [OURS, "torch"])
def test_encode_signs(peer: str, measure: Callable[..., float]) -> None:
    """Infinity's tokenizer at 256 px: no codebook, no phi, bilinear."""
    f = tensors(8, 1)[0]
    arguments = {"f": f, "codebook": None, "scales": SCALES, "up": "bilinear"}
    ours, theirs = ops.encode(**arguments), reference.encode(**arguments)
    equal = [bool((i == j).all()) for i, j in zip(ours[0], theirs[0])]
    assert sum(equal) >= len(SCALES) - 2, equal
    function = {OURS: ops.encode, "torch": reference.encode}[peer]
    measure("sign encode, 8 x 32 x 16 x 16, 10 scales", peer, lambda: function(**arguments))


RESIZES = [
    ("area", (16, 16), (10, 10)),
    ("bilinear", (10, 10), (16, 16)),
    ("bicubic", (10, 10), (16, 16)),
    ("area", (64, 64), (16, 16)),
    ("bicubic", (16, 16), (64, 64)),
]


@pytest.mark.parametrize("peer", [OURS, "torch", "copy of the same bytes"])
@pytest.mark.parametrize("mode, size, to", RESIZES)
def test_resize(mode: str, size: tuple, to: tuple, peer: str, measure: Callable[..., float]) -> None:
    # Results of 32 MB and more would be memory that the system has to clear first.
    images = 8 if SMOKE or 64 in (*size, *to) else 64
    x = torch.randn(images, CHANNELS, *size)
    assert torch.allclose(ops.resize(x, to, mode), reference.resize(x, to, mode), atol=1e-5)
    moved = x.numel() + x[..., 0, 0].numel() * to[0] * to[1]
    source, target = torch.zeros(moved // 2), torch.zeros(moved // 2)
    function = {
        OURS: lambda: ops.resize(x, to, mode),
        "torch": lambda: reference.resize(x, to, mode),
        "copy of the same bytes": lambda: target.copy_(source),
    }[peer]
    measure(f"{mode}, {len(x)} x 32, {size[0]} to {to[0]}", peer, function, bytes=4 * moved)


@pytest.mark.parametrize("peer", [OURS, "torch"])
@pytest.mark.parametrize("mode, size, to", RESIZES[:3])
def test_resize_gradient(mode: str, size: tuple, to: tuple, peer: str, measure: Callable[..., float]) -> None:
    x = torch.randn(8 if SMOKE else 64, CHANNELS, *size).requires_grad_()
    ours, theirs = ops.resize(x, to, mode), reference.resize(x, to, mode)
    grad = torch.randn_like(ours)

    def back(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    assert torch.allclose(back(ours), back(theirs), atol=1e-5)
    y = {OURS: ours, "torch": theirs}[peer]
    name = f"gradient of {mode}, {len(x)} x 32, {size[0]} to {to[0]}"
    measure(name, peer, lambda: back(y), bytes=4 * (x.numel() + grad.numel()))


@pytest.mark.parametrize("peer", [OURS, "torch"])
def test_pool_tokens(peer: str, measure: Callable[..., float]) -> None:
    x = torch.randn(2, 16, 1024, 64)
    arguments = (x, (32, 32), (16, 16))
    assert torch.allclose(ops.pool_tokens(*arguments), reference.pool_tokens(*arguments), atol=1e-5)
    function = {OURS: ops.pool_tokens, "torch": reference.pool_tokens}[peer]
    measure(
        "pool_tokens, 2 x 16 x 32^2 x 64 to 16^2", peer, lambda: function(*arguments), bytes=5 * x.numel()
    )


@pytest.mark.parametrize("peer", [OURS, "copy"])
@pytest.mark.parametrize("channels", [32, 1024])
def test_token_shuffle(channels: int, peer: str, measure: Callable[..., float]) -> None:
    x = torch.randn(2, 1024, channels)
    function = {OURS: lambda: ops.token_shuffle(x, 2, (32, 32)), "copy": x.clone}[peer]
    measure(f"token_shuffle, 2 x 32^2 x {channels}, 2 x 2", peer, function, bytes=8 * x.numel())


@pytest.mark.parametrize("peer", [OURS, "torch where", "copy of the fine map"])
@pytest.mark.parametrize("images, channels, side", [(4, 64, 32), (4, 256, 64)])
def test_merge_two_levels(
    images: int, channels: int, side: int, peer: str, measure: Callable[..., float]
) -> None:
    fine = torch.randn(images, channels, side, side)
    coarse = torch.randn(images, channels, side // 2, side // 2)
    is_fine = torch.rand(images, side // 2, side // 2) < 0.5
    arguments = (coarse, fine, is_fine)
    assert torch.equal(ops.merge_two_levels(*arguments), reference.merge_two_levels(*arguments))
    function = {
        OURS: lambda: ops.merge_two_levels(*arguments),
        "torch where": lambda: reference.merge_two_levels(*arguments),
        "copy of the fine map": fine.clone,
    }[peer]
    bytes = {OURS: 9, "torch where": 9, "copy of the fine map": 8}[peer] * fine.numel()
    measure(f"merge_two_levels, {images} x {channels}, {side} x {side}", peer, function, bytes=bytes)


@pytest.mark.parametrize("peer", [OURS, "torch where"])
def test_merge_gradient(peer: str, measure: Callable[..., float]) -> None:
    fine = torch.randn(4, 64, 32, 32).requires_grad_()
    coarse = torch.randn(4, 64, 16, 16).requires_grad_()
    is_fine = torch.rand(4, 16, 16) < 0.5
    grad = torch.randn_like(fine)
    results = [f(coarse, fine, is_fine) for f in (ops.merge_two_levels, reference.merge_two_levels)]

    def back(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (coarse, fine), grad, retain_graph=True)

    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*map(back, results)))
    y = results[0 if peer == OURS else 1]
    measure("gradient of merge_two_levels, 4 x 64, 32 x 32", peer, lambda: back(y), bytes=9 * fine.numel())


@pytest.mark.parametrize("peer", [OURS, "torch fft"])
def test_frequency_bands(peer: str, measure: Callable[..., float]) -> None:
    f = tensors(8, 1)[0]
    ours, theirs = ops.frequency_bands, reference.frequency_bands
    assert torch.allclose(ours(f, SCALES), theirs(f, SCALES), atol=1e-5)
    masks = reference.band_masks(SIZE, SCALES)[:, None, None, :, : SIZE[1] // 2 + 1]
    function = {
        OURS: lambda: ours(f, SCALES),
        "torch fft": lambda: torch.fft.irfft2(torch.fft.rfft2(f) * masks, s=SIZE),
    }[peer]
    measure("frequency_bands, 8 x 32 x 16 x 16, 10 bands", peer, function, bytes=4 * 11 * f.numel())
