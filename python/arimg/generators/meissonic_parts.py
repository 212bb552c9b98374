"""The blocks of Meissonic (arXiv 2410.08261), with the names of the released weights.

A joint block has weights of its own for text and picture, which attend to each other side by side; a single
block has attention and MLP beside each other, for both in one sequence. All are modulated by one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn import checkpoint
from arimg.nn.adaln import FeedForward
from arimg.nn.linear import Linear
from arimg.reference.kv_cache import Rope, rotate

EPS = 1e-6  # of all norms
_WEIGHTS = ("weight", "bias")


def _pairs(ours: str, *theirs: str, parts: tuple[str, ...] = _WEIGHTS) -> dict[str, checkpoint.Theirs]:
    """Weights and biases; several of theirs one below the other."""
    return {
        f"{ours}.{p}": f"{theirs[0]}.{p}" if len(theirs) == 1 else tuple(f"{t}.{p}" for t in theirs)
        for p in parts
    }


def _stream(
    ours: str, suffix: str, norms: str, to: tuple[str, ...], out: str
) -> dict[str, checkpoint.Theirs]:
    """Text or picture of a joint block."""
    block, mine = "transformer_blocks.{}", f"joint.{{}}.{ours}"
    return {
        **_pairs(f"{mine}.ada", f"{block}.norm1{suffix}.linear"),
        **_pairs(f"{mine}.heads.qkv", *(f"{block}.attn.{name}" for name in to)),
        **_pairs(f"{mine}.heads.norm_q", f"{block}.attn.{norms}_q", parts=("weight",)),
        **_pairs(f"{mine}.heads.norm_k", f"{block}.attn.{norms}_k", parts=("weight",)),
        **_pairs(f"{mine}.proj", f"{block}.attn.{out}"),
        **_pairs(f"{mine}.ffn.fc1", f"{block}.ff{suffix}.net.0.proj"),
        **_pairs(f"{mine}.ffn.fc2", f"{block}.ff{suffix}.net.2"),
    }


_SINGLE = "single_transformer_blocks.{}"
NAMES: dict[str, checkpoint.Theirs] = {  # ours -> the released ones, 1 x 1 convolutions as matrices
    **_stream("picture", "", "norm", ("to_q", "to_k", "to_v"), "to_out.0"),
    **_stream("words", "_context", "norm_added", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
    **_pairs("single.{}.ada", f"{_SINGLE}.norm.linear"),
    **_pairs("single.{}.heads.qkv", *(f"{_SINGLE}.attn.to_{x}" for x in "qkv")),
    **_pairs("single.{}.heads.norm_q", f"{_SINGLE}.attn.norm_q", parts=("weight",)),
    **_pairs("single.{}.heads.norm_k", f"{_SINGLE}.attn.norm_k", parts=("weight",)),
    **_pairs("single.{}.mlp", f"{_SINGLE}.proj_mlp"),
    **_pairs("single.{}.out", f"{_SINGLE}.proj_out"),
    **_pairs("conditioner.project", "context_embedder"),
    **_pairs("time.0", "time_text_embed.timestep_embedder.linear_1"),
    **_pairs("time.2", "time_text_embed.timestep_embedder.linear_2"),
    **_pairs("summary.0", "time_text_embed.text_embedder.linear_1"),
    **_pairs("summary.2", "time_text_embed.text_embedder.linear_2"),
    **{
        f"{ours}.weight": f"{theirs}.weight"
        for ours, theirs in (
            ("numbers.0", "cond_embed.linear_1"),
            ("numbers.2", "cond_embed.linear_2"),
            ("words_norm", "encoder_proj_layer_norm"),
            ("tok_embeddings", "embed.embeddings"),
            ("embed_norm", "embed.layer_norm"),
            ("embed_out", "embed.conv"),
            ("to_hidden_norm", "project_to_hidden_norm"),
            ("to_hidden", "project_to_hidden"),
            ("from_hidden_norm", "project_from_hidden_norm"),
            ("from_hidden", "project_from_hidden"),
            ("head", "mlm_layer.conv1"),
            ("head_norm", "mlm_layer.layer_norm"),
            ("output", "mlm_layer.conv2"),
        )
    },
}
COMPRESS: dict[str, checkpoint.Theirs] = {  # besides, where 2 x 2 tokens are one input
    "down_norm.weight": "down_block.downsample.norm.weight",
    "down.weight": "down_block.downsample.conv.weight",
    "up_norm.weight": "up_block.upsample.norm.weight",
    "up.weight": "up_block.upsample.conv.weight",
}


def as_matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of 1 x 1 convolutions without their last two dimensions."""
    return {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) else v for k, v in state.items()}


def waves(numbers: Tensor, channels: int = 256) -> Tensor:
    """Cosines and sines of each number: [B, n] -> [B, n * channels]."""
    half = channels // 2
    frequency = 10000.0 ** (-torch.arange(half, device=numbers.device) / half)
    angle = numbers[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1).flatten(1)


def mlp(c_in: int, width: int, bias: bool = True) -> nn.Sequential:
    """Of a vector."""
    return nn.Sequential(Linear(c_in, width, bias=bias), nn.SiLU(), Linear(width, width, bias=bias))


class Told(NamedTuple):
    """What no pass of a picture changes: its text as inputs [B, T, C], what modulates the blocks beside the
    time [B, C], and the rotations of text and map.
    """

    words: Tensor
    vector: Tensor
    rope: Rope

    def first(self, rows: int) -> Told:
        return Told(self.words[:rows], self.vector[:rows], self.rope)


class Heads(nn.Module):
    """Queries, keys and values of each head; queries and keys are normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, L, D] each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    """Everything sees everything: [B, H, L, D] -> [B, L, C]."""
    length = q.shape[2]
    at = torch.arange(length, device=q.device)[None]
    end = torch.full((length,), length, dtype=torch.int32, device=q.device)
    q, k = (rotate(t, rope, at).to(v.dtype) for t in (q, k))
    out: Tensor = ops.row_interval_attention(q, k, v, torch.zeros_like(end), end)
    return out.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """The half of a joint block that text or picture has for itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ada, self.heads = Linear(width, 6 * width), Heads(width, heads)
        self.proj, self.ffn = Linear(width, width), FeedForward(width, 4 * width)

    def modulation(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward, [B, 1, C] each."""
        return self.ada(F.silu(vector)).unflatten(-1, (1, 6, -1)).unbind(2)  # type: ignore[no-any-return]

    def close(self, h: Tensor, seen: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """The gated branches of attention and feed-forward."""
        h = ops.gated_residual(h, self.proj(seen), m[2])
        n = ops.norm_modulate(h, m[4], m[3], eps=EPS)
        return ops.gated_residual(h, self.ffn(n), m[5])


class JointBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.words, self.picture = Stream(width, heads), Stream(width, heads)

    def forward(self, words: Tensor, h: Tensor, vector: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        streams, inputs = (self.words, self.picture), (words, h)
        m = [stream.modulation(vector) for stream in streams]
        n = [ops.norm_modulate(x, scale, shift, eps=EPS) for x, (shift, scale, *_) in zip(inputs, m)]
        parts = [stream.heads(x) for stream, x in zip(streams, n)]
        q, k, v = (torch.cat(both, 2) for both in zip(*parts))
        seen = attend(q, k, v, rope).split((words.shape[1], h.shape[1]), 1)
        done = [s.close(x, y, mod) for s, x, y, mod in zip(streams, inputs, seen, m)]
        return done[0], done[1]


class SingleBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ada, self.heads = Linear(width, 3 * width), Heads(width, heads)
        self.mlp, self.out = Linear(width, 4 * width), Linear(5 * width, width)

    def forward(self, h: Tensor, vector: Tensor, rope: Rope) -> Tensor:
        shift, scale, gate = self.ada(F.silu(vector)).unflatten(-1, (1, 3, -1)).unbind(2)
        n = ops.norm_modulate(h, scale, shift, eps=EPS)
        q, k, v = self.heads(n)
        both = torch.cat((attend(q, k, v, rope), ops.activate(self.mlp(n), "gelu_tanh")), -1)
        return ops.gated_residual(h, self.out(both), gate)
