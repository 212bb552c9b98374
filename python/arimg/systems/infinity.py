"""Infinity: bitwise next-scale prediction from a text (arXiv 2412.04431), the base of NSARM.

A token is d bits, and the head has 2 d outputs instead of 2^d: each bit is drawn for itself. In training,
bits of the input are flipped at random, a share of U(0, 0.3) of each scale, and the later scales learn the
bits of what is then left over: the network corrects its own mistakes. As published, 2B parameters make 1024 x
1024 pixels (10,521 tokens in 13 scales) in 0.8 s on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.data.images import Images
from arimg.generators.infinity_parts import EPS, NAMES, InfinityBlock, Pool, Told, without_chunks
from arimg.generators.loop import Sampler, Session, Turn
from arimg.generators.scale_text import Attend, ScaleSession, ScaleText
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.adaln import AdaLNBeforeHead, Modulation
from arimg.nn.conditioning import CrossAttention, Text
from arimg.nn.linear import Linear
from arimg.nn.rope import rope_scales
from arimg.nn.sign_quantizer import SignQuantizer
from arimg.reference.kv_cache import Rope
from arimg.systems.base import Hidden, System, SystemModel
from arimg.systems.tokenizer import quantizer_tokenizer, scale_tokenizer
from arimg.tokenizers import VQVAE


class Infinity(ScaleText, SystemModel):
    """Examples are features [B, d, H, W], whose bits are taken anew at every step, some of them flipped.

    flips: the largest share of bits that are flipped (0 switches self-correction off). pool_heads: of the
    attention that makes one vector of the text, which is the first token and modulates the blocks.
    """

    title = "infinity"
    plain = "without a cache", {"cached": False}
    tokenizer = Hidden()
    sampler = Sampler(Guidance(3.0), temperature=0.5, top_p=0.97)

    def __init__(
        self, tokenizer: VQVAE, num_classes: int, *, flips: float = 0.3, pool_heads: int | None = None,
        **size: Any,
    ) -> None:  # fmt: skip
        if not isinstance(tokenizer.quantize, SignQuantizer):
            kind = type(tokenizer.quantize).__name__
            raise ValueError(f"expected a tokenizer with a SignQuantizer, got one with a {kind}")
        bits = tokenizer.quantize.channels
        super().__init__(Layout.scales(tokenizer.scales), bits, 2 * bits, num_classes, **size)
        self.tokenizer, self.bits, self.flips = tokenizer, bits, flips
        text_width, width = self.text.text_width, self.width
        self.text_norm = nn.RMSNorm(text_width, eps=EPS)
        self.pool = Pool(text_width, width, pool_heads or self.heads)
        self.text.project = nn.Sequential(  # type: ignore[assignment]
            Linear(text_width, width), nn.GELU("tanh"), Linear(width, width)
        )
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.head_nm = AdaLNBeforeHead(width)

    raw_text = nothing_as_long = True

    def _block(self) -> InfinityBlock:
        return InfinityBlock(self.width, self.heads)

    def _norm(self) -> nn.Module:
        return nn.Identity()  # that before the head is modulated

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, tokenizer: VQVAE, **options: Any) -> Infinity:
        """The model of released weights, in evaluation mode; sizes are read off them.

        A condition is then a `Text` of the states of T5. The weights know more scales than are used: the
        scales are the tokenizer's.
        """
        theirs = without_chunks(state)
        nothing = checkpoint.tensor_of(theirs, "cfg_uncond", 2, "Infinity")
        ours = checkpoint.translated(theirs, NAMES, "Infinity", ("cfg_uncond",), (".zero_k_bias",))
        levels = len(tokenizer.scales)
        ours["lvl_embed.weight"] = ours["lvl_embed.weight"][:levels]
        ours["text.table"] = torch.stack((torch.zeros_like(nothing), nothing))
        for name in [n for n in ours if n.endswith("scale_mul_1H11")]:
            ours[name] = ours[name].reshape(1, -1, 1, 1)
        sizes = {
            "depth": checkpoint.count(ours, "blocks."),
            "width": len(ours["word_embed.weight"]),
            "heads": ours["blocks.0.attn.scale_mul_1H11"].shape[1],
            "pool_heads": ours["pool.mat_q"].shape[1],
            "text_width": nothing.shape[1],
            "tokens": len(nothing),
        }
        return checkpoint.built(lambda: cls(tokenizer, 1, **sizes | options), ours, "Infinity")

    def told(self, text: Text) -> Told:
        normed = Text(self.text_norm(text.states), text.lengths)
        summary = self.pool(normed)
        seen = Text(self.text.project(normed.states), text.lengths)
        six = self.shared_ada_lin(summary).unflatten(-1, (1, 6, -1))
        blocks = cast("list[InfinityBlock]", self.layers)
        keys = [cast(CrossAttention, block.cross).keys(seen) for block in blocks]
        modulations = [Modulation(*(block.ada_gss + six).unbind(2)) for block in blocks]
        return Told(summary, keys, modulations, self.head_nm.modulation(summary))

    def first(self, text: Text, told: Told) -> Tensor:
        return self.pos_start + told.summary[:, None]

    def features(self, x: Tensor, text: Text, told: Told, attend: Attend) -> Tensor:
        for i, block in enumerate(cast("list[InfinityBlock]", self.layers)):
            m = Modulation(*(t.to(x.dtype) for t in told.blocks[i]))

            def look(cross: CrossAttention, h: Tensor, i: int = i) -> Tensor:
                return cross(h, *told.keys[i], text.lengths)  # type: ignore[no-any-return]

            x = block.modulated(x, m, lambda qkv, i=i: attend(i, qkv), look)  # type: ignore[misc]
        scale, shift = (t.to(x.dtype) for t in told.head)
        return ops.norm_modulate(x, scale, shift, eps=EPS)

    @property
    def quantizer(self) -> SignQuantizer:
        assert isinstance(self.tokenizer.quantize, SignQuantizer)
        return self.tokenizer.quantize

    def rope(self) -> Rope:
        head_dim = self.width // self.heads
        return rope_scales(self.layout.shapes, head_dim, device=self.lvl_embed.weight.device)

    def encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tokenizer.features(pixels).float()

    def forward(self, condition: Any, maps: Tensor) -> Tensor:
        """Teacher forcing: labels or `Text`, maps [B, L - first, d] -> logits [B, L, d, 2]."""
        return self.pairs(self.teacher_forced(condition, maps))

    def pairs(self, h: Tensor) -> Tensor:
        """Features [B, n, C] -> two logits per bit, [B, n, d, 2]."""
        logits: Tensor = self.head(h).float().unflatten(-1, (self.bits, 2))
        return logits

    def loss(self, examples: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the bits; a token weighs as the inverse of its scale's side (NSARM's weights)."""
        flips = [self._flips(len(examples), n) for n in self.layout.sizes] if self.training else None
        bits, maps, _ = self.quantizer.bits(examples, flips)
        logits, target = self(labels, torch.cat(maps, 1)), torch.cat(bits, 1).long()
        each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
        sides = torch.tensor([max(shape) for shape in self.layout.shapes], device=each.device)
        weight = 1 / sides[self.layout.level(each.device)]
        return (each.mean((0, 2)) * weight).sum() / weight.sum()

    def _flips(self, batch: int, tokens: int) -> Tensor:
        share = torch.rand(batch, 1, 1) * self.flips
        return (torch.rand(batch, tokens, self.bits) < share).to(self.lvl_embed.weight.device)

    def begin(self, condition: Any, guided: bool, **options: Any) -> InfinitySession:
        """options: cached."""
        return InfinitySession(self, condition, guided, **options)

    def decode(self, session: Session, tokens: list[Tensor]) -> Tensor:
        assert isinstance(session, InfinitySession)
        return self.tokenizer.decode_features(session.f_hat)


class InfinitySession(ScaleSession):
    """Tokens are bool [B, n, d]; f_hat [B, d, H, W] is the sum of the scales so far."""

    bits = True

    def __init__(self, model: Infinity, condition: Any, guided: bool, **options: Any) -> None:
        super().__init__(model, condition, guided, **options)
        self.infinity = model
        self.f_hat = torch.zeros(self.rows, model.bits, *self.layout.shapes[-1], device=self.device)

    def maps(self, turn: Turn) -> Tensor:
        return self.infinity.quantizer.next_map(self.f_hat, turn.step)

    def logits(self, turn: Turn) -> Tensor:
        return self.infinity.pairs(self.features(turn))

    def feed(self, turn: Turn) -> None:
        self.f_hat = self.f_hat.clone()
        ops.accumulate_(
            self.f_hat, self.infinity.quantizer.code_map(turn.drawn, turn.step).contiguous(), up="bilinear"
        )


def tokenizer(images: Images, folder: Path) -> VQVAE:
    source = scale_tokenizer()
    return quantizer_tokenizer(images, folder, SignQuantizer(source.z_channels, source.scales))


def make(tokenizer: Any, classes: int) -> Infinity:
    return Infinity(tokenizer, classes, depth=6, width=192, heads=3)


SYSTEM = System(
    "infinity",
    "Infinity (the base of NSARM)",
    "next-scale",
    "arXiv 2412.04431",
    "tokens of d bits, each bit drawn from two logits; flipped bits in training teach it to correct itself",
    tokenizer,
    make,
    "The caption is the class, as four learned states by cross-attention (states of a text encoder are taken "
    "as they come); 16 bits at 64 px, trained without the entropy loss; NSARM's network from "
    "low-resolution pictures to the codes of the first scales is left out (`given` takes its bits). "
    "The larger model's patches of 2 x 2 x 14 bits are left out.",
    released=True,
)
