"""The quantizer of next-frequency prediction (NFIG, arXiv 2503.07076): scale k codes frequency band k."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import ops
from arimg.nn.scale_quantizer import QuantizerOutput, ScaleQuantizer, Scales
from arimg.ops.pyramid_bands import band_masks


class BandQuantizer(ScaleQuantizer):
    """One codebook for all bands, whose codes are added upsampled and without a filter.

    Band k joins what the scales before left over of theirs, and scale k codes the sum. Bands are those of
    `ops.band_masks`, none of which is empty; too many scales for the grid are a ValueError.
    """

    def __init__(self, vocab_size: int, channels: int, scales: Scales) -> None:
        band_masks(scales[-1], scales)  # refuses what does not fit
        super().__init__(vocab_size, channels, scales, shared_phi=1, ratio=0.0)

    @torch.no_grad()
    def encode(self, f: Tensor) -> list[Tensor]:
        """Features [B, C, H, W] -> indices int64 [B, h * w] per scale."""
        bands = ops.frequency_bands(f, self.scales)
        return ops.encode_bands(list(bands), self.embedding.weight, self.scales)[0]

    def forward(self, f: Tensor) -> QuantizerOutput:
        """Quantize features for training: the f_hat of scale k is compared with the bands up to k."""
        f = f.float()
        size = (f.shape[-2], f.shape[-1])
        wanted = ops.frequency_bands(f, self.scales).cumsum(0)
        f_hat, loss, indices = torch.zeros_like(f), f.new_zeros(()), []
        for k, scale in enumerate(self.scales):
            target = wanted[k].detach()
            rows = ops.area_down(target - f_hat.detach(), scale).permute(0, 2, 3, 1)
            index = ops.nearest_code(rows.reshape(-1, self.channels), self.embedding.weight)
            codes = self.code_map(index.reshape(len(f), -1), k)
            f_hat = f_hat + (codes if scale == size else ops.bicubic_up(codes, size))
            loss = loss + self.beta * F.mse_loss(wanted[k], f_hat.detach()) + F.mse_loss(f_hat, target)
            indices.append(index.reshape(len(f), -1))
        return QuantizerOutput(f_hat.detach() + (f - f.detach()), loss / len(self.scales), indices)
