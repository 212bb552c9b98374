"""The state space model of Mamba-2 in plain torch: the oracle of `arimg.ops.attention_ssd`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.attention_linear import causal_chunk, scan
from arimg.reference.precision import wide


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T, y_t = C_t S_t + D x_t per head, in chunks (SSD).

    x [B, L, H, P], dt [B, L, H], A and D [H], B and C [B, L, G, N] with H / G heads per group. Returns
    y [B, L, H, P] and S [B, H, N, P] in float32. Differentiable.
    """
    per_group = x.shape[2] // B.shape[2]
    q, k = (wide(t).repeat_interleave(per_group, 2).transpose(1, 2) for t in (C, B))
    v, step = wide(x).transpose(1, 2), wide(dt).transpose(1, 2)
    out, new_state = scan(causal_chunk, q, k, v * step[..., None], step * wide(A)[:, None], state, chunk)
    if D is not None:
        out = out + wide(D)[:, None, None] * v
    return out.transpose(1, 2).to(x.dtype), new_state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Each channel convolved with its last K inputs: x [B, L, C], weight [C, K], bias [C] -> y [B, L, C].

    tail [B, K - 1, C]: the inputs before x (zeros without). Also returns the tail for the next call.
    """
    width = weight.shape[1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    whole = torch.cat((tail, x), 1)
    rows, bias = wide(whole).transpose(1, 2), None if bias is None else wide(bias)
    y = F.conv1d(rows, wide(weight)[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), whole[:, x.shape[1] :]
