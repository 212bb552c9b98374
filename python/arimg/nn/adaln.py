"""Transformer blocks with adaptive layer norm (DiT, arXiv 2212.09748), with the parameter names of VAR.

A block is two gated residual branches. The end of each branch and the norm of the next are one fused
operation, so the blocks run as a chain (`run_blocks`) and not each for itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.nn.linear import Linear, linear

MAX_LOG_SCALE = math.log(100)

# (block, qkv [B, L, 3, H, D]) -> attention output [B, L, H * D]
Attend = Callable[[int, Tensor], Tensor]
# (block, "attn" or "ffn", the branch [B, L, C]) -> the branch with what training drops of it
Drop = Callable[[int, str, Tensor], Tensor]


class Modulation(NamedTuple):
    """The six vectors of a block, each [B, 1, C], in the order in which the weights hold them."""

    gate1: Tensor
    gate2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor


class HeadModulation(NamedTuple):
    """Scale and shift of the norm before the head, each [B, 1, C]."""

    scale: Tensor
    shift: Tensor


class SelfAttention(nn.Module):
    """Projections of multi-head attention; the attention itself is the caller's (masked, or with a cache).

    l2_norm: queries and keys have length 1 and the queries a learned scale per head (initially 4, at most
    100); otherwise the softmax scale is 0.25 / sqrt(head_dim). Keys have no bias.
    """

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        self.softmax_scale = 1.0 if l2_norm else 0.25 / math.sqrt(width // heads)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def q_scale(self) -> Tensor | None:
        """Scale of the normalised queries, [H]."""
        return self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().flatten() if self.l2_norm else None

    def qkv(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> [B, L, 3, H, D]"""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1))


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.activate(self.fc1(x), "gelu_tanh"))


class AdaLNBlock(nn.Module):
    """Weights of one block. shared: its modulation is a table added to one projection that all blocks
    share.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, shared: bool, l2_norm: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.attn = SelfAttention(width, heads, l2_norm)
        self.ffn = FeedForward(width, hidden)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> Modulation:
        """condition: class embedding [B, C], or where shared its projection [B, 1, 6, C]."""
        if hasattr(self, "ada_gss"):
            six = self.ada_gss + condition
        else:
            six = self.ada_lin(condition).unflatten(-1, (1, 6, -1))
        return Modulation(*six.unbind(2))

    def drop(self, y: Tensor) -> Tensor:
        """Stochastic depth: in training, drop the branch of a row with probability `drop_path`."""
        if not self.training or self.drop_path == 0:
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
        return y * (keep / (1 - self.drop_path)).to(y.dtype)


class AdaLNBeforeHead(nn.Module):
    """Projection to the scale and shift of the last norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> HeadModulation:
        return HeadModulation(*self.ada_lin(condition).unflatten(-1, (1, 2, -1)).unbind(2))


def run_blocks(
    blocks: Sequence[AdaLNBlock],
    x: Tensor,
    modulations: Sequence[Modulation],
    last: HeadModulation,
    attend: Attend,
    *,
    drop: Drop | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """All blocks and the norm before the head: x [B, L, C] -> [B, L, C].

    `attend(i, qkv)` is the attention of block i; `drop` takes the place of its stochastic depth. Under
    autocast the residual stream keeps the type of x.
    """
    drop = drop or (lambda i, _, y: blocks[i].drop(y))
    modulations = [Modulation(*(t.to(x.dtype) for t in m)) for m in modulations]
    last = HeadModulation(*(t.to(x.dtype) for t in last))
    h = ops.norm_modulate(x, modulations[0].scale1, modulations[0].shift1, eps=eps)
    for i, (block, m) in enumerate(zip(blocks, modulations)):
        y = drop(i, "attn", block.attn.proj(attend(i, block.attn.qkv(h))))
        x, h = ops.gated_residual_norm(x, y.to(x.dtype), m.gate1, m.scale2, m.shift2, eps=eps)
        y = drop(i, "ffn", block.ffn(h))
        if i + 1 < len(blocks):
            scale, shift = modulations[i + 1].scale1, modulations[i + 1].shift1
        else:
            scale, shift = last
        x, h = ops.gated_residual_norm(x, y.to(x.dtype), m.gate2, scale, shift, eps=eps)
    return h
