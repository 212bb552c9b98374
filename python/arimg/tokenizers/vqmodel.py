"""LlamaGen's tokenizer (arXiv 2406.06525): a convolutional autoencoder around codes on the sphere."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn import checkpoint
from arimg.nn.autoencoder import Decoder, Encoder

_WHAT = "VQModel"


class VQModelOutput(NamedTuple):
    """Training forward: reconstruction [B, 3, H, W] (not clamped), the quantizer's loss, indices
    [B, h * w].
    """

    reconstruction: Tensor
    loss: Tensor
    indices: Tensor


class _Codes(nn.Module):
    """Codes [K, D] of which the directions count."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        with torch.no_grad():
            nn.init.normal_(self.embedding.weight)
            self.embedding.weight.copy_(self.directions())

    def directions(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Rows [..., D] -> indices [...] of the codes at the smallest angle."""
        rows = z.reshape(-1, z.shape[-1]).float()
        return ops.nearest_code(rows, self.embedding.weight.float(), "cosine").view(z.shape[:-1])


class VQModel(nn.Module):
    """Images [B, 3, H, W] in [0, 1] <-> code indices, int64 [B, h * w] in raster order.

    h and w are 2 ** (len(ch_mult) - 1) times smaller than H and W. The default arguments are the sizes of the
    released `vq_ds16_c2i.pt` (VQ-16); `from_state_dict` takes its names. codebook_dim: of the codes, which
    are normalised, as the features are. beta: weight of the commitment in the loss.
    """

    def __init__(
        self,
        vocab_size: int = 16384,
        codebook_dim: int = 8,
        z_channels: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        *,
        blocks: int = 2,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        self.vocab_size, self.codebook_dim, self.z_channels = vocab_size, codebook_dim, z_channels
        self.ch, self.ch_mult, self.blocks, self.beta = ch, tuple(ch_mult), blocks, beta
        self.encoder = Encoder(ch, ch_mult, blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, blocks, z_channels)
        self.quantize = _Codes(vocab_size, codebook_dim)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)

    @property
    def factor(self) -> int:
        """How many times smaller than the image the map of codes is."""
        return int(2 ** (len(self.ch_mult) - 1))

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        names = ("vocab_size", "codebook_dim", "z_channels", "ch", "blocks", "beta")
        return {n: getattr(self, n) for n in names} | {"ch_mult": list(self.ch_mult)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], **options: Any) -> "VQModel":
        """Build the tokenizer of a state dict with the released names, in evaluation mode and the weights'
        type; sizes are read off them. options: beta.
        """
        vocab, dim = checkpoint.tensor_of(state, "quantize.embedding.weight", 2, _WHAT).shape
        ch = len(checkpoint.tensor_of(state, "encoder.conv_in.weight", 4, _WHAT))
        z = len(checkpoint.tensor_of(state, "encoder.conv_out.weight", 4, _WHAT))
        widths = [
            len(checkpoint.tensor_of(state, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4, _WHAT))
            for i in range(checkpoint.count(state, "encoder.conv_blocks."))
        ]
        if not widths:
            raise ValueError(f"expected the state dict of a {_WHAT}, got one without 'encoder.conv_blocks.0'")
        blocks = checkpoint.count(state, "encoder.conv_blocks.0.res.")
        multiples = [w // ch for w in widths]
        return checkpoint.built(
            lambda: cls(vocab, dim, z, ch, multiples, blocks=blocks, **options),
            _renamed(state), _WHAT, state["encoder.conv_in.weight"].dtype,
        )  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> directions before quantization, [B, h, w, D]."""
        f = self.factor
        if images.dim() != 4 or images.shape[1] != 3 or any(n % f or not n for n in images.shape[2:]):
            raise ValueError(f"expected images [B, 3, H, W] of multiples of {f}, got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"expected floating-point images in [0, 1], got {images.dtype}")
        x = images.to(self.quant_conv.weight.dtype).mul(2).sub(1)
        return F.normalize(self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1), dim=-1)

    def pixels(self, codes: Tensor) -> Tensor:
        """Normalised codes [B, h, w, D] -> pixels about [0, 1], not clamped. Differentiable."""
        z = self.post_quant_conv(codes.permute(0, 3, 1, 2).to(self.post_quant_conv.weight.dtype))
        return self.decoder(z).add(1).mul(0.5)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> indices, int64 [B, h * w]."""
        return self.quantize.nearest(self.features(images)).flatten(1)

    @torch.no_grad()
    def decode(self, indices: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Indices [B, h * w] -> images [B, 3, H, W] in [0, 1]. shape: (h, w); a square unless given."""
        side = round(indices.shape[-1] ** 0.5)
        h, w = shape or (side, side)
        if indices.dim() != 2 or indices.shape[1] != h * w:
            raise ValueError(f"expected indices [B, {h} * {w}], got {list(indices.shape)}")
        codes = ops.lookup(indices.unflatten(1, (h, w)), self.quantize.directions())
        return self.pixels(codes).clamp_(0, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))"""
        f = self.factor
        return self.decode(self.encode(images), (images.shape[2] // f, images.shape[3] // f))

    def forward(self, images: Tensor) -> VQModelOutput:
        """Training forward of images [B, 3, H, W] in [0, 1]."""
        z = self.features(images)
        index = self.quantize.nearest(z)
        codes = ops.lookup(index, self.quantize.directions())
        loss = F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())
        return VQModelOutput(self.pixels(z + (codes - z).detach()), loss, index.flatten(1))


_MIDDLE = ("block_1", "attn_1", "block_2")


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names as ours: the decoder's levels are counted from the finest, q, k and v are one product.

    The usage counts of training are left out.
    """
    last = checkpoint.count(state, "decoder.conv_blocks.") - 1

    def ours(name: str) -> str:
        name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", name)
        name = re.sub(r"\.mid\.([012])\.", lambda m: f".mid.{_MIDDLE[int(m[1])]}.", name)
        return re.sub(r"\.res\.", ".block.", name)

    renamed = {}
    for name, tensor in state.items():
        part = re.fullmatch(r"(.*\.(?:attn|mid)\.\d+\.)([qkv])(\.weight|\.bias)", name)
        if part is None:
            renamed[ours(name)] = tensor
        elif part[2] == "q":
            parts = [checkpoint.tensor_of(state, part[1] + n + part[3], tensor.dim(), _WHAT) for n in "qkv"]
            renamed[ours(part[1]) + "qkv" + part[3]] = torch.cat(parts)
    renamed.pop("quantize.codebook_used", None)
    return renamed
