"""KID-EffLite0: squared maximum mean discrepancy of image features, cubic kernel (arXiv 1801.01401).

The features are EfficientNet-lite0's: the numbers compare with one another, and with no published FID or KID.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.evaluate.efficientnet import EfficientNetLite0

FEATURE_SIZE = 128  # images are resized to this, so that the last maps of small images are more than 2 x 2


class Kid(NamedTuple):
    """Mean and standard deviation over subsets. Zero in expectation for two samples of one distribution."""

    mean: float
    std: float


@torch.no_grad()
def features(net: EfficientNetLite0, images: Tensor, batch: int = 32) -> Tensor:
    """images [N, 3, H, W] in [0, 1] -> float64 [N, 1280]."""
    size = (FEATURE_SIZE, FEATURE_SIZE)
    parts = [
        net(F.interpolate(part, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1))
        for part in images.split(batch)
    ]
    return torch.cat(parts).double()


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased estimate for features [N, D] and [M, D] under the kernel (x . y / D + 1)^3."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"expected features [N >= 2, D] and [M >= 2, D], got {list(a.shape)} and {list(b.shape)}"
        )

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    own = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b))
    return float(own - 2 * kernel(a, b).mean())


def kid(a: Tensor, b: Tensor, subsets: int = 50, subset_size: int = 256, seed: int = 0) -> Kid:
    """KID of two sets of features, averaged over random subsets of (at most) `subset_size`."""
    size = min(subset_size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = [torch.randperm(len(x), generator=generator)[:size] for x in (a, b)]
        values.append(squared_mmd(a[rows[0]], b[rows[1]]))
    result = torch.tensor(values)
    return Kid(float(result.mean()), float(result.std(correction=0)))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images [N, 3, H, W] in [0, 1]: [N]."""
    return -10 * (a.float() - b.float()).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
