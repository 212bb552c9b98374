"""The bitwise multi-scale residual quantizer of Infinity (arXiv 2412.04431), without a codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn.scale_quantizer import QuantizerOutput, Scales

MOST_BITS = 62  # of an index


class SignQuantizer(nn.Module):
    """Every scale codes the signs of what the scales before left over, +-1 / sqrt(channels) each."""

    def __init__(self, channels: int, scales: Scales, beta: float = 0.25) -> None:
        super().__init__()
        if not 1 <= channels <= MOST_BITS:
            raise ValueError(f"expected 1 to {MOST_BITS} channels, got {channels}")
        self.channels, self.scales, self.beta = channels, scales, beta
        self.vocab_size, self.value = 2**channels, channels**-0.5

    def code_map(self, bits: Tensor, scale: int) -> Tensor:
        """bool [B, h * w, channels] -> codes [B, channels, h, w]."""
        codes = torch.where(bits, self.value, -self.value)
        return codes.transpose(1, 2).reshape(len(bits), self.channels, *self.scales[scale])

    def next_map(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat averaged down to `scale`: [B, h * w, channels]."""
        return ops.area_down(f_hat, self.scales[scale]).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def bits(
        self, f: Tensor, flips: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features [B, C, H, W] -> bits of each scale, the maps before each but the first, and f_hat.

        flips: bool [B, h * w, C] of each scale. Flipped bits enter f_hat, and the later scales code the rest
        that they leave: their bits correct the errors (Infinity's self-correction).
        """
        rest = f.float().clone()
        f_hat, found, maps = torch.zeros_like(rest), [], []
        for k, scale in enumerate(self.scales):
            if k:
                maps.append(self.next_map(f_hat, k))
            bits = ops.area_down(rest, scale).flatten(2).transpose(1, 2) > 0
            found.append(bits)
            used = bits if flips is None else bits ^ flips[k]
            ops.accumulate_(f_hat, self.code_map(used, k).contiguous(), residual=rest, up="bilinear")
        return found, maps, f_hat

    def encode(self, f: Tensor) -> list[Tensor]:
        """Features -> int64 [B, h * w] per scale, bit c of an index for channel c, in one call."""
        return ops.encode(f.float(), None, scales=self.scales, up="bilinear", sign=self.value)[0]

    def features(self, indices: Sequence[Tensor]) -> Tensor:
        """The other way of `encode`."""
        return ops.features(
            indices, None, scales=self.scales, up="bilinear", sign=self.value, channels=self.channels
        )

    def forward(self, f: Tensor) -> QuantizerOutput:
        """For training: the gradient of f_hat passes to f, the loss draws f to f_hat at every scale."""
        f, target = f.float(), f.detach().float()
        bits, _, f_hat = self.bits(target)
        indices = [ops.pack_bits(b, msb_first=False) for b in bits]
        return QuantizerOutput(f_hat + (f - target), self.beta * F.mse_loss(f, f_hat), indices)
