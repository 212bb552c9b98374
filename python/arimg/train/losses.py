"""Image losses and the optional patch discriminator."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.evaluate.efficientnet import load_efficientnet


def gradient_loss(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute error of horizontal and vertical differences, over `levels` halvings of [B, 3, H, W]."""
    total = a.new_zeros(())
    for level in range(levels):
        if level:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        d = a - b
        total = total + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    return total / levels


def chroma_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of red - green and blue - green: a small tokenizer else learns hues last."""
    d = a - b
    return (d[:, 0] - d[:, 1]).abs().mean() + (d[:, 2] - d[:, 1]).abs().mean()


class FeatureLoss(nn.Module):
    """Distance of channel-normalised maps of a frozen network's first stages (LPIPS without its weights)."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        self.net, self.stages = load_efficientnet(), stages

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        with torch.no_grad():
            targets = [F.normalize(m, dim=1) for m in self.net.maps(b, self.stages)]
        for ours, target in zip(self.net.maps(a, self.stages), targets):
            total = total + (F.normalize(ours, dim=1) - target).square().sum(1).mean()
        return total / self.stages


class PatchDiscriminator(nn.Module):
    """Three strided convolutions and a map of logits [B, 1, H / 8, W / 8] (PatchGAN, arXiv 1611.07004)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 4, 2, 1)] + ([nn.GroupNorm(8, b)] if i else []) + [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
