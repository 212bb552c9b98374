"""The table of the model card: a tokenizer and a generator against images they have not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arimg.data.images import Images
from arimg.evaluate.efficientnet import load_efficientnet
from arimg.evaluate.kid import Kid, features, kid, psnr
from arimg.generators import VAR
from arimg.tokenizers import VQVAE


@dataclass(frozen=True)
class Report:
    """PSNR of held-out reconstructions (dB) and KID-EffLite0 against the held-out images, by name."""

    psnr: float
    kids: dict[str, Kid]
    held_out: int

    def __str__(self) -> str:
        lines = [
            f"reconstruction PSNR, {self.held_out} held-out images: {self.psnr:.2f} dB",
            "",
            "KID-EffLite0 (x 1000)",
        ]
        lines += [f"  {name:<42} {1000 * k.mean:8.2f} +- {1000 * k.std:.2f}" for name, k in self.kids.items()]
        return "\n".join(lines)


@torch.no_grad()
def reconstructions(tokenizer: VQVAE, images: Tensor, batch: int = 32) -> Tensor:
    return torch.cat([tokenizer.reconstruct(part) for part in images.split(batch)])


def generations(var: VAR, labels: Tensor, seed: int, batch: int = 32, **sampling: Any) -> Tensor:
    """One image per label; image i is drawn with seed + i."""
    parts = [
        var.generate(part, seed=seed + i * batch, **sampling)
        for i, part in enumerate(tqdm(labels.split(batch), desc="generate", mininterval=5.0))
    ]
    return torch.cat(parts)


def gaussian_images(train: Images, labels: Tensor, seed: int) -> Tensor:
    """Baseline: every pixel drawn from its class's mean and standard deviation over the training images."""
    generator = torch.Generator().manual_seed(seed)
    images = train.batch(range(len(train)))
    classes = torch.from_numpy(train.labels)
    out = torch.empty(len(labels), *images.shape[1:])
    for label in labels.unique():
        own = images[classes == label] if (classes == label).any() else images
        rows = (labels == label).nonzero().flatten()
        noise = torch.randn(len(rows), *images.shape[1:], generator=generator)
        out[rows] = own.mean(0) + noise * own.std(0, correction=0)
    return out.clamp(0, 1)


def evaluate(
    tokenizer: VQVAE, var: VAR, train: Images, held_out: Images, seed: int = 0, **sampling: Any
) -> Report:
    """Compares with the held-out images: as many generations of the same classes, and baselines."""
    net = load_efficientnet()
    real = held_out.batch(range(len(held_out)))
    labels = torch.from_numpy(held_out.labels)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(held_out)]
    untrained = VAR(tokenizer, **var.config()).eval()
    again = reconstructions(tokenizer, real)
    sets = {
        "generated": generations(var, labels, seed, **sampling),
        "training images (floor)": train.batch(chosen.numpy()),
        "held-out images, reconstructed": again,
        "untrained generator, trained tokenizer": generations(untrained, labels, seed),
        "Gaussian pixels per class": gaussian_images(train, labels, seed),
    }
    target = features(net, real)
    kids = {name: kid(features(net, images), target, seed=seed) for name, images in sets.items()}
    return Report(float(psnr(again, real).mean()), kids, len(held_out))
