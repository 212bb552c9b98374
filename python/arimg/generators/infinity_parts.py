"""The parts of Infinity's network (arXiv 2412.04431), with the names of the released weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.generators.scale_text import ScaleBlock
from arimg.nn import checkpoint
from arimg.nn.adaln import HeadModulation, Modulation
from arimg.nn.conditioning import Text, keys_without_bias
from arimg.nn.linear import Linear

EPS = 1e-6  # of all norms
_CHUNKED = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.")
NAMES: dict[str, checkpoint.Theirs] = {  # ours -> the released ones, without chunks of blocks
    **{
        name: name
        for name in (
            "pos_start", "lvl_embed.weight", "word_embed.weight", "word_embed.bias", "text_norm.weight",
            "shared_ada_lin.1.weight", "shared_ada_lin.1.bias", "head_nm.ada_lin.1.weight",
            "head_nm.ada_lin.1.bias", "head.weight", "head.bias",
        )
    },
    **{
        f"pool.{name}": f"text_proj_for_sos.ca.{name}"
        for name in ("mat_q", "mat_kv.weight", "v_bias", "proj.weight", "proj.bias")
    },
    **{
        f"text.project.{i}.{part}": f"text_proj_for_ca.{i}.{part}"
        for i in (0, 2)
        for part in ("weight", "bias")
    },
    **{
        f"blocks.{{}}.{ours}": f"blocks.{{}}.{theirs}"
        for ours, theirs in (
            ("ada_gss", "ada_gss"),
            *((f"norm2.{part}", f"ca_norm.{part}") for part in ("weight", "bias")),
            *((f"ffn.{n}.{part}",) * 2 for n in ("fc1", "fc2") for part in ("weight", "bias")),
            *(
                (f"attn.{n}", f"sa.{n}")
                for n in (
                    "scale_mul_1H11", "mat_qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias",
                )
            ),
            *((f"cross.to_q.{part}", f"ca.mat_q.{part}") for part in ("weight", "bias")),
            *((f"cross.proj.{part}", f"ca.proj.{part}") for part in ("weight", "bias")),
            ("cross.to_kv.weight", "ca.mat_kv.weight"),
        )
    },
    "blocks.{}.cross.to_kv.bias": ("blocks.{}.ca.zero_k_bias", "blocks.{}.ca.v_bias"),
}  # fmt: skip


def without_chunks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that are saved in chunks of equal size, numbered through."""
    size = checkpoint.count(state, "block_chunks.0.module.")

    def plain(name: str) -> str:
        return _CHUNKED.sub(lambda m: f"blocks.{int(m[1]) * size + int(m[2])}.", name)

    return {plain(name): t for name, t in state.items()}


class Told(NamedTuple):
    """What a text tells the blocks. summary [B, C]; keys and values, and modulations of each block."""

    summary: Tensor
    keys: list[tuple[Tensor, Tensor]]
    blocks: list[Modulation]
    head: HeadModulation


class Pool(nn.Module):
    """One vector of a text: what a learned query sees in its states."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(torch.randn(1, heads, width // heads) * (3 * width) ** -0.5)
        self.mat_kv, self.v_bias = Linear(text_width, 2 * width, bias=False), nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, text: Text) -> Tensor:
        """[B, C]"""
        rows, heads = len(text.states), self.mat_q.shape[1]
        k, v = keys_without_bias(text.states, self.mat_kv.weight, self.v_bias, heads)
        q = self.mat_q[:, :, None].expand(rows, -1, -1, -1).contiguous().to(k.dtype)
        end = text.lengths[:, None].contiguous()
        out = ops.row_interval_attention(q, k, v, torch.zeros_like(end), end)
        return self.proj(out.flatten(1))  # type: ignore[no-any-return]


class InfinityBlock(ScaleBlock):
    """Self-attention and feed-forward are gated and their norms modulated by the text's summary."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, cross=True)
        del self.norm1, self.norm3
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def modulated(
        self, h: Tensor, m: Modulation, attend: Callable[[Tensor], Tensor], text: Callable[..., Tensor]
    ) -> Tensor:
        assert self.norm2 is not None
        n = ops.norm_modulate(h, m.scale1, m.shift1, eps=EPS)
        h = ops.gated_residual(h, self.attn.proj(attend(self.attn.qkv(n))).to(h.dtype), m.gate1)
        h = h + text(self.cross, self.norm2(h))
        n = ops.norm_modulate(h, m.scale2, m.shift2, eps=EPS)
        return ops.gated_residual(h, self.ffn(n).to(h.dtype), m.gate2)
