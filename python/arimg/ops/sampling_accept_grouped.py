"""Grouped speculative acceptance, as published and exact (docs/ops/sampling_accept.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.ops._sampling_rows import expect as _expect
from arimg.ops.sampling_accept import (
    _as_law,
    _check_like_p,
    _check_numbers,
    _check_rows,
    _check_window,
    speculative_accept,
)
from arimg.reference.sampling_accept import Accepted, Law

__all__ = ["codebook_groups", "grouped_accept"]


def grouped_accept(
    p: Law | Tensor,
    draft: Tensor,
    q: Law | Tensor | None,
    groups: Tensor | None = None,
    *,
    published: bool,
    seed: int | Tensor,
    position: int | Tensor = 0,
    q_start: Tensor | None = None,
    tail: str = "none",
    step: int | Tensor = 0,
    ranks: int = 14,
    delta: float = 0.15,
    embedding: Tensor | None = None,
    max_distance: float = 0.5,
) -> Accepted:
    """Test drafts by groups C of tokens: accept with probability min(1, p(C) / q(C)), which accepts more.

    published=True: an accepted draft stays, a rejected one is replaced from max(0, p - q) of tokens. The
    output law is NOT that of p. groups int64 [V] (values in [0, V)) numbers the parts of a partition
    (`codebook_groups` makes one of tokens near to each other); None: C is the window of `ranks` (up to 1024)
    neighbours of the draft in the ascending order of p, without tokens whose p differs by more than delta
    and, with an embedding [V, D], without those at a squared distance above max_distance.
    published=False: exact. Needs a partition; an accepted draft is drawn again within its group from p, a
    rejected one from the group residual. A token that has changed ends what is committed, for the drafts
    behind it were drawn after another one; no tail.
    Everything else is as in `speculative_accept`.
    """
    p = _as_law("p", p)
    _check_window(p, draft)
    if q is not None:
        q = _as_law("q", q)
        _check_like_p(q, p)
    if q_start is not None:
        _check_rows("q_start", q_start, draft.shape[0], p)
    if groups is not None:
        _check_rows("groups", groups, p.weights.shape[2], p)
    _check_ranks(ranks, delta, embedding, max_distance, groups, p)
    if not published:
        _expect(groups is not None, "groups [V], a partition, for the exact rule", groups)
        _expect(tail == "none", "tail none for the exact rule", tail)
        _check_numbers(seed, position, p)
        assert groups is not None
        return reference.grouped_accept(p, draft, q, groups, seed=seed, position=position, q_start=q_start)
    masses = _masses(p, draft, q, groups, q_start, ranks, delta, embedding, max_distance)
    return speculative_accept(
        p, draft, q, seed=seed, position=position, q_start=q_start, tail=tail, step=step, masses=masses
    )


def codebook_groups(embedding: Tensor, size: int, *, max_distance: float = math.inf) -> Tensor:
    """Numbers of groups of tokens near to each other, int64 [V]: a partition for `grouped_accept`.

    Again and again the lowest token without a group takes the size - 1 nearest others without one (by squared
    distance of the embedding's rows [V, D], of equals the lowest), as far as they are within max_distance.
    Computed once per codebook: a loop over the groups, in plain torch and float64.
    """
    expect_floating("embedding", embedding)
    _expect(embedding.dim() == 2, "an embedding [V, D]", list(embedding.shape))
    _expect(size >= 1, "size >= 1", size)
    _expect(max_distance >= 0, "max_distance >= 0", max_distance)
    return reference.codebook_groups(embedding, size, max_distance=max_distance)


def _masses(
    p: Law,
    draft: Tensor,
    q: Law | None,
    groups: Tensor | None,
    q_start: Tensor | None,
    ranks: int,
    delta: float,
    embedding: Tensor | None,
    max_distance: float,
) -> tuple[Tensor, Tensor]:
    ops = kernels(p.weights)
    if ops is None:
        inside = torch.where((draft >= 0) & (draft < p.weights.shape[2]), draft, 0)
        if groups is not None:
            return reference.group_masses(p, inside, q, groups, q_start=q_start)
        return reference.rank_masses(
            p,
            inside,
            q,
            ranks=ranks,
            delta=delta,
            q_start=q_start,
            embedding=embedding,
            max_distance=max_distance,
        )
    masses: tuple[Tensor, Tensor] = ops.group_masses(
        p.weights.contiguous(),
        p.total.contiguous(),
        draft.contiguous(),
        None if q is None else q.weights.contiguous(),
        None if q is None else q.total.contiguous(),
        None if q_start is None else q_start.contiguous(),
        None if groups is None else groups.int().contiguous(),
        ranks // 2,
        int(delta * 2**62),
        None if embedding is None else embedding.detach().contiguous(),
        max_distance,
    )
    return masses


def _check_ranks(
    ranks: int,
    delta: float,
    embedding: Tensor | None,
    max_distance: float,
    groups: Tensor | None,
    p: Law,
) -> None:
    _expect(2 <= ranks <= 1024 and ranks % 2 == 0, "an even number of ranks in [2, 1024]", ranks)
    _expect(0.0 <= delta <= 1.0, "delta in [0, 1]", delta)
    _expect(max_distance >= 0, "max_distance >= 0", max_distance)
    if embedding is None:
        return
    expect_floating("embedding", embedding)
    _expect(groups is None, "an embedding or groups, not both", "both")
    fits = embedding.dim() == 2 and embedding.shape[0] == p.weights.shape[2]
    _expect(fits, f"an embedding [{p.weights.shape[2]}, D]", list(embedding.shape))
    _expect(
        embedding.device == p.weights.device, f"embedding on p's device {p.weights.device}", embedding.device
    )


@fake("group_masses")
def _group_masses_fake(p: Tensor, p_total: Tensor, draft: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return draft.new_empty(draft.shape), draft.new_empty(draft.shape)
