"""The scan of Mamba-2 and the causal convolution before it against the recurrence and plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops, reference
from test_attention_linear import packet
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, L, H, P, G, N, dtype=torch.float32, device="cpu", seed=0):
    """x, dt, A, B, C, D, state as a trained model has them: dt around 0.1, A from -1 to -16."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, L, H, P, generator=g).to(dtype)
    dt = F.softplus(torch.randn(batch, L, H, generator=g) - 2)
    A = -1 - 15 * torch.rand(H, generator=g)
    B, C = (torch.randn(batch, L, G, N, generator=g).to(dtype) for _ in range(2))
    D = torch.randn(H, generator=g)
    state = torch.randn(batch, H, N, P, generator=g)
    return tuple(t.to(device) for t in (x, dt, A, B, C, D, state))


def recurrence(x, dt, A, B, C, D, state):
    """Token by token, in the state's dtype."""
    wide, outs, H = state.dtype, [], x.shape[2]
    x_, B_, C_ = x.to(wide), B.to(wide), C.to(wide)
    for t in range(x.shape[1]):
        step = dt[:, t].to(wide)[..., None, None]
        b, c = (m[:, t].repeat_interleave(H // B.shape[2], 1) for m in (B_, C_))
        state = (step * A.to(wide)[:, None, None]).exp() * state + step * b[..., None] * x_[:, t, :, None]
        y = (c[:, :, None] @ state)[:, :, 0]
        outs.append(y + D.to(wide)[:, None] * x_[:, t])
    return torch.stack(outs, 1).to(x.dtype), state


def check(got, inputs):
    assert_close(got[0], lambda *t: recurrence(*t)[0], *inputs, k=4.0, floor=1e-6)
    x, dt, A, B, C, D, state = inputs
    floats = (x.float(), dt, A, B.float(), C.float(), D, state)
    assert got[1].dtype == torch.float32
    assert_close(got[1], lambda *t: recurrence(*t)[1], *floats, k=4.0, floor=1e-6)


def scan(inputs, **options):
    x, dt, A, B, C, D, state = inputs
    return ops.ssd_scan(x, dt, A, B, C, D=D, state=state, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, G, P, N", [(4, 1, 64, 64), (6, 2, 16, 24), (5, 5, 40, 8), (7, 1, 3, 130)])
def test_against_the_recurrence(backend, H, G, P, N, dtype):
    inputs = make(2, 41, H, P, G, N, dtype, backend.device)
    got = scan(inputs)
    assert got[0].dtype == dtype and got[0].is_contiguous()
    check(got, inputs)


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 256])
def test_chunked_is_recurrent(backend, chunk):
    inputs = make(1, 130, 2, 32, 1, 16, device=backend.device)
    y, state = scan(inputs, chunk=chunk)
    want, last = recurrence(*(t.double() for t in inputs))
    assert (y - want).abs().max() < 1e-5 and (state - last).abs().max() < 1e-5


@pytest.mark.parametrize("sides", [(1, 2, 3, 4, 5, 6)])
def test_scale_by_scale_with_state_and_tail_equals_the_whole(backend, sides):
    """M-VAR's generation without running the prefix again."""
    H, P, N, width = 2, 16, 16, 4
    g = torch.Generator().manual_seed(5)
    L, channels = sum(s * s for s in sides), H * P + 2 * N
    xBC = torch.randn(2, L, channels, generator=g).to(backend.device)
    weight = torch.randn(channels, width, generator=g).to(backend.device)
    _, dt, A, _, _, D, _ = make(2, L, H, P, 1, N, device=backend.device)

    def run(t, tail, state):
        y, tail = ops.causal_conv1d(xBC[:, t], weight, tail=tail)
        x, B, C = y.split((H * P, N, N), -1)
        x, B, C = x.unflatten(2, (H, P)), B[:, :, None], C[:, :, None]
        out, state = ops.ssd_scan(x, dt[:, t], A, B, C, D=D, state=state)
        return out, tail, state

    whole, last_tail, last_state = run(slice(0, L), None, None)
    tail = state = None
    parts, first = [], 0
    for side in sides:
        out, tail, state = run(slice(first, first + side * side), tail, state)
        parts.append(out)
        first += side * side
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5
    assert (state - last_state).abs().max() < 1e-5 and torch.equal(tail, last_tail)


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    inputs = make(3, 50, 4, 16, 2, 16, device=backend.device)
    whole = scan(inputs)
    for b in range(3):
        s = slice(b, b + 1)
        x, dt, A, B, C, D, state = inputs
        alone = scan((x[s], dt[s], A, B[s], C[s], D, state[s]))
        assert torch.equal(alone[0], whole[0][s]) and torch.equal(alone[1], whole[1][s])


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_one_projection_are_read_in_place(backend, dtype):
    H, P, N = 2, 16, 8
    g = torch.Generator().manual_seed(0)
    xBC = torch.randn(2, 20, H * P + 2 * N + 1, generator=g).to(dtype).to(backend.device)
    _, dt, A, _, _, D, state = make(2, 20, H, P, 1, N, dtype, backend.device)
    for first in (0, 1):  # aligned and not
        x, B, C = xBC[..., first : first + H * P + 2 * N].split((H * P, N, N), -1)
        views = x.unflatten(2, (H, P)), dt, A, B[:, :, None], C[:, :, None], D, state
        copies = tuple(t.contiguous() for t in views)
        for a, b in zip(scan(views), scan(copies)):
            assert torch.equal(a, b)


def test_without_skip_and_state(backend):
    x, dt, A, B, C, D, state = make(1, 9, 2, 8, 1, 8, device=backend.device)
    got = ops.ssd_scan(x, dt, A, B, C)
    check(got, (x, dt, A, B, C, torch.zeros_like(D), torch.zeros_like(state)))


def test_nan_and_zero_steps(backend):
    inputs = make(1, 40, 2, 8, 1, 8, device=backend.device)
    x, dt, *_, state = inputs
    dt[:, :, 1] = 0  # a head that neither decays nor takes anything in
    _, new_state = scan(inputs)
    assert torch.equal(new_state[:, 1], state[:, 1])
    x[0, 35, 0, 2] = float("nan")
    y, new_state = scan(inputs)
    assert y[0, 35:, 0, 2].isnan().all() and y[0, :24].isfinite().all() and y[0, :, 1].isfinite().all()
    assert new_state[0, 0, :, 2].isnan().all() and new_state.isnan().sum() == 8


def test_empty_sizes(backend):
    for batch, L in ((0, 5), (2, 0)):
        inputs = make(batch, L, 2, 8, 1, 8, device=backend.device)
        y, state = scan(inputs)
        assert y.shape == inputs[0].shape and torch.equal(state, inputs[6])


def test_the_reference_follows_the_recurrence():
    inputs = tuple(t.double() for t in make(2, 30, 4, 8, 2, 6))
    x, dt, A, B, C, D, state = inputs
    y, new_state = reference.ssd_scan(x, dt, A, B, C, D=D, state=state, chunk=7)
    want, last = recurrence(*inputs)
    assert torch.allclose(y, want, atol=1e-12) and torch.allclose(new_state, last, atol=1e-12)


def test_gradients_equal_those_of_the_recurrence():
    inputs = [t.requires_grad_() for t in make(1, 12, 2, 4, 1, 4)]
    y, state = scan(inputs, chunk=5)
    got = torch.autograd.grad(y.sin().sum() + state.sin().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, state = recurrence(*exact)
    for a, b in zip(got, torch.autograd.grad(y.sin().sum() + state.sin().sum(), exact)):
        assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


# --- convolution -------------------------------------------------------------------------------------------


def convolution(x, weight, bias, tail, silu=True):
    whole = torch.cat((tail, x), 1).transpose(1, 2)
    y = F.conv1d(whole, weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if silu else y


def conv_inputs(batch, L, channels, width, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, L, channels), (channels, width), (channels,), (batch, width - 1, channels)
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 64, 130])
def test_convolution(backend, channels, dtype):
    for width in (1, 2, 3, 4):
        x, weight, bias, tail = conv_inputs(2, 40, channels, width, dtype, backend.device)
        y, new_tail = ops.causal_conv1d(x, weight, bias, tail=tail)
        assert_close(y, convolution, x, weight, bias, tail, floor=1e-6)
        assert torch.equal(new_tail, torch.cat((tail, x), 1)[:, 40:])


def test_convolution_without_bias_tail_and_activation(backend):
    x, weight, bias, tail = conv_inputs(2, 5, 24, 4, device=backend.device)
    y, _ = ops.causal_conv1d(x, weight, activation=None)
    zeros = torch.zeros_like(bias), torch.zeros_like(tail)
    assert_close(y, lambda *t: convolution(*t, silu=False), x, weight, *zeros, floor=1e-6)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 7], [33], [20, 20, 60]])
def test_convolution_cut_into_calls_has_the_same_bits(backend, cuts):
    x, weight, bias, tail = conv_inputs(2, 70, 24, 4, device=backend.device)
    whole, last = ops.causal_conv1d(x, weight, bias, tail=tail)
    parts = []
    for first, end in zip([0, *cuts], [*cuts, 70]):
        y, tail = ops.causal_conv1d(x[:, first:end], weight, bias, tail=tail)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(tail, last)
    alone, _ = ops.causal_conv1d(x[1:], weight, bias)
    assert torch.equal(alone, ops.causal_conv1d(x, weight, bias)[0][1:])


def test_convolution_of_strided_rows_and_nan(backend):
    wide, weight, bias, tail = conv_inputs(2, 12, 40, 4, device=backend.device)
    for view in (
        wide[..., 8:32],
        wide[..., 5:29],
        wide.transpose(1, 2).contiguous().transpose(1, 2)[..., :24],
    ):
        got = ops.causal_conv1d(view, weight[:24], bias[:24], tail=tail[..., :24])
        want = ops.causal_conv1d(view.contiguous(), weight[:24], bias[:24], tail=tail[..., :24].contiguous())
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    wide[0, 3, 5] = float("nan")
    y, _ = ops.causal_conv1d(wide, weight, bias)
    assert y[0, 3:7, 5].isnan().all() and y.isnan().sum() == 4
    for batch, L in ((0, 4), (2, 0)):
        x = torch.zeros(batch, L, 40, device=backend.device)
        y, new_tail = ops.causal_conv1d(x, weight, tail=tail[:batch])
        assert y.shape == x.shape and (batch == 0 or torch.equal(new_tail, tail))


def test_convolution_gradients():
    inputs = [t.requires_grad_() for t in conv_inputs(1, 6, 3, 4)]
    x, weight, bias, tail = inputs
    y, new_tail = ops.causal_conv1d(x, weight, bias, tail=tail)
    got = torch.autograd.grad(y.sin().sum() + new_tail.sin().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    tails = torch.cat((exact[3], exact[0]), 1)[:, 6:]
    for a, b in zip(got, torch.autograd.grad(convolution(*exact).sin().sum() + tails.sin().sum(), exact)):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    x, weight, bias, tail = conv_inputs(1, 6, 8, 4)
    torch.library.opcheck(packet(namespace).causal_conv1d, (x, weight, bias, tail, True))
    torch.library.opcheck(packet(namespace).causal_conv1d, (x, weight, None, None, False))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, dt, A, B, C, D, state, weight, tail):
        flat, tail = ops.causal_conv1d(x.flatten(2), weight, tail=tail)
        y, state = ops.ssd_scan(flat.view(x.shape), dt, A, B, C, D=D, state=state)
        return y, state, tail

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for L in (9, 16, 25):
        inputs = (*make(2, L, 4, 8, 2, 6), torch.randn(32, 4), torch.randn(2, 3, 32))
        for got, want in zip(compiled(*inputs), step(*inputs)):
            assert torch.equal(got, want)
    assert len(graphs) == 1


def good_scan():
    x, dt, A, B, C, D, state = make(2, 6, 4, 8, 2, 16)
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(6, 4, 8)), ValueError, r"expected x \[B, L, H, P\], got \[6, 4, 8\]"),
        (dict(x=torch.zeros(2, 6, 4, 8).double()), TypeError, "expected x of float32"),
        (dict(x=torch.zeros(2, 6, 4, 300)), ValueError, "expected x of 1 to 256 channels per head, got 300"),
        (dict(dt=torch.zeros(2, 4, 6)), ValueError, r"expected dt \[2, 6, 4\], got \[2, 4, 6\]"),
        (dict(A=torch.zeros(3)), ValueError, r"expected A \[4\], got \[3\]"),
        (dict(D=torch.zeros(4, 8)), ValueError, r"expected D \[4\], got \[4, 8\]"),
        (dict(D=torch.zeros(4, dtype=torch.int64)), TypeError, "expected D of float32, bfloat16 or float16"),
        (dict(B=torch.zeros(2, 5, 2, 16)), ValueError, r"expected B \[2, 6, G, N\], got \[2, 5, 2, 16\]"),
        (dict(B=torch.zeros(2, 6, 3, 16)), ValueError, "groups that divides the 4 heads, got 3"),
        (dict(C=torch.zeros(2, 6, 2, 15)), ValueError, r"expected C of B's shape \[2, 6, 2, 16\]"),
        (dict(C=torch.zeros(2, 6, 2, 16).half()), TypeError, "expected C of x's dtype"),
        (dict(state=torch.zeros(2, 4, 8, 16)), ValueError, r"expected state \[2, 4, 16, 8\]"),
        (dict(chunk=0), ValueError, "expected a chunk of at least 1, got 0"),
    ],
)
def test_bad_scans_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.ssd_scan(**(good_scan() | change))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(6, 8)), ValueError, r"expected x \[B, L, C\], got \[6, 8\]"),
        (
            dict(weight=torch.zeros(8, 5)),
            ValueError,
            r"expected weight \[8, 1..4\], got \[8, 5\]",
        ),
        (dict(weight=torch.zeros(8, 4).half()), TypeError, "expected weight of x's dtype"),
        (dict(bias=torch.zeros(7)), ValueError, r"expected bias \[8\], got \[7\]"),
        (dict(tail=torch.zeros(2, 4, 8)), ValueError, r"expected tail \[2, 3, 8\], got \[2, 4, 8\]"),
        (dict(activation="gelu"), ValueError, "expected activation \"silu\" or None, got 'gelu'"),
    ],
)
def test_bad_convolutions_are_refused(change, error, text):
    x, weight, bias, tail = conv_inputs(2, 6, 8, 4)
    with pytest.raises(error, match=text):
        ops.causal_conv1d(**(dict(x=x, weight=weight, bias=bias, tail=tail) | change))
