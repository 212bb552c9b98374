"""The tokenizer of VAR: a convolutional autoencoder around a multi-scale residual quantizer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.autoencoder import Decoder, Encoder
from arimg.nn.scale_quantizer import ScaleQuantizer

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_USAGE = "quantize.ema_vocab_hit_SV"


class VQVAEOutput(NamedTuple):
    """Training forward: reconstruction [B, 3, H, W] (not clamped), the quantizer's loss, indices per
    scale.
    """

    reconstruction: Tensor
    loss: Tensor
    indices: list[Tensor]


class VQVAE(nn.Module):
    """Images [B, 3, H, W] in [0, 1] <-> a pyramid of code indices, one int64 [B, h * w] per scale.

    The features are 2 ** (len(ch_mult) - 1) times smaller than the image and must have the size of the last
    scale. Parameter names are those of the released `vae_ch160v4096z32.pth`; the default arguments are its
    sizes. scales: sides of squares or (h, w) pairs from coarse to fine. shared_phi, ratio, beta, cosine: see
    `arimg.nn.scale_quantizer.ScaleQuantizer`.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 160,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        scales: Sequence[int | Sequence[int]] = SCALES_256,
        *,
        blocks: int = 2,
        shared_phi: int = 4,
        ratio: float = 0.5,
        beta: float = 0.25,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.ch, self.ch_mult, self.blocks = ch, tuple(ch_mult), blocks
        self.encoder = Encoder(ch, ch_mult, blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, blocks, z_channels)
        self.quantize = ScaleQuantizer(
            vocab_size,
            z_channels,
            Layout.scales(scales).shapes,
            shared_phi=shared_phi,
            ratio=ratio,
            beta=beta,
            cosine=cosine,
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.register_load_state_dict_pre_hook(_fit_usage_counts)

    vocab_size = property(lambda self: self.quantize.vocab_size)
    z_channels = property(lambda self: self.quantize.channels)
    scales = property(lambda self: self.quantize.scales)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that fit the last scale."""
        factor = 2 ** (len(self.ch_mult) - 1)
        h, w = self.scales[-1]
        return h * factor, w * factor

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        q = self.quantize
        return {
            "vocab_size": q.vocab_size,
            "z_channels": q.channels,
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "scales": [list(s) for s in q.scales],
            "blocks": self.blocks,
            "shared_phi": q.shared_phi,
            "ratio": q.ratio,
            "beta": q.beta,
            "cosine": q.cosine,
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        scales: Sequence[int | Sequence[int]] | None = None,
        **options: Any,
    ) -> "VQVAE":
        """Build the tokenizer of a state dict, in evaluation mode; sizes are read off the tensors.

        Tensors do not tell the sides of the scales: give `scales`, else the released ones (1, 2, ..., 16) are
        taken where the dict has ten. Further options (ratio, beta, cosine) are the constructor's.
        """
        what = "VQVAE"
        vocab, z = checkpoint.tensor_of(state, "quantize.embedding.weight", 2, what).shape
        ch = checkpoint.tensor_of(state, "encoder.conv_in.weight", 4, what).shape[0]
        levels = checkpoint.count(state, "encoder.down.")
        widths = [
            checkpoint.tensor_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4, what).shape[0]
            for i in range(levels)
        ]
        shared = checkpoint.count(state, "quantize.quant_resi.qresi_ls.")
        shared = shared or int("quantize.quant_resi.qresi.weight" in state)
        if scales is None:
            n = len(state[_USAGE]) if _USAGE in state else len(SCALES_256)
            if n != len(SCALES_256):
                raise ValueError(f"expected scales=(...) with {n} entries for this state dict, got none")
            scales = SCALES_256
        blocks = checkpoint.count(state, "encoder.down.0.block.")
        size = (vocab, z, ch, [w // ch for w in widths], scales)
        return checkpoint.built(lambda: cls(*size, blocks=blocks, shared_phi=shared, **options), state, what)

    def with_scales(self, scales: Sequence[int | Sequence[int]]) -> "VQVAE":
        """The same weights, shared, under another schedule with as many scales (for another image size)."""
        shapes = Layout.scales(scales).shapes
        if len(shapes) != len(self.scales):
            raise ValueError(f"expected {len(self.scales)} scales, got {len(shapes)}")
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.quantize = copy.copy(self.quantize)
        twin.quantize.scales = shapes
        return twin

    def features(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> features before quantization [B, z, H, W]."""
        if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.image_size:
            h, w = self.image_size
            raise ValueError(f"expected images [B, 3, {h}, {w}], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"expected floating-point images in [0, 1], got {images.dtype}")
        x = images.to(self.quant_conv.weight.dtype).mul(2).sub(1)
        return self.quant_conv(self.encoder(x))

    def pixels(self, f_hat: Tensor) -> Tensor:
        """Quantized features [B, z, H, W] -> pixels about [0, 1], not clamped. Differentiable."""
        return self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype))).add(1).mul(0.5)

    @torch.no_grad()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Quantized features [B, z, H, W] -> images in [0, 1]."""
        return self.pixels(f_hat).clamp_(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> indices, int64 [B, h * w] per scale."""
        return self.quantize.encode(self.features(images).float())

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """Indices of all scales, or of the first ones for a coarse preview -> images [B, 3, H, W] in [0,
        1].
        """
        self._check_indices(indices)
        return self.decode_features(self.quantize.features(indices))

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))"""
        return self.decode(self.encode(images))

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Training forward of images [B, 3, H, W] in [0, 1]."""
        f_hat, loss, indices = self.quantize(self.features(images))
        return VQVAEOutput(self.pixels(f_hat), loss, indices)

    def _check_indices(self, indices: Sequence[Tensor]) -> None:
        if not 1 <= len(indices) <= len(self.scales):
            raise ValueError(f"expected indices of 1..{len(self.scales)} scales, got {len(indices)}")
        for index, (h, w) in zip(indices, self.scales):
            if index.dim() != 2 or index.shape[1] != h * w:
                raise ValueError(f"expected indices [B, {h * w}] for scale {h}x{w}, got {list(index.shape)}")


def _fit_usage_counts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Usage counts belong to training: a state dict without them, or with those of another schedule, loads
    and starts them anew.
    """
    own = module.get_buffer(_USAGE)
    if prefix + _USAGE not in state or state[prefix + _USAGE].shape != own.shape:
        state[prefix + _USAGE] = torch.zeros_like(own)
