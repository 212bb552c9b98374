"""Norm + modulation and gated residual: one pass against the separate operations of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops

SHAPES = {
    "VAR d16, last scale (2 x 256 x 1024)": (2, 256, 1024),
    # Two tensors exceed the cache, and each is small enough that malloc gives used pages again; beyond 32 MB
    # every result costs its page faults, in any library.
    "past the cache (8 x 768 x 1024)": (8, 768, 1024),
}


def plain_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def plain_rms(x, scale, shift):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def plain(x, y, gate, scale, shift):
    x = x + gate * y
    return x, plain_norm(x, scale, shift)


@pytest.mark.parametrize("peer", ["arimg", "torch", "torch clone"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate(shape, norm, peer, measure):
    x = torch.randn(SHAPES[shape])
    scale, shift = torch.randn(2, x.shape[0], 1, x.shape[2])
    functions = {
        "arimg": lambda: ops.norm_modulate(x, scale, shift, norm=norm),
        "torch": lambda: (plain_rms if norm == "rms" else plain_norm)(x, scale, shift),
        "torch clone": x.clone,
    }
    assert torch.allclose(functions["arimg"](), functions["torch"](), atol=1e-4)
    # x is read, the normed rows are written.
    measure(f"{norm} norm + modulate, {shape}", peer, functions[peer], bytes=2 * x.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, peer, measure):
    """Forward and backward of the gated residual with its norm."""
    x, y, grad_x, grad = (torch.randn(SHAPES[shape]) for _ in range(4))
    gate, scale, shift = torch.randn(3, x.shape[0], 1, x.shape[2])
    inputs = [t.requires_grad_() for t in (x, y, gate, scale, shift)]

    def step(function):
        return torch.autograd.grad(function(*inputs), inputs, (grad_x, grad))

    functions = {"arimg": lambda: step(ops.gated_residual_norm), "torch": lambda: step(plain)}
    for ours, theirs in zip(functions["arimg"](), functions["torch"]()):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-2)
    # Forward as below; backward reads the sum, y and two gradients and writes two.
    group = f"gated residual + norm + modulate, forward and backward, {shape}"
    measure(group, peer, functions[peer], bytes=10 * x.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_norm(shape, peer, measure):
    x, y = torch.randn(SHAPES[shape]), torch.randn(SHAPES[shape])
    gate, scale, shift = torch.randn(3, x.shape[0], 1, x.shape[2])
    arguments = (x, y, gate, scale, shift)
    for ours, theirs in zip(ops.gated_residual_norm(*arguments), plain(*arguments)):
        assert torch.allclose(ours, theirs, atol=1e-4)
    function = {"arimg": ops.gated_residual_norm, "torch": plain}[peer]
    # x and y are read, the sum and the normed rows are written.
    group = f"gated residual + norm + modulate, {shape}"
    measure(group, peer, lambda: function(*arguments), bytes=4 * x.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gelu(dtype, peer, measure):
    """The MLP of VAR d16 at its last scale with guidance: 512 rows of 4096."""
    x = torch.randn(512, 4096).to(dtype)
    ours, theirs = ops.activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh")
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 2e-2)
    functions = {
        "arimg": lambda: ops.activate(x, "gelu_tanh"),
        "torch": lambda: F.gelu(x, approximate="tanh"),
    }
    group = f"GELU (tanh form), 512 x 4096, {str(dtype).removeprefix('torch.')}"
    measure(group, peer, functions[peer], bytes=2 * x.nbytes)
