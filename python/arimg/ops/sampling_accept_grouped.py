"""Grouped speculative acceptance, as published and exact (docs/ops/sampling_accept.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg import reference
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

__all__ = ["grouped_accept"]


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
) -> Accepted:
    """Test drafts by groups C of tokens: accept with probability min(1, p(C) / q(C)), which accepts more.

    published=True: an accepted draft stays, a rejected one is replaced from max(0, p - q) of tokens. The
    output law is NOT that of p. groups int64 [V] (values in [0, V)) numbers the parts of a partition; None: C
    is the window of `ranks` neighbours of the draft in the ascending order of p, without tokens whose p
    differs by more than delta.
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
    _expect(ranks >= 2 and ranks % 2 == 0, "an even number of ranks >= 2", ranks)
    _expect(0.0 <= delta <= 1.0, "delta in [0, 1]", delta)
    if not published:
        _expect(groups is not None, "groups [V], a partition, for the exact rule", groups)
        _expect(tail == "none", "tail none for the exact rule", tail)
        _check_numbers("seed", seed, (draft.shape[0],), p)
        _check_numbers("position", position, (draft.shape[0], 1), p)
        assert groups is not None
        return reference.grouped_accept(p, draft, q, groups, seed=seed, position=position, q_start=q_start)
    inside = torch.where((draft >= 0) & (draft < p.weights.shape[2]), draft, 0)
    if groups is not None:
        masses = reference.group_masses(p, inside, q, groups, q_start=q_start)
    else:
        masses = reference.rank_masses(p, inside, q, ranks=ranks, delta=delta, q_start=q_start)
    return speculative_accept(
        p, draft, q, seed=seed, position=position, q_start=q_start, tail=tail, step=step, masses=masses
    )
