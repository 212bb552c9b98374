"""A small 1-D tokenizer of pictures of 4 x 4 colours, and its training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.layout import Layout
from arimg.tokenizers.latent import LatentTokenizer

GROUPS = [1, 1, 1, 1, 4, 4, 4]


class Averages(nn.Module):
    """In place of a trained convolutional autoencoder: the mean colour of each 8 x 8 pixels, and back."""

    scales, z_channels, image_size = ((4, 4),), 3, (32, 32)

    def features(self, images: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(images, 8) - 2

    def pixels(self, f_hat: Tensor) -> Tensor:
        return F.interpolate(f_hat, scale_factor=8) / 4 + 0.5


def made(seed: int = 0) -> LatentTokenizer:
    torch.manual_seed(seed)
    return LatentTokenizer(Averages(), Layout.groups(GROUPS), vocab_size=64, width=48, depth=1)


def pictures(n: int, seed: int) -> Tensor:
    """Smooth colours of 2 x 2 random values, 32 px, with a weaker pattern of 4 x 4."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.rand(n, 3, s, s, generator=generator) for s in (2, 4))
    up = [F.interpolate(x, (32, 32), mode="nearest") for x in (coarse, fine)]
    return 0.7 * up[0] + 0.3 * up[1]


def trained(seed: int, correct: float, steps: int = 400) -> LatentTokenizer:
    """correct: how often a step's tokens are noise."""
    model = made(seed).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        images = pictures(32, 1000 * seed + step)
        if step % 25 == 0 and step <= 150:
            model.restart(images, model.encode(images) if step else None)
        draw = torch.rand(2)
        tokens = int(torch.randint(1, 17, ())) if draw[0] < 0.4 else 16
        group = int(torch.randint(len(GROUPS) - 1, ())) if draw[1] < correct and step >= 100 else None
        out = model(images, tokens, group)
        loss = (out.reconstruction - model.target(images, tokens)).square().mean() + 0.02 * out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
