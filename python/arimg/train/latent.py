"""Training of the 1-D tokenizer (DetailFlow, arXiv 2505.21473)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.data.images import Images
from arimg.tokenizers import LatentTokenizer
from arimg.train.loop import bfloat16
from arimg.train.tokenizer import Reconstruction, TokenizerSettings, TokenizerTask


class LatentTask(TokenizerTask):
    """Losses as of `TokenizerTask`, on pictures of random prefixes and behind noisy groups.

    pixels_from: the steps before compare features of the source instead of pixels, which is much cheaper.
    prefix: how often only the first steps of the layout are decoded; noise: how often a step's tokens are
    noise, so that those behind learn to correct it. The encoder of the source stays as it is.
    """

    def __init__(
        self, tokenizer: LatentTokenizer, images: Images, settings: TokenizerSettings, *,
        pixels_from: int = 0, prefix: float = 0.2, noise: float = 0.5,
    ) -> None:  # fmt: skip
        if settings.decoder_only:
            raise ValueError("expected settings without decoder_only, which is for a VQVAE")
        self.pixels_from, self.prefix, self.noise = pixels_from, prefix, noise
        super().__init__(tokenizer, images, settings)

    @property
    def latent(self) -> LatentTokenizer:
        model = self.modules["model"]
        assert isinstance(model, LatentTokenizer)
        return model

    def _choose(self) -> None:
        source = self.latent.source
        for part in (source.encoder, source.quant_conv, source.quantize):
            part.requires_grad_(False)

    def step(self, indices: Tensor, step: int) -> dict[str, float]:
        if step >= self.pixels_from:
            return super().step(indices, step)
        end, group = self._draw()
        with bfloat16(self.settings.bf16):
            features = self.latent.source.features(self._batch(indices, step))
            codes, vq, tokens = self.latent.coded(features, group)
            maps = self.latent.maps(codes[:, :end]).float()
        target = F.adaptive_avg_pool2d(features.float(), maps.shape[-1])
        error = (maps - target).square().mean() / features.float().var()
        loss = error + self.settings.vq * vq
        self._descend("model", loss)
        self._usage.add(tokens)
        return {"loss": float(loss.detach()), "features": float(error.detach()), "vq": float(vq.detach())}

    def _draw(self) -> tuple[int, int | None]:
        """How many tokens are decoded, and which step before the last of them is noise, if any."""
        layout, (cut, noisy) = self.latent.layout, torch.rand(2)
        last = int(torch.randint(len(layout), ())) if cut < self.prefix else len(layout) - 1
        before, end = layout.segments[last]
        if not before or noisy >= self.noise:
            return end, None
        return end, int(layout.level()[torch.randint(before, ())])

    def _reconstruct(self, images: Tensor) -> Reconstruction:
        end, group = self._draw()
        with bfloat16(self.settings.bf16):
            out = self.latent(images, end, group)
        target = self.latent.target(images, end)
        return Reconstruction(out.reconstruction.float(), target, out.loss, out.indices)

    def _move(self, dead: Tensor, images: Tensor) -> Tensor:
        kept = torch.ones(self.latent.vocab_size, dtype=torch.bool)
        kept[dead] = False
        self.latent.restart(images, kept.nonzero().flatten())
        return self.latent.codes
