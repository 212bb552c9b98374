"""Frequency bands by the Fourier transform: the oracle of `arimg.ops.pyramid_bands`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from arimg.reference.precision import wide


def band_masks(grid: tuple[int, int], scales: Sequence[tuple[int, int]]) -> Tensor:
    """bool [bands, H, W] over the frequencies of `torch.fft.fft2`: which band holds which.

    Frequencies of one radius form a shell. Bands take whole shells outwards: each at least one, and beyond
    that as many as bring their number of frequencies nearest to the scales' share of all tokens.
    """
    H, W = grid

    def radius(y: int, x: int) -> int:  # the square of the radius in cycles per pixel, times (H W)^2
        return (min(y, H - y) * W) ** 2 + (min(x, W - x) * H) ** 2

    shells: dict[int, int] = {}
    for y in range(H):
        for x in range(W):
            shells[radius(y, x)] = shells.get(radius(y, x), 0) + 1
    radii = sorted(shells)
    if len(radii) < len(scales):
        raise ValueError(f"expected at most {len(radii)} bands on a grid {(H, W)}, got {len(scales)}")
    tokens = [h * w for h, w in scales]
    band_of: dict[int, int] = {}
    taken, shell = 0, 0
    for k in range(len(scales)):
        target = H * W * sum(tokens[: k + 1]) / sum(tokens)
        last_start = len(radii) - (len(scales) - 1 - k)  # leaves a shell for each later band
        first = shell
        while shell < last_start:
            nearer = abs(taken + shells[radii[shell]] - target) < abs(taken - target)
            if shell > first and not nearer and k < len(scales) - 1:
                break
            band_of[radii[shell]] = k
            taken += shells[radii[shell]]
            shell += 1
    band = torch.tensor([[band_of[radius(y, x)] for x in range(W)] for y in range(H)])
    return band == torch.arange(len(scales)).view(-1, 1, 1)


def frequency_bands(x: Tensor, scales: Sequence[tuple[int, int]]) -> Tensor:
    """x [B, C, H, W] -> [bands, B, C, H, W], in x's dtype: the parts of x in each band."""
    masks = band_masks((x.shape[2], x.shape[3]), scales).to(x.device)
    spectrum = torch.fft.fft2(wide(x))
    return torch.fft.ifft2(spectrum * masks[:, None, None]).real.to(x.dtype)
