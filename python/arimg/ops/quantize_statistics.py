"""What a codebook learns from: counts and sums per code, k-means, usage. See docs/ops/quantize.md."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.ops.quantize import nearest_code
from arimg.reference.quantize_statistics import CodeUsage, KMeans, lloyd

__all__ = ["code_statistics", "code_usage", "kmeans"]


def code_statistics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """x [N, D], indices int64 [N] -> (rows per code int64 [K], their sums float32 [K, D]).

    Sums are taken in float32 and in row order, so they are the same in every run. Indices outside [0, K),
    such as -1 for a masked token, are left out. No gradient.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"expected x [N, D] with D > 0, got {list(x.shape)}")
    _expect_indices(indices)
    if indices.device != x.device:
        raise ValueError(f"expected indices on x's device {x.device}, got {indices.device}")
    if indices.shape != x.shape[:1]:
        raise ValueError(f"expected indices [{x.shape[0]}], got {list(indices.shape)}")
    _expect_codes(K)
    ops = kernels(x.detach())
    if ops is None:
        return reference.code_statistics(x, indices, K)
    return ops.code_statistics(x.detach().contiguous(), indices.contiguous(), K)


def code_usage(indices: Tensor, K: int) -> CodeUsage:
    """How much of a codebook is used: int64 indices of any shape -> CodeUsage(fraction, entropy, perplexity).

    The fraction of the K codes that occur, the entropy of their frequencies in nats, and exp(entropy), the
    number of equally likely codes with that entropy. Indices outside [0, K) are left out. Scalars in float32
    on the indices' device, without a host synchronisation.
    """
    _expect_indices(indices)
    _expect_codes(K)
    return reference.code_usage(indices, K)


def kmeans(
    x: Tensor,
    k: int,
    iterations: int = 20,
    *,
    seed: int = 0,
    metric: str = "l2",
    init: Tensor | None = None,
    empty: str = "relocate",
) -> KMeans:
    """Lloyd's algorithm: rows x [N, D] -> KMeans(centres float32 [k, D], counts, error), N >= k.

    Starts from `init` [k, D] or from k different rows drawn by the seed; ends after `iterations` or when no
    row changes its centre. metric "cosine" works on normalised rows and normalises the centres.
    counts: rows per centre at the last update; error: the mean squared distance before each update. The
    final assignment is `nearest_code(x, centres, metric)`.
    empty "relocate": a centre without rows moves to the row that is farthest from its own centre (and not
    alone there), so with k distinct rows none stays empty; "keep": it stays where it is.
    Everything is a function of its arguments: no atomics, no generator state. Synchronises with the host.
    Raises ValueError or TypeError for what does not fit.
    """
    expect_floating("x", x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"expected x [N, D] with D > 0, got {list(x.shape)}")
    if not 1 <= k <= x.shape[0] and (init is None or k < 1):
        raise ValueError(f"expected k of 1 to the number of rows, {x.shape[0]}, got {k}")
    if x.shape[0] == 0 or iterations < 0:
        raise ValueError(f"expected rows and iterations >= 0, got {x.shape[0]} and {iterations}")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"expected a metric of l2, cosine, got {metric!r}")
    if empty not in ("relocate", "keep"):
        raise ValueError(f"expected empty of relocate, keep, got {empty!r}")
    if init is not None and init.shape != (k, x.shape[1]):
        raise ValueError(f"expected init [{k}, {x.shape[1]}], got {list(init.shape)}")
    return lloyd(x, k, iterations, seed, metric, init, empty, nearest_code, code_statistics)


def _expect_indices(indices: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(
            f"expected indices to be an int64 tensor, got {getattr(indices, 'dtype', type(indices))}"
        )


def _expect_codes(K: int) -> None:
    if K < 1:
        raise ValueError(f"expected K >= 1 codes, got {K}")


@fake("code_statistics")
def _code_statistics_fake(x: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return indices.new_empty(count), x.new_empty((count, x.shape[1]), dtype=torch.float32)
