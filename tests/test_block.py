"""Norms with modulation and gated residuals against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 3, 7), (2, 5, 64), (3, 2, 129), (2, 4, 1024), (1, 2, 2500)]


def plain_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def make(shape, dtype, device, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, L, C = shape
    x = (torch.randn(B, L, C, generator=g) + offset).to(dtype)
    y = torch.randn(B, L, C, generator=g).to(dtype)
    modulation = torch.randn(B, 6, C, generator=g).to(dtype)
    return x.to(device), y.to(device), modulation.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate(backend, shape, dtype):
    x, _, m = make(shape, dtype, backend.device)
    got = ops.norm_modulate(x, m[:, :1], m[:, 1:2])
    assert_close(got, plain_norm, x, m[:, :1], m[:, 1:2])


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


def test_gradients_flow_through_the_reference():
    x, y, m = make((2, 3, 16), torch.float64, "cpu")
    x, y, m = x.float().requires_grad_(), y.float(), m.float()
    _, out = ops.gated_residual_norm(x, y, m[:, :1], m[:, 1:2], m[:, 2:3])
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck_and_compile(namespace):
    if namespace == "arimg_emulated":
        _emulated_or_skip()
    x, y, m = make((2, 3, 32), torch.float32, "cpu")
    gate, scale, shift = m[:, :1], m[:, 1:2], m[:, 2:3]
    packet = getattr(torch.ops, namespace)
    torch.library.opcheck(packet.norm_modulate, (x, scale, shift, 1e-6))
    torch.library.opcheck(packet.gated_residual_norm, (x, y, gate, scale, shift, 1e-6))
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


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=torch.zeros(3, 4)), ValueError, r"expected x \[B, L, C\], got \[3, 4\]"),
        (dict(x=torch.zeros(2, 3, 4, dtype=torch.int64)), TypeError, "expected x of float32"),
        (dict(scale=torch.zeros(2, 1, 5)), ValueError, r"expected scale \[2, 1, 4\], got \[2, 1, 5\]"),
        (dict(scale=torch.zeros(2, 1, 4).half()), TypeError, "expected scale of x's dtype"),
        (dict(shift=torch.zeros(2, 1, 4, device="meta")), ValueError, "expected shift on x's device"),
        (dict(x=[1.0]), TypeError, "expected x to be a tensor, got list"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    arguments = dict(x=torch.zeros(2, 3, 4), scale=torch.zeros(2, 1, 4), shift=torch.zeros(2, 1, 4)) | change
    with pytest.raises(error, match=text):
        ops.norm_modulate(**arguments)
