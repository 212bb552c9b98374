"""Norms with modulation and gated residuals against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 3, 7), (2, 5, 64), (3, 2, 129), (2, 4, 1024), (1, 2, 2500)]


def plain_norm(x, scale, shift, norm="layer"):
    normalise = F.rms_norm if norm == "rms" else F.layer_norm
    return normalise(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def make(shape, dtype, device, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, L, C = shape
    x = (torch.randn(B, L, C, generator=g) + offset).to(dtype)
    y = torch.randn(B, L, C, generator=g).to(dtype)
    modulation = torch.randn(B, 6, C, generator=g).to(dtype)
    return x.to(device), y.to(device), modulation.to(device)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate(backend, shape, dtype, norm):
    x, _, m = make(shape, dtype, backend.device)
    got = ops.norm_modulate(x, m[:, :1], m[:, 1:2], norm=norm)
    assert_close(got, plain_norm, x, m[:, :1], m[:, 1:2], norm)


def test_large_mean_does_not_cancel(backend):
    x, _, m = make((2, 3, 512), torch.float32, backend.device, offset=1000.0)
    assert_close(ops.norm_modulate(x, m[:, :1], m[:, 1:2]), plain_norm, x, m[:, :1], m[:, 1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_norm_equals_the_two_steps(backend, shape, dtype):
    x, y, m = make(shape, dtype, backend.device)
    gate, scale, shift = m[:, :1], m[:, 1:2], m[:, 2:3]
    residual, normed = ops.gated_residual_norm(x, y, gate, scale, shift)
    assert torch.equal(residual, ops.gated_residual(x, y, gate))
    assert torch.equal(normed, ops.norm_modulate(residual, scale, shift))
    assert_close(residual, lambda x, y, g: x + g * y, x, y, gate)
    _, rms = ops.gated_residual_norm(x, y, gate, scale, shift, norm="rms")
    assert torch.equal(rms, ops.norm_modulate(residual, scale, shift, norm="rms"))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    x, y, m = make((4, 3, 200), torch.float32, backend.device)
    whole = ops.gated_residual_norm(x, y, m[:, :1], m[:, 1:2], m[:, 2:3])
    for b in range(4):
        s = slice(b, b + 1)
        alone = ops.gated_residual_norm(x[s], y[s], m[s, :1], m[s, 1:2], m[s, 2:3])
        assert all(torch.equal(w[s], a) for w, a in zip(whole, alone))


def test_non_contiguous_broadcast_empty_and_nan(backend):
    x, _, m = make((2, 6, 40), torch.float32, backend.device)
    view = x.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2]
    assert torch.equal(
        ops.norm_modulate(view, m[:, :1], m[:, 1:2]),
        ops.norm_modulate(view.contiguous(), m[:, :1], m[:, 1:2]),
    )
    one = m[:1, :1]
    assert torch.equal(
        ops.norm_modulate(x, one, one), ops.norm_modulate(x, one.expand(2, 1, 40), one.expand(2, 1, 40))
    )
    assert ops.norm_modulate(x[:, :0], m[:, :1], m[:, 1:2]).shape == (2, 0, 40)
    poisoned = x.clone()
    poisoned[0, 1, 3] = float("nan")
    out = ops.norm_modulate(poisoned, m[:, :1], m[:, 1:2])
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any() and not out[1].isnan().any()


def gradients(function, inputs, weights):
    """d(sum of outputs weighted) / d inputs, in the inputs' dtype."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights))
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 64), (3, 17, 72), (2, 35, 200)])
def test_gradients(backend, shape, dtype, norm):
    """Every gradient against autograd through plain torch, with parts of rows (16) and tails of lanes."""
    x, y, m = make(shape, dtype, backend.device)
    gate, scale, shift = m[:, :1], m[:, 1:2], m[:, 2:3]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=g).to(dtype).to(backend.device) for _ in range(2)]

    def both(x, y, gate, scale, shift):
        x_new = x + gate * y
        return x_new, plain_norm(x_new, scale, shift, norm)

    cases = [
        (
            lambda *t: ops.gated_residual_norm(*t, norm=norm),
            both,
            (x, y, gate, scale, shift),
        ),
        (
            lambda *t: ops.norm_modulate(*t, norm=norm),
            lambda x, a, b: plain_norm(x, a, b, norm),
            (x, scale, shift),
        ),
        (ops.gated_residual, lambda x, y, g: x + g * y, (x, y, gate)),
    ]
    for ours, plain, inputs in cases:
        got = gradients(ours, inputs, weights)
        for i, grad in enumerate(got):
            assert grad.dtype == dtype

            def formula(*t, plain=plain, i=i):
                return gradients(plain, t[: len(t) - 2], t[len(t) - 2 :])[i].detach()

            # Sums of a batch entry: plain torch in 16 bits adds in 16 bits or in 32, so it may happen to be
            # nearly exact; the last rounding is always allowed.
            unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            assert_close(grad, formula, *inputs, *weights, k=3, floor=4 * unit * float(grad.abs().max()))


def test_gradients_of_a_row_alone_and_of_a_shared_modulation(backend):
    x, y, m = make((3, 20, 40), torch.float32, backend.device)
    inputs = (x, y, m[:, :1], m[:, 1:2], m[:, 2:3])
    weights = [x.flip(0), y.flip(1)]
    whole = gradients(ops.gated_residual_norm, inputs, weights)
    for b in range(3):
        s = slice(b, b + 1)
        alone = gradients(ops.gated_residual_norm, [t[s] for t in inputs], [w[s] for w in weights])
        assert all(torch.equal(w[s], a) for w, a in zip(whole, alone))
    shared = gradients(ops.norm_modulate, (x, m[:1, :1], m[:1, 1:2]), weights)
    separate = [t.expand(3, 1, 40) for t in (m[:1, :1], m[:1, 1:2])]
    each = gradients(ops.norm_modulate, (x, *separate), weights)
    assert torch.equal(shared[0], each[0]) and shared[1].shape == (1, 1, 40)
    assert torch.allclose(shared[1], each[1].sum(0, keepdim=True), atol=1e-5)
    empty = gradients(ops.norm_modulate, (x[:, :0], m[:, :1], m[:, 1:2]), weights[:1] and [x[:, :0]])
    assert not empty[1].any() and empty[0].shape == (3, 0, 40)


def test_gradient_is_taken_once_and_goes_through_the_reference_for_wide_rows():
    x, _, m = make((1, 2, 16), torch.float32, "cpu")
    x.requires_grad_()
    out = ops.norm_modulate(x, m[:, :1], m[:, 1:2])
    (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    wide, _, m = make((1, 2, 7200), torch.float32, "cpu")
    inputs = (wide, m[:, :1], m[:, 1:2])
    for a, b in zip(gradients(ops.norm_modulate, inputs, [wide]), gradients(plain_norm, inputs, [wide])):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck_and_compile(namespace):
    if namespace == "arimg_emulated":
        _emulated_or_skip()
    x, y, m = make((2, 3, 32), torch.float32, "cpu")
    gate, scale, shift = m[:, :1], m[:, 1:2], m[:, 2:3]
    packet = getattr(torch.ops, namespace)
    torch.library.opcheck(packet.norm_modulate, (x, scale, shift, 1e-6, False))
    torch.library.opcheck(packet.gated_residual_norm, (x, y, gate, scale, shift, 1e-6, True))
    torch.library.opcheck(packet.norm_backward, (x, y, y, scale, y, gate, 1e-6, False))
    torch.library.opcheck(packet.norm_backward, (x, y, None, scale, None, None, 1e-6, True))
    torch.library.opcheck(packet.gated_residual, (x, y, gate))


def _emulated_or_skip():
    from arimg import _library

    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))


def test_compiles_without_graph_breaks_and_without_recompiling():
    _, _, m = make((2, 3, 32), torch.float32, "cpu")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda x: ops.norm_modulate(x, m[:, :1], m[:, 1:2]) + 1, fullgraph=True, dynamic=True, backend=backend
    )
    for length in (3, 5, 9):
        x = torch.randn(2, length, 32)
        assert torch.equal(step(x), ops.norm_modulate(x, m[:, :1], m[:, 1:2]) + 1)
    assert len(graphs) == 1


def test_gradient_compiles_without_graph_breaks():
    x, y, m = make((2, 3, 32), torch.float32, "cpu")
    inputs = [t.requires_grad_() for t in (x, y, m)]

    def step(x, y, m):
        x, h = ops.gated_residual_norm(x, y, m[:, :1], m[:, 1:2], m[:, 2:3], norm="rms")
        return (x * h).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(3, 4)), ValueError, r"expected x \[B, L, C\], got \[3, 4\]"),
        (dict(x=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "expected x of float32"),
        (dict(scale=torch.zeros(2, 1, 5)), ValueError, r"expected scale \[2, 1, 4\], got \[2, 1, 5\]"),
        (dict(scale=torch.zeros(2, 1, 4).half()), TypeError, "expected scale of x's dtype"),
        (dict(shift=torch.zeros(2, 1, 4, device="meta")), ValueError, "expected shift on x's device"),
        (dict(x=[1.0]), TypeError, "expected x to be a tensor, got list"),
        (dict(norm="batch"), ValueError, "expected the norm layer or rms, got 'batch'"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    arguments = dict(x=torch.zeros(2, 3, 4), scale=torch.zeros(2, 1, 4), shift=torch.zeros(2, 1, 4)) | change
    with pytest.raises(error, match=text):
        ops.norm_modulate(**arguments)
