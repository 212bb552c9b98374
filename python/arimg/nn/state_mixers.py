"""Token mixers that carry a state of constant size: Mamba-2 (M-VAR) and ARFlow's hybrid attention.

Parameter names are those of the released checkpoints. Each forward takes what the call before returned and
goes on from there, so that generation never runs a prefix again.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn.linear import Linear


class Carried(NamedTuple):
    """What Mamba-2 carries: the state [B, H, N, P] in float32, and the last inputs [B, K - 1, C] of its
    convolution.
    """

    scan: Tensor
    tail: Tensor


class Mamba2(nn.Module):
    """The mixer of Mamba-2 (arXiv 2405.21060) with the defaults of M-VAR.

    in_proj gives z, x, B, C and dt side by side; x, B and C pass the convolution, and the scan's result is
    gated by z and then normed.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 64,
        conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
    ) -> None:
        super().__init__()
        inner = expand * width
        heads, channels = inner // head_dim, inner + 2 * groups * state
        self.heads, self.groups, self.sizes = heads, groups, (inner, groups * state, groups * state)
        self.in_proj = Linear(width, inner + channels + heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, conv, groups=channels)
        dt = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor, carried: Carried | None = None) -> tuple[Tensor, Carried]:
        """x [B, L, C] -> [B, L, C] and what the next call needs."""
        scan, tail = (None, None) if carried is None else carried
        z, mixed, dt = self.in_proj(x).split((self.sizes[0], sum(self.sizes), self.heads), -1)
        bias = self.conv1d.bias
        assert bias is not None
        weight, bias = self.conv1d.weight[:, 0].to(mixed.dtype), bias.to(mixed.dtype)  # autocast
        mixed, tail = ops.causal_conv1d(mixed, weight, bias, tail=tail)
        value, B, C = mixed.split(self.sizes, -1)
        y, scan = ops.ssd_scan(
            value.unflatten(2, (self.heads, -1)),
            F.softplus(dt.float() + self.dt_bias.float()),
            -self.A_log.float().exp(),
            B.unflatten(2, (self.groups, -1)),
            C.unflatten(2, (self.groups, -1)),
            D=self.D,
            state=scan,
        )
        return self.out_proj(self._norm(y.flatten(2) * F.silu(z))), Carried(scan, tail)

    def _norm(self, y: Tensor) -> Tensor:
        """RMS over the channels of each group."""
        if self.groups == 1:
            return self.norm(y)
        parts = y.unflatten(2, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.norm.eps).flatten(2) * self.norm.weight


class HybridLinearAttention(nn.Module):
    """ARFlow's attention (arXiv 2501.16085): softmax within an image, a gated linear state across images.

    Queries, keys and values are normed over the whole width, results over each head; all in float32.
    """

    def __init__(self, width: int, heads: int, *, gate_divisor: float = 16, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.gate_divisor, self.eps = heads, gate_divisor, eps
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            Linear(width, width, bias=False) for _ in range(4)
        )
        self.gt_proj = Linear(width, heads, bias=False)
        self.out_proj = Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, condition: Tensor, state: Tensor | None = None, *, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and condition [B, L, C], images of `chunk` tokens (default: one) -> [B, L, C] and the state."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        gate = F.logsigmoid(self.gt_proj(x + condition).float()).transpose(1, 2) / self.gate_divisor
        out, state = ops.gated_linear_attention(q, k, v, gate, state=state, chunk=chunk)
        out = F.rms_norm(out.transpose(1, 2), out.shape[-1:], eps=self.eps).flatten(2)
        gated = F.silu(self.g_proj(x).float()) * out
        return self.out_proj(gated.to(x.dtype)), state

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, H, L, D]"""
        x = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
