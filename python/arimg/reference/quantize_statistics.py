"""What a codebook learns from, in plain torch: the oracle of `arimg.ops.quantize_statistics`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide
from arimg.reference.quantize import nearest_code
from arimg.reference.sampling import philox_uniform

_ROWS_PER_BLOCK = 65536  # bounds the copies of centres to this many rows

Nearest = Callable[[Tensor, Tensor, str], Tensor]
Statistics = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class CodeUsage(NamedTuple):
    """Of K codes the fraction that occurs, the entropy of their frequencies in nats, and its exponential."""

    fraction: Tensor
    entropy: Tensor
    perplexity: Tensor


class KMeans(NamedTuple):
    """Centres [k, D], rows per centre int64 [k], and the mean squared distance before each update."""

    centres: Tensor
    counts: Tensor
    error: Tensor


def code_statistics(x: Tensor, indices: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """x [N, D], indices int64 [N] -> (rows per code int64 [K], their sums [K, D] in float32).

    Indices outside [0, K) are left out.
    """
    x, indices = wide(x.detach()), indices.detach()
    valid = (indices >= 0) & (indices < K)
    x, indices = x[valid], indices[valid]
    counts = torch.zeros(K, dtype=torch.int64, device=x.device)
    counts.index_add_(0, indices, torch.ones_like(indices))
    return counts, x.new_zeros(K, x.shape[1]).index_add_(0, indices, x)


def code_usage(indices: Tensor, K: int) -> CodeUsage:
    """How much of a codebook int64 indices of any shape use; those outside [0, K) are left out."""
    flat = indices.reshape(-1)
    valid = (flat >= 0) & (flat < K)
    counts = torch.zeros(K, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, torch.where(valid, flat, 0), valid.long())
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(p, p).sum()
    return CodeUsage((counts > 0).double().mean().float(), entropy.float(), entropy.exp().float())


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
    """Lloyd's algorithm on the rows of x [N, D]: see `arimg.ops.kmeans`."""
    return lloyd(x, k, iterations, seed, metric, init, empty, nearest_code, code_statistics)


def lloyd(
    x: Tensor,
    k: int,
    iterations: int,
    seed: int,
    metric: str,
    init: Tensor | None,
    empty: str,
    nearest: Nearest,
    statistics: Statistics,
) -> KMeans:
    """The algorithm, with whatever finds the nearest centre and adds up rows."""
    x = x.detach()
    if metric == "cosine":
        x = F.normalize(wide(x), dim=-1)
    if init is None:
        draw = philox_uniform(seed, 0, len(x))[0]
        init = x[draw.argsort(stable=True)[:k].to(x.device)]
    centres = wide(init.detach()).clone()
    counts = torch.zeros(k, dtype=torch.int64, device=x.device)
    errors: list[Tensor] = []
    before: Tensor | None = None
    for _ in range(iterations):
        indices = nearest(x, centres, metric)
        distance = squared_distance(x, centres, indices)
        errors.append(distance.double().mean())
        if before is not None and torch.equal(indices, before):
            break
        before = indices
        counts, sums = statistics(x, indices, k)
        if empty == "relocate":
            counts, sums = fill_empty(x, indices, distance, counts, sums)
        means = sums / counts.clamp(min=1)[:, None]
        if metric == "cosine":
            means = F.normalize(means, dim=-1)
        centres = torch.where((counts > 0)[:, None], means, centres)
    return KMeans(centres, counts, torch.stack(errors) if errors else x.new_zeros(0, dtype=torch.float64))


def squared_distance(x: Tensor, centres: Tensor, indices: Tensor) -> Tensor:
    """|x - its centre|^2 per row, in float32."""
    blocks = zip(x.split(_ROWS_PER_BLOCK), indices.split(_ROWS_PER_BLOCK))
    return torch.cat([(wide(rows) - centres[index]).square().sum(-1) for rows, index in blocks])


def fill_empty(
    x: Tensor, indices: Tensor, distance: Tensor, counts: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each empty cluster the row farthest from its own centre that is not alone there.

    Rows are taken by falling distance, of equals the first; a row at its centre stays, so with fewer distinct
    rows than clusters some remain empty.
    """
    free = (counts == 0).nonzero()[:, 0].tolist()
    if not free:
        return counts, sums
    left = counts.tolist()
    order = distance.nan_to_num(0).argsort(descending=True, stable=True)
    homes, apart = indices[order].tolist(), (distance[order] > 0).tolist()
    taken: list[int] = []
    for i, home in enumerate(homes):
        if len(taken) == len(free) or not apart[i]:
            break
        if left[home] > 1:
            left[home] -= 1
            taken.append(i)
    moved = order[taken] if taken else order[:0]
    to = torch.tensor(free[: len(taken)], dtype=torch.int64, device=x.device)
    rows = wide(x[moved])
    counts, sums = counts.clone(), sums.clone()
    counts.index_add_(0, indices[moved], -torch.ones_like(to))
    sums.index_add_(0, indices[moved], -rows)
    counts[to] = 1
    sums[to] = rows
    return counts, sums
