"""The parts of STAR's networks (arXiv 2406.10797), with the names of the released weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.generators.scale_text import ScaleBlock, masked
from arimg.layout import Visibility
from arimg.nn import checkpoint
from arimg.nn.adaln import MAX_LOG_SCALE
from arimg.nn.conditioning import Text, keys_without_bias
from arimg.nn.linear import Linear, linear
from arimg.reference.kv_cache import Rope

NAMES: dict[str, checkpoint.Theirs] = {  # ours -> the released ones
    "pos_start": "pos_start",
    "lvl_embed.weight": "lvl_embed.weight",
    "refiner.pos_start": "pos_start_last",
    "refiner.lvl_embed.weight": "lvl_embed_2.weight",
    **{
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in (
            ("word_embed", "word_embed"),
            ("text.project", "encoder_proj"),
            ("head", "head_logits"),
            ("refiner.summary", "encoder_proj2"),
            ("refiner.fixed", "word_embed_head"),
            ("refiner.join", "head_proj"),
            ("refiner.head", "head_logits2"),
        )
        for part in ("weight", "bias")
    },
    **{
        f"{ours}.{{}}.{name}": f"{theirs}.{{}}.{name}"
        for ours, theirs in (("blocks", "blocks"), ("refiner.blocks", "feat_extract_blocks"))
        for name in (
            "attn.scale_mul_1H11", "attn.mat_qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.weight",
            "attn.proj.bias", "ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias",
        )
    },
    **{
        f"blocks.{{}}.cross.{name}": f"blocks.{{}}.cross_attn.{name}"
        for name in (
            "scale_mul_1H11", "mat_q.weight", "mat_kv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias",
        )
    },
}  # fmt: skip


class NormedCross(nn.Module):
    """Attention over the states of a text, whose queries and keys have length 1, with a learned scale per
    head. Keys have no bias.
    """

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_q, self.mat_kv = Linear(width, width, bias=False), Linear(text_width, 2 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def keys(self, text: Text) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D]: once for a generation."""
        k, v = keys_without_bias(text.states, self.mat_kv.weight, self.v_bias, self.heads)
        return F.normalize(k, dim=-1), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """x [B, L, C], keys and values as `keys` gives them, lengths int32 [B]."""
        q = linear(x, self.mat_q.weight, self.q_bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        end = lengths[:, None].expand(-1, x.shape[1]).contiguous()
        out = ops.row_interval_attention(q, k, v, torch.zeros_like(end), end, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class StarBlock(ScaleBlock):
    """Norms have no weights. text_width: of the states for cross-attention; None: there is none."""

    def __init__(self, width: int, heads: int, text_width: int | None = None) -> None:
        super().__init__(width, heads, 4 * width, cross=False)
        self.norm1, self.norm3 = bare_norm(width), bare_norm(width)
        if text_width is not None:
            self.norm2 = bare_norm(width)
            self.cross = NormedCross(width, heads, text_width)  # type: ignore[assignment]


def bare_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Refiner(nn.Module):
    """Logits of a scale's tokens given the backbone's features and the tokens that are fixed.

    In front of them stands the summary of the text; all see each other.
    """

    def __init__(
        self, channels: int, outputs: int, width: int, heads: int, depth: int, scales: int, text_width: int
    ) -> None:
        super().__init__()
        self.summary, self.pos_start = Linear(text_width, width), nn.Parameter(torch.zeros(1, 1, width))
        self.fixed, self.lvl_embed = Linear(channels, width), nn.Embedding(scales, width)
        self.join = Linear(2 * width, width)
        self.blocks = nn.ModuleList(StarBlock(width, heads) for _ in range(depth))
        self.norm, self.head = bare_norm(width), Linear(width, outputs)
        for weight in (self.pos_start, self.lvl_embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(
        self, h: Tensor, codes: Tensor, final: Tensor, summary: Tensor, scale: int, rope: Rope, start: int
    ) -> Tensor:
        """h [B, n, C] of a scale that begins at token `start`, codes [B, n, channels] of the tokens, of which
        final, bool [B, n], are fixed; summary [B, text width].
        """
        told = (
            self.fixed(torch.where(final[..., None], codes, 0.0).to(h.dtype)) + self.lvl_embed.weight[scale]
        )
        first = self.summary(summary)[:, None] + self.pos_start
        x = self.join(torch.cat((torch.cat((first, told), 1), torch.cat((first, h), 1)), -1))
        length = x.shape[1]
        end = torch.full((length,), length, dtype=torch.int32, device=x.device)
        seen = Visibility(torch.zeros_like(end), end, length)
        at = torch.cat((end.new_zeros(1), start + torch.arange(length - 1, device=x.device)))[None].long()
        for block in self.blocks:
            assert isinstance(block, StarBlock)

            def attend(qkv: Tensor, block: StarBlock = block) -> Tensor:
                return masked(block, qkv, seen, rope, at)

            x = block(x, attend, _no_text)
        out: Tensor = self.head(self.norm(x[:, 1:])).float()
        return out


def _no_text(*_: Any) -> Tensor:
    raise AssertionError("a refiner has no cross-attention")
