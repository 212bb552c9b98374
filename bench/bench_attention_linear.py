"""The scan of Mamba-2 and ARFlow's attention against the recurrence and the chunked formula in torch.

M-VAR d16: width 1024, expand 2, 32 heads of 64, one group, state 64, with a guidance pair (batch 2).
ARFlow: 256 tokens an image at 256 pixels, 16 heads of 72 (XL) or 12 of 64 (B).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from arimg import ops
from conftest import OURS, SMOKE

NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [9] if SMOKE else [1, 16, 256, 680]
IMAGES = [(2, 16, 12, 2)] if SMOKE else [(12, 64, 256, 1), (16, 72, 256, 1), (12, 64, 64, 5)]


def agree(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(got, want):
        assert (a - b).abs().max() < NOISE[a.dtype] * (1 + b.abs().max()), (a - b).abs().max()


def recurrent_ssd(x, dt, A, B, C, D, state):
    """Token by token, each step one multiply-add over all states."""
    x_, B_, C_, outs = x.float(), B.float(), C.float(), []
    decay = (dt * A).exp()[..., None, None]
    for t in range(x.shape[1]):
        state = torch.addcmul(
            decay[:, t] * state, B_[:, t, :, :, None], (dt[:, t, :, None] * x_[:, t])[:, :, None]
        )
        outs.append((C_[:, t, :, None] @ state)[:, :, 0])
    return (torch.stack(outs, 1) + D[:, None] * x_).to(x.dtype), state


def chunked_ssd(x, dt, A, B, C, D, state, chunk=64):
    """The four steps of the published formula with einsum, one group."""
    outs, x_, q, k = [], x.float(), C[:, :, 0].float(), B[:, :, 0].float()
    v, log_decay = x_ * dt[..., None], dt * A
    for i in range(0, x.shape[1], chunk):
        t = slice(i, i + chunk)
        total = log_decay[:, t].cumsum(1).transpose(1, 2)
        between = (total[..., :, None] - total[..., None, :]).exp().tril()
        scores = torch.einsum("bin,bjn->bij", q[:, t], k[:, t])[:, None] * between
        y = torch.einsum("bhij,bjhp->bihp", scores, v[:, t])
        y = y + torch.einsum("bin,bhnp,bhi->bihp", q[:, t], state, total.exp())
        left = (total[..., -1:] - total).exp()
        state = total[..., -1:, None].exp() * state + torch.einsum(
            "bjn,bhj,bjhp->bhnp", k[:, t], left, v[:, t]
        )
        outs.append(y)
    return (torch.cat(outs, 1) + D[:, None] * x_).to(x.dtype), state


@pytest.mark.parametrize("peer", [OURS, "torch, chunked einsum", "torch, recurrent"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_ssd_scan(dtype: torch.dtype, length: int, peer: str, measure: Callable[..., float]) -> None:
    H, P, N = 32, 64, 64
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, H, P, generator=g).to(dtype)
    B, C = (torch.randn(2, length, 1, N, generator=g).to(dtype) for _ in range(2))
    dt, A = torch.rand(2, length, H, generator=g) * 0.1, -1 - 15 * torch.rand(H, generator=g)
    D, state = torch.randn(H, generator=g), torch.randn(2, H, N, P, generator=g)
    inputs = (x, dt, A, B, C, D, state)
    functions = {
        OURS: lambda: ops.ssd_scan(x, dt, A, B, C, D=D, state=state),
        "torch, chunked einsum": lambda: chunked_ssd(*inputs),
        "torch, recurrent": lambda: recurrent_ssd(*inputs),
    }
    for function in functions.values():
        agree(functions[OURS](), function())
    # The state's products, 4 N P a token and head; what a chunk adds inside is our choice and not counted.
    measure(
        f"SSD scan, 2 x {length} tokens, {H} heads of {P}, state {N}, {str(dtype)[6:]}",
        peer,
        functions[peer],
        bytes=2 * x.nbytes + B.nbytes + C.nbytes + 2 * state.nbytes,
        flops=4 * N * P * H * 2 * length,
    )


@pytest.mark.parametrize("peer", [OURS, "torch, conv1d + silu", "torch, sum of shifts + silu"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_causal_conv1d(dtype: torch.dtype, length: int, peer: str, measure: Callable[..., float]) -> None:
    channels, width = 2 * 1024 + 2 * 64, 4
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, channels, generator=g).to(dtype)
    tail = torch.randn(2, width - 1, channels, generator=g).to(dtype)
    weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((channels, width), (channels,)))

    def conv() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.cat((tail, x), 1)
        y = F.conv1d(whole.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
        return F.silu(y), whole[:, length:]

    def shifts() -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.cat((tail, x), 1)
        y = bias
        for i in range(width):
            y = torch.addcmul(y, whole[:, i : i + length], weight[:, i])
        return F.silu(y), whole[:, length:]

    functions = {
        OURS: lambda: ops.causal_conv1d(x, weight, bias, tail=tail),
        "torch, conv1d + silu": conv,
        "torch, sum of shifts + silu": shifts,
    }
    for function in functions.values():
        agree(functions[OURS](), function())
    group = f"causal conv1d + silu, 2 x {length} tokens, {channels} channels, {str(dtype)[6:]}"
    measure(group, peer, functions[peer], bytes=2 * x.nbytes)


def plain_images(q, k, v, gate, state, chunk):
    """The released formula: every image by matrix products, softmax written out."""
    scale, outs = q.shape[3] ** -0.5, []
    for i in range(0, q.shape[2], chunk):
        t = slice(i, i + chunk)
        a, b, c, g = q[:, :, t].float(), k[:, :, t].float() * scale, v[:, :, t].float(), gate[:, :, t]
        within = (a @ b.transpose(2, 3)).softmax(-1) @ c
        outs.append(within + (a * g.cumsum(-1).exp()[..., None]) @ state)
        state = g.mean(-1).exp()[..., None, None] * state + b.transpose(2, 3) @ c
    return torch.cat(outs, 2).to(q.dtype), state


def sdpa_images(q, k, v, gate, state, chunk):
    """The same with torch's attention inside the images."""
    scale, outs = q.shape[3] ** -0.5, []
    for i in range(0, q.shape[2], chunk):
        t = slice(i, i + chunk)
        a, b, c, g = q[:, :, t], k[:, :, t], v[:, :, t], gate[:, :, t]
        within = F.scaled_dot_product_attention(a, b, c)
        outs.append(within + ((a.float() @ state) * g.cumsum(-1).exp()[..., None]).to(q.dtype))
        state = g.mean(-1).exp()[..., None, None] * state + b.float().transpose(2, 3) @ (c.float() * scale)
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("peer", [OURS, "torch, released formula", "torch, SDPA + products"])
@pytest.mark.parametrize("heads, dim, chunk, images", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_images_of_arflow(
    dtype: torch.dtype,
    heads: int,
    dim: int,
    chunk: int,
    images: int,
    peer: str,
    measure: Callable[..., float],
) -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, images * chunk, 3, heads, dim, generator=g).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    gate = F.logsigmoid(torch.randn(2, images * chunk, heads, generator=g)).transpose(1, 2) / 16
    state = torch.randn(2, heads, dim, dim, generator=g)
    functions = {
        OURS: lambda: ops.gated_linear_attention(q, k, v, gate, state=state, chunk=chunk),
        "torch, released formula": lambda: plain_images(q, k, v, gate, state, chunk),
        "torch, SDPA + products": lambda: sdpa_images(q, k, v, gate, state, chunk),
    }
    for function in functions.values():
        agree(functions[OURS](), function())
    flops = 2 * heads * images * chunk * (4 * chunk * dim + 4 * dim * dim)
    group = f"ARFlow, 2 x {images} images of {chunk}, {heads} heads of {dim}, {str(dtype)[6:]}"
    measure(group, peer, functions[peer], flops=flops)


@pytest.mark.parametrize("peer", [OURS, "torch, recurrent"])
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_form(length: int, peer: str, measure: Callable[..., float]) -> None:
    heads, dim = 16, 64
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, dim, generator=g) for _ in range(3))
    gate = F.logsigmoid(torch.randn(2, heads, length, generator=g)) / 16
    state = torch.randn(2, heads, dim, dim, generator=g)

    def recurrent() -> tuple[torch.Tensor, torch.Tensor]:
        s, decay, outs = state, gate.exp()[..., None, None], []
        for t in range(length):
            s = torch.addcmul(decay[:, :, t] * s, k[:, :, t, :, None] * dim**-0.5, v[:, :, t, None])
            outs.append((q[:, :, t, None] @ s)[:, :, 0])
        return torch.stack(outs, 2), s

    functions = {
        OURS: lambda: ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal"),
        "torch, recurrent": recurrent,
    }
    agree(functions[OURS](), recurrent())
    flops = 4 * dim * dim * heads * 2 * length
    measure(
        f"gated linear attention, 2 x {length}, {heads} heads of {dim}", peer, functions[peer], flops=flops
    )
