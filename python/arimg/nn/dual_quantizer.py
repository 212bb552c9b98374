"""The quantizer of TokenFlow (arXiv 2412.03069): two codebooks under one index, in a multi-scale residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn.scale_quantizer import QuantizerOutput, Scales


class DualQuantizer(nn.Module):
    """The first `semantic` channels are coded by one codebook, the others by another, at one index: the least
    |s - s_j|^2 + weight |p - p_j|^2 of normalised parts. Area down, bicubic up, no filter on the codes.
    """

    def __init__(
        self, vocab_size: int, semantic: int, pixel: int, scales: Scales, weight: float = 1.0,
        beta: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(semantic, pixel) < 1:
            raise ValueError(f"expected channels for both parts, got {semantic} and {pixel}")
        self.vocab_size, self.channels, self.scales = vocab_size, semantic + pixel, scales
        self.parts, self.weight, self.beta = (semantic, pixel), weight, beta
        self.embedding = nn.Embedding(vocab_size, self.channels)

    def codes(self) -> Tensor:
        """Both codebooks side by side, normalised each: [K, channels]."""
        return self._normalised(self.embedding.weight)

    def _normalised(self, x: Tensor) -> Tensor:
        return torch.cat([F.normalize(part, dim=-1) for part in x.split(self.parts, -1)], -1)

    def code_map(self, indices: Tensor, scale: int) -> Tensor:
        """int64 [B, h * w] -> codes [B, channels, h, w]."""
        codes = ops.lookup(indices, self.codes()).transpose(1, 2)
        return codes.reshape(len(indices), self.channels, *self.scales[scale])

    def next_map(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat averaged down to `scale`: [B, h * w, channels]."""
        return ops.area_down(f_hat, self.scales[scale]).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode(self, f: Tensor) -> list[Tensor]:
        """Features [B, C, H, W] -> indices int64 [B, h * w] per scale."""
        books = self.embedding.weight.split(self.parts, 1)
        return ops.encode_parts(f.float(), books, self.scales, weights=(1.0, self.weight))[0]

    @torch.no_grad()
    def features(self, indices: Sequence[Tensor]) -> Tensor:
        """f_hat [B, C, H, W] of the given scales, the first ones or all."""
        return ops.features(indices, self.codes(), scales=self.scales)

    @torch.no_grad()
    def generator_input(self, indices: Sequence[Tensor]) -> Tensor:
        """The maps before scales 1, 2, ...: [B, L - first, C]."""
        maps = [self.next_map(self.features(indices[:k]), k) for k in range(1, len(self.scales))]
        return torch.cat(maps, 1)

    def forward(self, f: Tensor) -> QuantizerOutput:
        """For training, as `ScaleQuantizer`: codes are drawn to features at every scale, and features to
        them.
        """
        f = f.float()
        target, codes = f.detach(), self.codes()
        books = codes.detach().split(self.parts, 1)
        f_hat, loss, indices = torch.zeros_like(f), f.new_zeros(()), []
        for k, scale in enumerate(self.scales):
            rows = ops.area_down(target - f_hat.detach(), scale).permute(0, 2, 3, 1).flatten(0, 2)
            a, b = (F.normalize(part, dim=-1) for part in rows.split(self.parts, 1))
            index = ops.nearest_code_dual(a, b, books[0], books[1], self.weight).reshape(len(f), -1)
            up = F.interpolate(self.code_map(index, k), f.shape[-2:], mode="bicubic")
            f_hat = f_hat + up
            loss = loss + self.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, target)
            indices.append(index)
        return QuantizerOutput(f_hat.detach() + (f - target), loss / len(self.scales), indices)
