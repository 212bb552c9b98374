"""ELM: bits of a binary autoencoder, packed to K indices that K heads draw at once (arXiv 2410.16257).

The tokenizer gives each position `bits` bits, and features that are the sum of a vector for each bit that is
set. The bits are cut into K chunks, each an index of its own small vocabulary: K embeddings are joined by a
linear layer, K heads stand at one position. The released sampler runs the whole sequence again for every
token; here keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.data.images import Images
from arimg.generators import LlamaGen
from arimg.generators.llamagen import Attend, Decoder, drop
from arimg.generators.loop import Sampler
from arimg.guidance import Guidance, linear
from arimg.nn import checkpoint
from arimg.nn.scale_quantizer import QuantizerOutput
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.llamagen import SIZE, GridModel
from arimg.systems.tokenizer import quantizer_tokenizer, scale_tokenizer
from arimg.tokenizers import VQVAE

HEADS = 2


class BinaryQuantizer(nn.Module):
    """Features f [B, bits, h, w] -> bits, drawn with probability sigmoid(f) in training, then f > 0."""

    def __init__(self, bits: int, side: int) -> None:
        super().__init__()
        self.channels, self.vocab_size, self.scales = bits, 2**bits, ((side, side),)
        self.embed = nn.Parameter(torch.randn(bits, bits) * bits**-0.5)

    def encode(self, f: Tensor) -> list[Tensor]:
        return [pack(f.movedim(1, -1).flatten(1, 2) > 0)]

    def features(self, indices: Any) -> Tensor:
        side, bits = self.scales[0][0], unpack(indices[0], self.channels)
        maps: Tensor = (bits.to(self.embed.dtype) @ self.embed).unflatten(1, (side, side)).movedim(-1, 1)
        return maps.contiguous()

    def forward(self, f: Tensor) -> QuantizerOutput:
        p = f.movedim(1, -1).sigmoid()
        bits = torch.bernoulli(p) if self.training else (p > 0.5).to(p.dtype)
        passed = bits + (p - p.detach())  # the gradient of p
        f_hat = (passed @ self.embed).movedim(-1, 1)
        return QuantizerOutput(f_hat, f.new_zeros(()), [pack(bits.flatten(1, 2) > 0)])


def pack(bits: Tensor) -> Tensor:
    """bool [..., d] -> int64 [...], the first bit the most significant."""
    packed: Tensor = ops.pack_bits(bits.reshape(-1, bits.shape[-1])).reshape(bits.shape[:-1])
    return packed


def unpack(index: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: bool [..., bits]."""
    return (index[..., None] >> torch.arange(bits - 1, -1, -1, device=index.device)) & 1 == 1


class ElmModel(LlamaGen, SystemModel):
    """Tokens are int64 [B, n, K], the first chunk the most significant. Parameter names are the released
    ones; chunks: K.
    """

    title = "ELM"
    plain = "without a cache, as released", {"cached": False}
    sampler = Sampler(Guidance(4.0, linear))
    tokenizer = Hidden()

    def __init__(self, tokenizer: VQVAE, num_classes: int, chunks: int = HEADS, **size: Any) -> None:
        bits = tokenizer.vocab_size.bit_length() - 1
        if not 1 <= chunks <= bits or bits % chunks:
            raise ValueError(f"expected a number of chunks that divides the {bits} bits, got {chunks}")
        super().__init__(2 ** (bits // chunks), num_classes, grid=tokenizer.scales[-1][0], **size)
        self.tokenizer, self.bits, self.chunks = tokenizer, bits, chunks
        del self.tok_embeddings, self.output
        vocab, width = self.vocab_size, self.width
        self.tok_embedder = nn.ModuleList(nn.Embedding(vocab, width) for _ in range(chunks))
        self.proj = nn.Linear(chunks * width, width, bias=False)
        heads = [nn.Linear(width, vocab, bias=False) for _ in range(chunks)]
        self.output = nn.ModuleList(heads)  # type: ignore[assignment]
        for module in (*self.tok_embedder, self.proj):
            nn.init.normal_(module.weight, std=0.02)
        for head in heads:
            nn.init.zeros_(head.weight)

    @staticmethod
    def _sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        """The tokenizer, an option of `from_state_dict`, says how many bits there are."""
        table = checkpoint.tensor_of(state, "tok_embedder.0.weight", 2, "ELM")
        sizes = GridModel._sizes({**state, "tok_embeddings.weight": table}, heads)
        return {**sizes, "chunks": checkpoint.count(state, "tok_embedder.")}

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n, K] -> [B, n, C]."""
        parts = [table(index) for table, index in zip(self.tok_embedder, tokens.unbind(-1))]
        joined: Tensor = self.proj(torch.cat(parts, -1))
        return joined

    def decoder(self) -> Decoder:
        return ManyHeads(self)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Labels [B], the first n tokens [B, n, K] -> logits of tokens 0 .. n, [B, n + 1, K, V]."""
        labels = self.dropped(self.labels(labels))
        if indices.shape[2:] != (self.chunks,) or indices.shape[1] >= self.length:
            wanted = f"[{len(labels)}, n < {self.length}, {self.chunks}]"
            raise ValueError(f"expected indices {wanted}, got {list(indices.shape)}")
        return self.teach(torch.cat((self.prefix(labels), self.embed(indices)), 1))

    def encode(self, pixels: Tensor) -> Tensor:
        bits = unpack(self.tokenizer.encode(pixels)[0], self.bits)
        return pack(bits.unflatten(-1, (self.chunks, -1)))

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Of a token: the sum over its heads."""
        logits = self(labels, examples[:, :-1])
        return self.chunks * F.cross_entropy(logits.flatten(0, 2), examples.flatten())

    def decode(self, session: Any, tokens: list[Tensor]) -> Tensor:
        bits = unpack(torch.cat(tokens, 1), self.bits // self.chunks)
        pictures: Tensor = self.tokenizer.decode([pack(bits.flatten(2))])
        return pictures


class ManyHeads(Decoder):
    """All heads are one product."""

    def __init__(self, model: ElmModel) -> None:
        super().__init__(model)
        self.chunks = model.chunks

    def run(self, x: Tensor, attend: Attend, dropout: float = 0.0) -> Tensor:
        h = self.hidden(drop(x.float(), dropout), x.dtype, attend, dropout)
        return self.head(h).unflatten(-1, (self.chunks, -1))


def tokenizer(images: Images, folder: Path) -> VQVAE:
    source = scale_tokenizer()
    return quantizer_tokenizer(images, folder, BinaryQuantizer(source.z_channels, source.scales[-1][0]))


def make(tokenizer: Any, classes: int) -> ElmModel:
    return ElmModel(tokenizer, classes, **SIZE)


SYSTEM = System(
    "elm",
    "ELM",
    "raster",
    "arXiv 2410.16257",
    "bits of a binary autoencoder in K chunks, drawn by K heads at one position",
    tokenizer,
    make,
    "16 bits in 2 chunks; the autoregressive variant alone; the released sampler has no cache, this one has",
)
