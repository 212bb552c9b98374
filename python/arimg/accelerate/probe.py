"""Comparing a layer's result with ours before it is replaced: names do not tell what a layer computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from arimg import _library
from arimg.accelerate.decode_step import Slot
from arimg.ops._common import kernels

FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # of a layer asked in vain


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation without gradients and autocast; the modules' modes are given back."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def tokens(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Three tokens [1, 3, C] of the weight's type and a causal mask to add."""
    x = torch.randn(1, 3, channels, generator=torch.Generator().manual_seed(0)).mul(0.05)
    mask = torch.full((3, 3), torch.finfo(weight.dtype).min).triu(1)[None, None]
    return x.to(weight), mask.to(weight)


def empty_slot(x: Tensor, heads: int, dim: int) -> Slot:
    """A cache of its own for the tokens of x [1, L, C]."""
    k = x.new_zeros(1, heads, x.shape[1], dim)
    layer = SimpleNamespace(cumulative_length=torch.tensor(0))
    return Slot(k, torch.zeros_like(k), 0, x.shape[1], layer)


def equal(ours: Tensor, given: Tensor, x: Tensor) -> bool:
    """Whether two results differ by rounding alone, measured by what the layer added to x."""
    added = (given - x).float().norm() + torch.finfo(x.dtype).eps * x.float().norm()
    return float((ours - given).float().norm() / added) < (1e-3 if x.dtype == torch.float32 else 0.05)


def close(ours: Tensor, given: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    if ours.shape != given.shape:
        return False
    error = (ours - given).float().norm() / given.float().norm()
    return float(error) < (1e-3 if given.dtype == torch.float32 else 0.05)


def unsuited_attention(weight: Tensor, config: Any, head_dim: int) -> str:
    """Why attention with such weights is not ours, or nothing."""
    if _library.ops() is None:
        return "the compiled operators did not load"
    if kernels(weight.detach()) is None:
        return f"expected weights where there are kernels, got {weight.device.type}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"expected the attention sdpa or eager, got {config._attn_implementation}"
    if head_dim % 8 or head_dim > 256:
        return f"expected a head dim that is a multiple of 8 up to 256, got {head_dim}"
    return ""
