"""Gated linear attention with a carried state against the recurrence, and against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arimg import _library, ops, reference
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["softmax", "causal"]


def make(B, H, L, N, P=None, dtype=torch.float32, device="cpu", seed=0, gate=1.0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, H, L, N, generator=g).to(dtype).to(device) for _ in range(2))
    v = torch.randn(B, H, L, P or N, generator=g).to(dtype).to(device)
    decays = -torch.rand(B, H, L, generator=g) * gate
    state = torch.randn(B, H, N, P or N, generator=g)
    return q, k, v, decays.to(device), state.to(device)


def recurrence(q, k, v, gate, state, scale=None):
    """The plain form, token by token."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for t in range(q.shape[2]):
        decay = gate[:, :, t, None, None].to(state.dtype).exp()
        state = decay * state + scale * k[:, :, t, :, None].to(state) * v[:, :, t, None].to(state)
        outs.append((q[:, :, t, None].to(state) @ state)[:, :, 0])
    return torch.stack(outs, 2), state


def per_image(q, k, v, gate, state, chunk, scale=None):
    """ARFlow's form from its definition: each row by loops over images and rows."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for first in range(0, q.shape[2], chunk):
        rows = slice(first, first + chunk)
        kc, vc, sum_ = k[:, :, rows].to(state), v[:, :, rows].to(state), torch.zeros_like(state[:, :, 0, 0])
        for t in range(first, first + chunk):
            sum_ = sum_ + gate[:, :, t].to(state)
            row = q[:, :, t, None].to(state)
            within = (scale * row @ kc.transpose(2, 3)).softmax(-1) @ vc
            outs.append((within + sum_.exp()[..., None, None] * (row @ state))[:, :, 0])
        mean = gate[:, :, rows].to(state).mean(-1)
        state = mean.exp()[..., None, None] * state + scale * kc.transpose(2, 3) @ vc
    return torch.stack(outs, 2), state


def both(form, chunk, scale=None):
    """(formula of the outputs, formula of the state) for assert_close."""

    def formula(which):
        def run(q, k, v, gate, state):
            whole = (
                per_image(q, k, v, gate, state, chunk, scale)
                if form == "softmax"
                else recurrence(q, k, v, gate, state, scale)
            )
            return whole[which].to(v.dtype) if which == 0 else whole[1]

        return run

    return formula(0), formula(1)


def check(got, form, chunk, inputs, scale=None, k=4.0):
    """k: sums in another order than the definition's; the softmax form adds two rounded results."""
    out, new_state = both(form, chunk, scale)
    q, keys, v, gate, state = inputs
    state = torch.zeros_like(got[1]) if state is None else state
    assert_close(got[0], out, q, keys, v, gate, state, k=k, floor=1e-6)
    assert got[1].dtype == torch.float32
    assert_close(got[1], new_state, q.float(), keys.float(), v.float(), gate, state, k=k, floor=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_against_the_definition(backend, form, dtype):
    *qkvg, state = make(2, 2, 48, 64, dtype=dtype, device=backend.device)
    for chunk in (16, 48):
        got = ops.gated_linear_attention(*qkvg, state=state, chunk=chunk, inner=form)
        assert got[0].dtype == dtype and got[0].transpose(1, 2).is_contiguous()
        check(got, form, chunk, (*qkvg, state))


@pytest.mark.parametrize("N, P", [(8, 8), (16, 40), (72, 72), (5, 3), (33, 100), (128, 64), (160, 256)])
def test_head_dims(backend, N, P):
    *qkvg, state = make(1, 1, 37, N, P, device=backend.device)
    check(ops.gated_linear_attention(*qkvg, state=state, inner="causal"), "causal", 64, (*qkvg, state))
    if N == P and N % 8 == 0:
        got = ops.gated_linear_attention(*qkvg, state=state)
        check(got, "softmax", 37, (*qkvg, state))


@pytest.mark.parametrize("L", [1, 2, 13, 32, 33, 70])
def test_lengths_without_a_state(backend, L):
    *qkvg, _ = make(1, 2, L, 16, device=backend.device)
    for form in FORMS:
        got = ops.gated_linear_attention(*qkvg, inner=form)
        check(got, form, L, (*qkvg, None))


@pytest.mark.parametrize("chunk", [1, 3, 24, 64, 1000])
def test_chunked_is_recurrent(backend, chunk):
    *qkvg, state = make(1, 2, 100, 32, device=backend.device)
    out, new_state = ops.gated_linear_attention(*qkvg, state=state, chunk=chunk, inner="causal")
    want, last = recurrence(*(t.double() for t in qkvg), state.double())
    assert (out - want).abs().max() < 1e-5 and (new_state - last).abs().max() < 1e-5


@pytest.mark.parametrize("form, cuts", [("causal", [1, 2, 30, 31, 64, 90]), ("softmax", [20, 40, 80])])
def test_calls_with_a_carried_state_equal_one_call(backend, form, cuts):
    q, k, v, gate, state = make(1, 2, 100, 32, device=backend.device)
    whole, last = ops.gated_linear_attention(q, k, v, gate, state=state, chunk=20, inner=form)
    parts = []
    for first, end in zip([0, *cuts], [*cuts, 100]):
        t = slice(first, end)
        out, state = ops.gated_linear_attention(
            q[:, :, t], k[:, :, t], v[:, :, t], gate[:, :, t], state=state, chunk=20, inner=form
        )
        parts.append(out)
    assert (torch.cat(parts, 2) - whole).abs().max() < 1e-5 and (state - last).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_equals_the_row_in_a_batch(backend, form):
    q, k, v, gate, state = make(3, 2, 40, 16, device=backend.device)
    whole = ops.gated_linear_attention(q, k, v, gate, state=state, chunk=20, inner=form)
    for b in range(3):
        s = slice(b, b + 1)
        alone = ops.gated_linear_attention(q[s], k[s], v[s], gate[s], state=state[s], chunk=20, inner=form)
        assert torch.equal(alone[0], whole[0][s]) and torch.equal(alone[1], whole[1][s])


def test_a_later_token_leaves_earlier_ones_bit_identical(backend):
    q, k, v, gate, state = make(1, 1, 40, 16, device=backend.device)
    before, _ = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    for t in (q, k, v, gate):
        t[:, :, 29:] *= 0.5
    after, _ = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    assert torch.equal(before[:, :, :29], after[:, :, :29])
    assert not torch.equal(before[:, :, 29:], after[:, :, 29:])


def test_with_a_zero_state_the_softmax_form_is_attention_per_image(backend):
    q, k, v, gate, _ = make(1, 2, 64, 32, device=backend.device)
    out, _ = ops.gated_linear_attention(q, k, v, gate)
    assert (out - ops.cached_attention(q, k, v, 64)).abs().max() == 0


def test_strong_gates_forget_without_overflow(backend):
    q, k, v, gate, state = make(1, 1, 70, 16, device=backend.device, gate=300.0)
    gate[:, :, 20] = -torch.inf  # a reset
    for form, chunk in (("causal", 64), ("softmax", 70)):
        got = ops.gated_linear_attention(q, k, v, gate, state=state, inner=form)
        assert got[0].isfinite().all() and got[1].isfinite().all()
        check(got, form, chunk, (q, k, v, gate.clamp(min=-1e4), state))
    state[:] = 1e30
    forgotten, _ = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    fresh, _ = ops.gated_linear_attention(q, k, v, gate, inner="causal")
    assert torch.equal(forgotten[:, :, 20:], fresh[:, :, 20:])


def test_many_small_decays_lose_nothing(backend):
    # Sums of hundreds, differences of thousandths: float32 alone would lose digits of the decays.
    q, k, v, gate, state = make(1, 1, 64, 16, device=backend.device, gate=1e-3)
    gate[:, :, 0] = -900.0
    out, _ = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    want, _ = recurrence(*(t.double() for t in (q, k, v, gate)), state.double())
    assert (out - want).abs().max() < 1e-5


def test_nan_reaches_only_what_follows(backend):
    q, k, v, gate, state = make(1, 2, 100, 16, device=backend.device)
    q[0, 0, 50, 3] = float("nan")
    out, new_state = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    assert out[0, 0, 50].isnan().all() and out.isnan().sum() == 16 and new_state.isfinite().all()
    k[0, 1, 70, 3] = float("nan")
    out, new_state = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    assert (
        out[0, 1, 70:].isnan().all() and out[0, 1, :64].isfinite().all() and new_state[0, 0].isfinite().all()
    )
    assert new_state[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_unaligned_views(backend, dtype):
    B, L, H, D = 2, 40, 2, 32
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(B, L, 3, H, D + 1, generator=g).to(dtype).to(backend.device)
    gate = -torch.rand(B, L, H, generator=g).to(backend.device).transpose(1, 2)
    for cut in (slice(0, D), slice(1, D + 1)):
        q, k, v = qkv[..., cut].permute(2, 0, 3, 1, 4).unbind(0)
        for form in FORMS:
            got = ops.gated_linear_attention(q, k, v, gate, chunk=20, inner=form)
            copies = [t.contiguous() for t in (q, k, v, gate)]
            want = ops.gated_linear_attention(*copies, chunk=20, inner=form)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_scale_and_a_gate_of_16_bits(backend):
    q, k, v, gate, state = make(1, 1, 20, 16, device=backend.device)
    for form in FORMS:
        half = gate.bfloat16()
        got = ops.gated_linear_attention(q, k, v, half, state=state, scale=-0.3, inner=form)
        check(got, form, 20, (q, k, v, half.float(), state), scale=-0.3)


def test_empty_sizes(backend):
    for B, H, L in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        q, k, v, gate, state = make(B, H, L, 16, device=backend.device)
        for form in FORMS:
            out, new_state = ops.gated_linear_attention(q, k, v, gate, state=state, inner=form)
            assert out.shape == q.shape and torch.equal(new_state, state)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads):
    before = torch.get_num_threads()
    q, k, v, gate, state = make(4, 8, 200, 64)
    torch.set_num_threads(1)
    one = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
    torch.set_num_threads(threads)
    try:
        got = ops.gated_linear_attention(q, k, v, gate, state=state, inner="causal")
        assert torch.equal(got[0], one[0]) and torch.equal(got[1], one[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_follows_the_definition(form):
    inputs = [t.double() for t in make(2, 2, 30, 8)]
    out, state = reference.gated_linear_attention(*inputs[:4], state=inputs[4], chunk=10, inner=form)
    want = both(form, 10)
    assert torch.allclose(out, want[0](*inputs), atol=1e-12)
    assert torch.allclose(state, want[1](*inputs), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_definition(form):
    inputs = [t.requires_grad_() for t in make(1, 2, 12, 8)]
    out, state = ops.gated_linear_attention(*inputs[:4], state=inputs[4], chunk=6, inner=form)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((out * weight).sum() + state.sin().sum(), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = both(form, 6)
    loss = (want[0](*exact) * weight).sum() + want[1](*exact).sin().sum()
    for a, b in zip(got, torch.autograd.grad(loss, exact)):
        assert (a - b).abs().max() < 1e-5


def packet(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    return getattr(torch.ops, namespace)


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    q, k, v, gate, state = make(1, 2, 12, 8)
    per_head, base = torch.rand(2), v.clone()
    scan = packet(namespace).gated_scan
    torch.library.opcheck(scan, (q, k, v, gate, None, None, base, state, 6, 0.25, False))
    torch.library.opcheck(scan, (q, k, v, gate, -per_head, per_head, None, None, 64, 1.0, True))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v, gate, state):
        out, state = ops.gated_linear_attention(q, k, v, gate, state=state)
        return out + 1, state

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for L in (9, 16, 25):
        inputs = make(2, 2, L, 16)
        for got, want in zip(compiled(*inputs), step(*inputs)):
            assert torch.equal(got, want)
    assert len(graphs) == 1


def test_several_images_compile_in_one_graph():
    q, k, v, gate, state = make(1, 2, 48, 16)
    step = torch.compile(
        lambda *t: ops.gated_linear_attention(*t, state=state, chunk=16), fullgraph=True, backend="eager"
    )
    for got, want in zip(
        step(q, k, v, gate), ops.gated_linear_attention(q, k, v, gate, state=state, chunk=16)
    ):
        assert torch.equal(got, want)


def test_shapes_beyond_2_to_the_31_elements():
    with FakeTensorMode():
        q = torch.empty(64, 32, 2**16, 64, dtype=torch.bfloat16)
        gate = torch.empty(64, 32, 2**16)
        for form in FORMS:
            out, state = ops.gated_linear_attention(q, q, q, gate, inner=form)
            assert out.shape == q.shape and out.dtype == q.dtype
            assert state.shape == (64, 32, 64, 64) and state.dtype == torch.float32


def good():
    q, k, v, gate, state = make(2, 3, 6, 16)
    return dict(q=q, k=k, v=v, gate=gate, state=state)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(q=torch.zeros(3, 6, 16)), ValueError, r"expected q \[B, H, L, N\], got \[3, 6, 16\]"),
        (dict(q=torch.zeros(2, 3, 6, 16).double()), TypeError, "expected q of float32"),
        (dict(k=torch.zeros(2, 3, 5, 16)), ValueError, r"expected k of q's shape \[2, 3, 6, 16\]"),
        (dict(v=torch.zeros(2, 3, 6, 16).half()), TypeError, "expected v of q's dtype"),
        (dict(v=torch.zeros(2, 3, 5, 16)), ValueError, r"expected v \[2, 3, 6, P\], got \[2, 3, 5, 16\]"),
        (dict(v=torch.zeros(2, 3, 6, 300)), ValueError, "expected v of 1 to 256 channels per head, got 300"),
        (dict(v=torch.zeros(2, 3, 6, 24)), ValueError, "one head dim, a multiple of 8, got 16 and 24"),
        (dict(gate=torch.zeros(2, 6, 3)), ValueError, r"expected gate \[2, 3, 6\], got \[2, 6, 3\]"),
        (dict(gate=torch.zeros(2, 3, 6, dtype=torch.int32)), TypeError, "expected gate of float32, bfloat16"),
        (dict(gate=torch.zeros(2, 3, 6, device="meta")), ValueError, "expected gate on device cpu, got meta"),
        (dict(state=torch.zeros(2, 3, 16, 16).half()), TypeError, "expected state of float32"),
        (dict(state=torch.zeros(2, 3, 16, 15)), ValueError, r"expected state \[2, 3, 16, 16\]"),
        (dict(state=3), TypeError, "expected state to be a tensor, got int"),
        (dict(chunk=4), ValueError, "expected a chunk that divides the length 6, got 4"),
        (dict(chunk=0, inner="causal"), ValueError, "expected a chunk"),
        (dict(inner="linear"), ValueError, 'expected inner "softmax" or "causal", got \'linear\''),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.gated_linear_attention(**(good() | change))
