"""Attention with a carried state in plain torch: the oracle of `arimg.ops.attention_linear`."""

from collections.abc import Callable

import torch
from torch import Tensor

from arimg.reference.precision import wide

# (q, k, v, gate, state) -> (out, state)
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LOWEST = -1e4  # log decays are cut here, so that differences of sums stay finite when a gate is -inf


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    state: Tensor | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    inner: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Attention over a state S: q, k [B, H, L, N], v [B, H, L, P], gate [B, H, L] (log decays).

    inner "softmax": tokens of one chunk see each other, and by S what came before the chunk:
    out_t = softmax(scale q_t K^T) V + exp(A_t) q_t S, A_t the sum of the gates from the chunk's start to t;
    then S = exp(mean gate) S + scale K^T V. L must be whole chunks (default: one).
    inner "causal": S_t = exp(gate_t) S_(t-1) + scale k_t v_t^T, out_t = q_t S_t, computed in chunks (32).
    scale defaults to 1 / sqrt(N). Returns out [B, H, L, P] and S [B, H, N, P] in float32. Differentiable.
    """
    scale = float(q.shape[3]) ** -0.5 if scale is None else scale
    chunk = (q.shape[2] if inner == "softmax" else 32) if chunk is None else chunk
    step = softmax_chunk if inner == "softmax" else causal_chunk
    out, new_state = scan(step, wide(q), wide(k) * scale, wide(v), wide(gate), state, chunk)
    return out.to(v.dtype), new_state


def scan(
    step: Step, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """step(q, k, v, gate, state) -> (out, state) over all chunks of the sequence."""
    if state is None:
        state = q.new_zeros(v.shape[0], v.shape[1], q.shape[3], v.shape[3])
    gate, state, outs = gate.clamp(min=LOWEST), state.to(q.dtype), []
    for i in range(0, q.shape[2], max(chunk, 1)):
        rows = slice(i, i + chunk)
        out, state = step(q[:, :, rows], k[:, :, rows], v[:, :, rows], gate[:, :, rows], state)
        outs.append(out)
    return torch.cat(outs, 2) if outs else torch.zeros_like(v), state


def softmax_chunk(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of the "softmax" form; k times the scale."""
    within = (q @ k.transpose(2, 3)).softmax(-1) @ v
    before = gate.cumsum(-1).exp()[..., None] * (q @ state)
    return within + before, gate.mean(-1).exp()[..., None, None] * state + k.transpose(2, 3) @ v


def causal_chunk(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of the "causal" form; k times the scale."""
    total = gate.cumsum(-1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    # masked before exp: a difference of the wrong sign may overflow
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    out = (q @ k.transpose(2, 3) * decay) @ v + total.exp()[..., None] * (q @ state)
    left = (total[..., -1:] - total).exp()[..., None]
    return out, total[..., -1:, None].exp() * state + (k * left).transpose(2, 3) @ v
