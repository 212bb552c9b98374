"""The state space model of Mamba-2 (SSD, arXiv 2405.21060) and the causal convolution before it.

Both carry what they need from call to call, so that a sequence may be cut anywhere. float32, bfloat16 or
float16; sums and the state in float32. See docs/ops/attention_linear.md.
"""

from __future__ import annotations

from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels
from arimg.ops.attention_linear import DEFAULT_CHUNK, check_head_dim, check_small, check_state, rows, whole

__all__ = ["causal_conv1d", "ssd_scan"]

MAX_WIDTH = 4


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T, y_t = C_t S_t + D x_t for each head.

    x [B, L, H, P], dt [B, L, H] (positive: after its softplus), A [H] (negative), B and C [B, L, G, N] where
    H / G heads share a group, D [H]; state [B, H, N, P] float32 from the call before (None: zeros). chunk is
    a matter of speed and rounding alone. Returns y [B, L, H, P] and the state after the last token.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check_scan(x, dt, A, B, C, D)
    check_state(state, x, (x.shape[0], x.shape[2], B.shape[3], x.shape[3]))
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least 1, got {chunk}")
    ops = kernels(x, dt, A, B, C, D, state)
    if ops is None:
        return reference.ssd_scan(x, dt, A, B, C, D=D, state=state, chunk=chunk)
    q, k, v = (rows(t).transpose(1, 2) for t in (C, B, x))
    skip = None if D is None else D.float().contiguous()
    gate, rate = dt.float().transpose(1, 2), A.float().contiguous()
    y, new_state = ops.gated_scan(q, k, v, gate, rate, skip, None, whole(state), chunk, 1.0, True)
    return y, new_state


def _check_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    expect_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"expected x [B, L, H, P], got {list(x.shape)}")
    batch, L, H, P = x.shape
    check_head_dim("x", P)
    expect_like("B", B, "x", x)
    expect_like("C", C, "x", x)
    if not (B.dim() == 4 and B.shape[0] == batch and B.shape[1] == L):
        raise ValueError(f"expected B [{batch}, {L}, G, N], got {list(B.shape)}")
    if B.shape[2] < 1 or H % B.shape[2] != 0:
        raise ValueError(f"expected a number of groups that divides the {H} heads, got {B.shape[2]}")
    if C.shape != B.shape:
        raise ValueError(f"expected C of B's shape {list(B.shape)}, got {list(C.shape)}")
    check_head_dim("B", B.shape[3])
    check_small("dt", dt, x)
    if not (dt.dim() == 3 and dt.shape[0] == batch and dt.shape[1] == L and dt.shape[2] == H):
        raise ValueError(f"expected dt [{batch}, {L}, {H}], got {list(dt.shape)}")
    for name, t in (("A", A), ("D", D)):
        if t is None:
            continue
        check_small(name, t, x)
        if not (t.dim() == 1 and t.shape[0] == H):
            raise ValueError(f"expected {name} [{H}], got {list(t.shape)}")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_i weight[:, i] x_(t - K + 1 + i)), each channel for itself.

    x [B, L, C] (views with contiguous channels are read in place), weight [C, K] with K up to 4, bias [C];
    tail [B, K - 1, C]: the inputs before x, from the call before (None: zeros); activation "silu" or None.
    Returns y [B, L, C] and the tail for the next call.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"expected x [B, L, C], got {list(x.shape)}")
    batch, _, channels = x.shape
    expect_like("weight", weight, "x", x)
    if not (weight.dim() == 2 and weight.shape[0] == channels and 1 <= weight.shape[1] <= MAX_WIDTH):
        raise ValueError(f"expected weight [{channels}, 1..{MAX_WIDTH}], got {list(weight.shape)}")
    width = weight.shape[1]
    if bias is not None:
        expect_like("bias", bias, "x", x)
        if not (bias.dim() == 1 and bias.shape[0] == channels):
            raise ValueError(f"expected bias [{channels}], got {list(bias.shape)}")
    if tail is not None:
        expect_like("tail", tail, "x", x)
        fits = tail.dim() == 3 and tail.shape[0] == batch and tail.shape[1] == width - 1
        if not (fits and tail.shape[2] == channels):
            raise ValueError(f"expected tail [{batch}, {width - 1}, {channels}], got {list(tail.shape)}")
    if activation is not None and activation != "silu":
        raise ValueError(f'expected activation "silu" or None, got {activation!r}')
    ops = kernels(x, weight, bias, tail)
    if ops is None:
        return reference.causal_conv1d(x, weight, bias, tail=tail, activation=activation)
    x = x if x.stride(2) == 1 else x.contiguous()
    y, new_tail = ops.causal_conv1d(x, weight.contiguous(), whole(bias), whole(tail), activation == "silu")
    return y, new_tail


@fake("causal_conv1d")
def _causal_conv1d_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))
