"""Norm + modulation and gated residual: one pass against the separate operations of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import ops

SHAPES = {
    "VAR d16, last scale (2 x 256 x 1024)": (2, 256, 1024),
    "past the cache (8 x 2240 x 1024)": (8, 2240, 1024),
}


def plain(x, y, gate, scale, shift):
    x = x + gate * y
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


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
