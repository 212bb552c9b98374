"""The quantizer of FlexVAR (arXiv 2502.20313), whose scales stand alone: each codes the whole map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn.scale_quantizer import QuantizerOutput, Scales


class MapQuantizer(nn.Module):
    """One codebook for maps of all sizes: a scale is the features averaged down to (h, w), coded.

    scales: the sizes by default; the last is that of the features. Any other size can be asked for, as no
    scale needs another. sizes: how many a training step looks at. cosine: features and codes have length 1,
    and the nearest code is that at the smallest angle, as published.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        scales: Scales,
        *,
        sizes: int = 5,
        beta: float = 0.25,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.channels, self.scales = vocab_size, channels, scales
        self.sizes, self.beta, self.cosine = sizes, beta, cosine
        self.embedding = nn.Embedding(vocab_size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)

    @property
    def side(self) -> int:
        """The longer side of the features."""
        return max(self.scales[-1])

    def shape_of(self, side: int) -> tuple[int, int]:
        """The map of the features' aspect whose longer side is `side`."""
        h, w = self.scales[-1]
        return -(-h * side // self.side), -(-w * side // self.side)

    def codes(self) -> Tensor:
        """The codebook, [K, C]."""
        return F.normalize(self.embedding.weight, dim=-1) if self.cosine else self.embedding.weight

    def code_map(self, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        """int64 [B, h * w] -> [B, C, h, w]."""
        codes = ops.lookup(indices, self.codes()).transpose(1, 2)
        return codes.reshape(len(indices), self.channels, *shape)

    def empty(self, batch: int) -> Tensor:
        """A map before the first scale: zeros [B, C, H, W], float32."""
        return torch.zeros(batch, self.channels, *self.scales[-1], device=self.embedding.weight.device)

    def _averaged(self, f: Tensor, shape: tuple[int, int]) -> Tensor:
        """The map of this size, [B, C, h, w], which the codes stand for."""
        small = f if tuple(f.shape[2:]) == shape else ops.resize(f, shape, "area")
        return F.normalize(small, dim=1) if self.cosine else small

    def _nearest(self, small: Tensor) -> Tensor:
        rows = small.permute(0, 2, 3, 1).reshape(-1, self.channels)
        return ops.nearest_code(rows, self.codes(), "dot" if self.cosine else "l2").reshape(len(small), -1)

    @torch.no_grad()
    def encode_at(self, f: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Features [B, C, H, W] -> indices int64 [B, h * w] of maps of these sizes."""
        return [self._nearest(self._averaged(f, shape)) for shape in shapes]

    def encode(self, f: Tensor) -> list[Tensor]:
        """Features [B, C, H, W] -> indices int64 [B, h * w] per scale."""
        return self.encode_at(f, self.scales)

    @torch.no_grad()
    def features(self, indices: Sequence[Tensor]) -> Tensor:
        """The last of the given scales alone, at full size: [B, C, H, W]."""
        codes = self.code_map(indices[-1], self.scales[len(indices) - 1])
        return ops.bicubic_up(codes, self.scales[-1])

    @torch.no_grad()
    def next_map(self, codes: Tensor, shape: tuple[int, int]) -> Tensor:
        """What a generator sees before it predicts a scale of this shape: the codes [B, C, h, w] of the scale
        before, upsampled, as rows [B, h * w, C].
        """
        return ops.bicubic_up(codes, shape).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def generator_input(self, indices: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Teacher-forcing input: indices of all scales -> [B, L - first, C]."""
        pairs = zip(indices, shapes, shapes[1:])
        maps = [self.next_map(self.code_map(index, shape), after) for index, shape, after in pairs]
        if not maps:
            return self.codes().new_zeros(len(indices[0]), 0, self.channels)
        return torch.cat(maps, 1)

    def forward(self, f: Tensor) -> QuantizerOutput:
        """Quantize features [B, C, H, W] in float32.

        In training at `sizes` sizes, the last the full one and the others drawn: the loss is the mean over
        them of beta |sg(q) - f|^2 + |q - sg(f)|^2, and of the returned maps every second one is at full size,
        the others come from the drawn sizes in turn, so that the decoder learns to read each alone.
        """
        f, full = f.float(), self.scales[-1]
        shapes = self._drawn() if self.training else [full]
        f_hat, loss, indices = [], f.new_zeros(()), []
        for shape in shapes:
            small = self._averaged(f, shape)
            index = self._nearest(small.detach())
            codes = self.code_map(index, shape)
            loss = loss + self.beta * F.mse_loss(small, codes.detach()) + F.mse_loss(codes, small.detach())
            through = small + (codes - small).detach()
            f_hat.append(through if shape == full else ops.bicubic_up(through, full))
            indices.append(index)
        row, last = torch.arange(len(f), device=f.device), len(shapes) - 1
        which = torch.where(row % 2 == 0, last, (row // 2) % max(last, 1))
        return QuantizerOutput(torch.stack(f_hat)[which, row], loss / len(shapes), indices)

    def _drawn(self) -> list[tuple[int, int]]:
        smaller = torch.randperm(self.side - 1)[: self.sizes - 1] + 1
        return [*(self.shape_of(int(k)) for k in smaller.sort().values), self.scales[-1]]
