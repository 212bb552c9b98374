"""Small 1-D tokenizers of pictures of 4 x 4 colours and of one colour, and their training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.layout import Layout
from arimg.tokenizers.latent import LatentTokenizer

GROUPS = [1, 1, 1, 1, 4, 4, 4]


class Averages(nn.Module):
    """In place of a trained convolutional autoencoder: the mean colour of each 8 x 8 pixels, and back."""

    z_channels = 3

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.scales, self.image_size = ((side, side),), (8 * side, 8 * side)

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
    return _train(made(seed), pictures, seed, correct, steps, batch=32, prefix=0.4)


def colours(n: int, seed: int) -> Tensor:
    """Of one colour, 8 px."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8)


def trained_on_colours(seed: int, correct: float, steps: int = 500) -> LatentTokenizer:
    """Six tokens of 16 codes, of which 50 are near: noise is any code."""
    torch.manual_seed(seed)
    layout = Layout.groups([1, 1, 2, 2])
    model = LatentTokenizer(Averages(1), layout, vocab_size=16, width=32, depth=2, heads=1)
    return _train(model, colours, seed, correct, steps, batch=128, prefix=0.0)


def _train(
    model: LatentTokenizer, pictures: Callable[[int, int], Tensor], seed: int, correct: float, steps: int,
    batch: int, prefix: float,
) -> LatentTokenizer:  # fmt: skip
    optimizer = torch.optim.Adam(model.train().parameters(), 2e-3)
    length, groups = model.layout.length, len(model.layout)
    for step in range(steps):
        images = pictures(batch, 1000 * seed + step)
        if step % 25 == 0 and step <= 150:
            model.restart(images, model.encode(images) if step else None)
        draw = torch.rand(2)
        tokens = int(torch.randint(1, length + 1, ())) if draw[0] < prefix else length
        group = int(torch.randint(groups - 1, ())) if draw[1] < correct and step >= 100 else None
        out = model(images, tokens, group)
        loss = (out.reconstruction - model.target(images, tokens)).square().mean() + 0.02 * out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
