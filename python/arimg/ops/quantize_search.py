"""Searches built on the nearest code: the k nearest, two codebooks under one index, residual depth.

See docs/ops/quantize.md. float32, bfloat16 or float16; x and the codebook may differ in dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, StraightThrough, expect_floating, fake, kernels
from arimg.ops.quantize import (
    METRICS,
    expect_metric,
    expect_rows_and_codebook,
    nearest_code,
)

__all__ = ["MAX_NEAREST", "nearest_code_dual", "nearest_codes", "residual_nearest_code"]

MAX_NEAREST = 128  # as in csrc/quantize/topk.h
MAX_DEPTHS = 64  # as in csrc/quantize/residual.h; more go through the reference


def nearest_codes(x: Tensor, codebook: Tensor, k: int, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The k codes nearest to each row, nearest first: x [N, D], codebook [K, D] -> (values, indices) [N, k].

    values (float32): for "l2" the squared distances, ascending; for "dot" the inner products and for "cosine"
    the cosines, descending. indices (int64): equal values with the lowest index first, the first column is
    `nearest_code`'s. A code whose score is NaN or infinite comes last, in the order of the indices, with the
    value inf (l2) or -inf. 1 <= k <= min(K, 128). No gradient.
    Raises ValueError or TypeError for shapes, dtypes, devices, k or a metric that do not fit.
    """
    expect_rows_and_codebook(x, codebook)
    expect_metric(metric)
    limit = min(codebook.shape[0], MAX_NEAREST)
    if not 1 <= k <= limit:
        raise ValueError(f"expected k in [1, {limit}] (at most K and {MAX_NEAREST}), got {k}")
    ops = kernels(x.detach(), codebook.detach())
    if ops is None:
        return reference.nearest_codes(x, codebook, k, metric)
    values, indices = ops.nearest_codes(
        x.detach().contiguous(), codebook.detach().contiguous(), k, METRICS.index(metric)
    )
    return values, indices


def nearest_code_dual(
    a: Tensor, b: Tensor, codebook_a: Tensor, codebook_b: Tensor, weight: float = 1.0
) -> Tensor:
    """The index j with the least |a - codebook_a[j]|^2 + weight |b - codebook_b[j]|^2, for each row.

    a [N, A], b [N, B], codebook_a [K, A], codebook_b [K, B] -> int64 [N]. One search over the concatenation
    [a, sqrt(weight) b], in float32. Ties and NaN as in `nearest_code`; no gradient.
    Raises ValueError or TypeError for shapes, dtypes, devices or a weight that do not fit.
    """
    expect_rows_and_codebook(a, codebook_a, "a", "codebook_a")
    expect_rows_and_codebook(b, codebook_b, "b", "codebook_b")
    if len(a) != len(b) or len(codebook_a) != len(codebook_b) or a.device != b.device:
        raise ValueError(
            "expected a and b of as many rows, codebook_a and codebook_b of as many codes, one device, got "
            f"{list(a.shape)}, {list(b.shape)}, {list(codebook_a.shape)}, {list(codebook_b.shape)} "
            f"on {a.device} and {b.device}"
        )
    if not 0 <= weight < math.inf:
        raise ValueError(f"expected a finite weight >= 0, got {weight}")
    scale = math.sqrt(weight)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        second = second.detach()
        if scale != 1:
            second = second.float() * scale
        return torch.cat((first.detach().to(second.dtype), second), dim=-1)

    if scale == 1:  # nothing is scaled, so nothing needs to be widened but what differs
        a, b = (t.float() if a.dtype != b.dtype else t for t in (a, b))
        if codebook_a.dtype != codebook_b.dtype:
            codebook_a, codebook_b = codebook_a.float(), codebook_b.float()
    return nearest_code(joined(a, b), joined(codebook_a, codebook_b))


def residual_nearest_code(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Residual quantisation: x [N, D], codebooks [Q, K, D] -> (indices int64 [N, Q], quantized [N, D]).

    Depth q takes the code nearest (l2) to what depths 0..q-1 left over: r_0 = x, r_(q+1) = r_q - c_q, in
    float32. quantized is c_0 + c_1 + ..., added in this order in float32 and rounded once to x's dtype.
    Straight-through: the gradient of quantized passes to x unchanged, the codebooks get none.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("x", x)
    if not isinstance(codebooks, Tensor):
        raise TypeError(f"expected codebooks to be a tensor, got {type(codebooks).__name__}")
    if codebooks.dtype not in FLOATING:
        raise TypeError(f"expected codebooks of float32, bfloat16 or float16, got {codebooks.dtype}")
    if codebooks.dim() != 3 or codebooks.numel() == 0:
        raise ValueError(f"expected codebooks [Q, K, D] with Q, K, D > 0, got {list(codebooks.shape)}")
    expect_rows_and_codebook(x, codebooks[0], codebook_name="codebooks")
    return residual_codes(x, list(codebooks.unbind()))


def residual_codes(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`residual_nearest_code` of codebooks [K, D] that need not lie in one tensor; unchecked."""
    given, books = x.detach(), [book.detach().contiguous() for book in codebooks]
    ops = kernels(given)
    if ops is None or len(books) > MAX_DEPTHS:
        indices, quantized = reference.residual_nearest_code(given, torch.stack(books))
    else:
        indices, quantized = ops.residual_codes(given.contiguous(), books)
    if torch.is_grad_enabled() and x.requires_grad:
        quantized = StraightThrough.apply(x, quantized)
    return indices, quantized


@fake("residual_codes")
def _residual_codes_fake(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], len(codebooks), dtype=torch.int64), torch.empty_like(x)


@fake("nearest_codes")
def _nearest_codes_fake(x: Tensor, codebook: Tensor, k: int, metric: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.float32), x.new_empty(x.shape[0], k, dtype=torch.int64)
