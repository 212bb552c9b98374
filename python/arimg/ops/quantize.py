"""Codebook lookup: the nearest code without a distance matrix, and the way back. See docs/ops/quantize.md.

float32, bfloat16 or float16; x and the codebook may differ in dtype; scores are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, StraightThrough, expect_floating, fake, kernels

__all__ = ["lookup", "nearest_code", "quantize"]

METRICS = ("l2", "cosine", "dot")  # in the order of `Metric` in csrc/quantize/contract.h


def nearest_code(x: Tensor, codebook: Tensor, metric: str = "l2", allowed: Tensor | None = None) -> Tensor:
    """Index of the code nearest to each row: x [N, D], codebook [K, D] -> int64 [N].

    metric "l2" minimises |x - e|^2, "cosine" and "dot" maximise the similarity. Equal scores give
    the lowest index, a row with a NaN gives 0, a code with a NaN is never chosen. No gradient. The index of a
    row depends on that row and the codebook alone, whatever N is.
    allowed: the codes to choose from, bool [K], or [B, K] where each N / B rows in turn have a set of their
    own. A row with a NaN then gives the lowest allowed index, one without an allowed code gives -1.
    Raises ValueError or TypeError for shapes, dtypes, devices or a metric that do not fit.
    """
    expect_rows_and_codebook(x, codebook)
    expect_metric(metric)
    if allowed is not None:
        allowed = _allowed_groups(allowed, x, codebook)
    ops = kernels(x.detach(), codebook.detach())
    if ops is None:
        return reference.nearest_code(x, codebook, metric, allowed)
    return ops.nearest_code(
        x.detach().contiguous(), codebook.detach().contiguous(), METRICS.index(metric), allowed
    )


def lookup(indices: Tensor, codebook: Tensor) -> Tensor:
    """Rows of the codebook: indices [...] (int64), codebook [K, D] -> [..., D].

    The gradient of the codebook is the sum of the rows of each index, in row order and in float32, so it is
    the same in every run. Raises IndexError for an index out of range (on a GPU an assertion of the device).
    """
    expect_floating("codebook", codebook)
    if codebook.dim() != 2:
        raise ValueError(f"expected codebook [K, D], got {list(codebook.shape)}")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(
            f"expected indices to be an int64 tensor, got {getattr(indices, 'dtype', type(indices))}"
        )
    if indices.device != codebook.device:
        raise ValueError(f"expected indices on the codebook's device {codebook.device}, got {indices.device}")
    if torch.is_grad_enabled() and codebook.requires_grad and kernels(codebook.detach()) is not None:
        return _Lookup.apply(indices, codebook)
    return F.embedding(indices, codebook)


def quantize(x: Tensor, codebook: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Nearest codes and their indices: x [..., D] -> (z_q [..., D] of x's dtype, indices [...]).

    Straight-through (van den Oord et al. 2017, section 3.2): the gradient of z_q passes to x unchanged, the
    codebook gets none.
    """
    expect_floating("x", x)
    _expect_codebook("codebook", codebook, "x", x)
    D = codebook.shape[1]
    if x.dim() == 0 or x.shape[-1] != D:
        raise ValueError(f"expected x [..., {D}], got {list(x.shape)}")
    indices = nearest_code(x.reshape(-1, D), codebook, metric).reshape(x.shape[:-1])
    z_q = F.embedding(indices, codebook.detach()).to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        z_q = StraightThrough.apply(x, z_q)
    return z_q, indices


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, codebook: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.count = codebook.shape[0]
        return F.embedding(indices, codebook)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (indices,) = ctx.saved_tensors
        ops = kernels(grad.detach())
        assert ops is not None
        rows = grad.detach().reshape(-1, grad.shape[-1]).contiguous()
        return None, ops.lookup_backward(rows, indices.reshape(-1).contiguous(), ctx.count)


def expect_rows_and_codebook(
    x: Tensor, codebook: Tensor, name: str = "x", codebook_name: str = "codebook"
) -> None:
    """Raises unless x is [N, D] and codebook [K, D], both floating and on one device."""
    expect_floating(name, x)
    _expect_codebook(codebook_name, codebook, name, x)
    if x.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(f"expected {name} [N, {codebook.shape[1]}], got {list(x.shape)}")


def expect_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"expected a metric of {', '.join(METRICS)}, got {metric!r}")


def _expect_codebook(name: str, codebook: Tensor, x_name: str, x: Tensor) -> None:
    if not isinstance(codebook, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(codebook).__name__}")
    if codebook.dtype not in FLOATING:
        raise TypeError(f"expected {name} of float32, bfloat16 or float16, got {codebook.dtype}")
    if codebook.dim() != 2 or codebook.numel() == 0:
        raise ValueError(f"expected {name} [K, D] with K, D > 0, got {list(codebook.shape)}")
    if codebook.device != x.device:
        raise ValueError(f"expected {name} on {x_name}'s device {x.device}, got {codebook.device}")


def _allowed_groups(allowed: Tensor, x: Tensor, codebook: Tensor) -> Tensor:
    """Checked, contiguous and [B, K]."""
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        raise TypeError(
            f"expected allowed to be a bool tensor, got {getattr(allowed, 'dtype', type(allowed).__name__)}"
        )
    K = codebook.shape[0]
    if allowed.dim() not in (1, 2) or allowed.shape[-1] != K or allowed.numel() == 0:
        raise ValueError(f"expected allowed [{K}] or [B, {K}], got {list(allowed.shape)}")
    if allowed.device != x.device:
        raise ValueError(f"expected allowed on x's device {x.device}, got {allowed.device}")
    groups = allowed if allowed.dim() == 2 else allowed[None]
    if x.shape[0] % groups.shape[0] != 0:
        raise ValueError(
            f"expected allowed [B, {K}] with B a divisor of the {x.shape[0]} rows, got {list(allowed.shape)}"
        )
    return groups.contiguous()


@fake("nearest_code")
def _nearest_code_fake(x: Tensor, codebook: Tensor, metric: int, allowed: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@fake("lookup_backward")
def _lookup_backward_fake(grad: Tensor, indices: Tensor, count: int) -> Tensor:
    return grad.new_empty(count, grad.shape[1])
