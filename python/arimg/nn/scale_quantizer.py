"""The multi-scale residual quantizer of VAR (arXiv 2404.02905, section 3.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.reference.pyramid import residual_map

Scales = tuple[tuple[int, int], ...]


def nearest_tick(k: int, scales: int, convolutions: int) -> int:
    """Which of the phi convolutions scale k uses: the tick nearest to k / (scales - 1), the first of equals.

    Ticks are evenly spaced in (0, 1), from 1 / (3n) for n = 4 and from 1 / (2n) otherwise.
    """
    n = convolutions
    edge = 1 / 3 / n if n == 4 else 1 / 2 / n
    return int(np.abs(np.linspace(edge, 1 - edge, n) - k / max(scales - 1, 1)).argmin())


class QuantizerOutput(NamedTuple):
    """f_hat [B, C, H, W] with the gradient of the features, the loss, and int64 [B, h * w] per scale."""

    f_hat: Tensor
    loss: Tensor
    indices: list[Tensor]


class ScaleQuantizer(nn.Module):
    """One codebook for all scales, and phi convolutions (3x3, mixed half and half) after the upsampling.

    shared_phi: 0 = one convolution per scale, 1 = one for all, n = n, chosen by `nearest_tick`.
    cosine: nearest by angle, not by distance. Usage counts per scale and code are kept for training in
    `ema_vocab_hit_SV`.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        scales: Scales,
        *,
        shared_phi: int = 4,
        ratio: float = 0.5,
        beta: float = 0.25,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.channels, self.scales = vocab_size, channels, scales
        self.shared_phi, self.ratio, self.beta, self.cosine = shared_phi, ratio, beta, cosine
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(shared_phi or len(scales))]
        self.quant_resi: nn.Module = nn.ModuleList(convs) if shared_phi == 0 else nn.Module()
        if shared_phi == 1:
            self.quant_resi.qresi = convs[0]
        elif shared_phi > 1:
            self.quant_resi.qresi_ls = nn.ModuleList(convs)
        self.phi = [nearest_tick(k, len(scales), len(convs)) for k in range(len(scales))]
        self.embedding = nn.Embedding(vocab_size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        self.ema_vocab_hit_SV: Tensor
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), vocab_size))

    def _convolutions(self) -> list[nn.Conv2d]:
        return [m for m in self.quant_resi.modules() if isinstance(m, nn.Conv2d)]

    def phi_weights(self, scale: int) -> tuple[Tensor, Tensor]:
        """Weight [C, C, 3, 3] and bias [C] of the convolution that this scale uses."""
        conv = self._convolutions()[self.phi[scale]]
        assert conv.bias is not None
        return conv.weight, conv.bias

    def code_map(self, indices: Tensor, scale: int) -> Tensor:
        """Codes as a map: int64 [B, h * w] -> [B, C, h, w]."""
        codes = ops.lookup(indices, self.embedding.weight).transpose(1, 2)
        return codes.reshape(len(indices), self.channels, *self.scales[scale])

    def accumulate_(self, f_hat: Tensor, codes: Tensor, scale: int) -> None:
        """Add the codes [B, C, h, w] of one scale to f_hat [B, C, H, W], in place."""
        weight, bias = self.phi_weights(scale)
        ops.accumulate_(f_hat, codes, weight, bias, self.ratio)

    def next_map(self, f_hat: Tensor, scale: int) -> Tensor:
        """What a generator sees before it predicts `scale`: f_hat averaged down, [B, h * w, C]."""
        return ops.area_down(f_hat, self.scales[scale]).flatten(2).transpose(1, 2)

    def empty(self, batch: int) -> Tensor:
        """f_hat before the first scale: zeros [B, C, H, W], float32."""
        device = self.embedding.weight.device
        return torch.zeros(batch, self.channels, *self.scales[-1], device=device)

    @torch.no_grad()
    def features(self, indices: Sequence[Tensor]) -> Tensor:
        """f_hat [B, C, H, W] of the given scales, the first ones or all."""
        f_hat = self.empty(len(indices[0]))
        for k, index in enumerate(indices):
            self.accumulate_(f_hat, self.code_map(index, k), k)
        return f_hat

    @torch.no_grad()
    def generator_input(self, indices: Sequence[Tensor]) -> Tensor:
        """Teacher-forcing input: indices of all scales -> [B, L - first, C], the maps before scales 1, 2,
        ...
        """
        f_hat, maps = self.empty(len(indices[0])), []
        for k, index in enumerate(indices[: len(self.scales) - 1]):
            self.accumulate_(f_hat, self.code_map(index, k), k)
            maps.append(self.next_map(f_hat, k + 1))
        return torch.cat(maps, dim=1) if maps else f_hat.new_zeros(len(f_hat), 0, self.channels)

    @torch.no_grad()
    def encode(self, f: Tensor) -> list[Tensor]:
        """Features [B, C, H, W] -> indices int64 [B, h * w] per scale."""
        if self.cosine:
            return self(f).indices
        convs = self._convolutions()
        weights = torch.stack([c.weight for c in convs])
        biases = torch.stack([c.bias for c in convs if c.bias is not None])
        return ops.encode(f, self.embedding.weight, weights, biases, self.scales, self.phi, self.ratio)[0]

    def forward(self, f: Tensor) -> QuantizerOutput:
        """Quantize features [B, C, H, W] for training, in float32.

        The loss is the mean over scales of beta |sg(f_hat) - f|^2 + |f_hat - sg(f)|^2 with the f_hat of that
        scale; the returned f_hat is the last one, and its gradient passes to f unchanged.
        """
        f = f.float()
        target = f.detach()
        f_hat, loss, indices = torch.zeros_like(f), f.new_zeros(()), []
        size = (f.shape[-2], f.shape[-1])
        for k, scale in enumerate(self.scales):
            residual = target - f_hat.detach()
            small = residual if k == len(self.scales) - 1 else ops.area_down(residual, scale)
            rows = small.permute(0, 2, 3, 1).reshape(-1, self.channels)
            metric = "cosine" if self.cosine else "l2"
            index = ops.nearest_code(rows, self.embedding.weight, metric).reshape(len(f), -1)
            f_hat = f_hat + residual_map(self.code_map(index, k), size, *self.phi_weights(k), self.ratio)
            loss = loss + self.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, target)
            indices.append(index)
        return QuantizerOutput(f_hat.detach() + (f - target), loss / len(self.scales), indices)
