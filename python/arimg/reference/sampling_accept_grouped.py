"""Grouped acceptance: a draft is tested by the mass of a group of tokens around it.

Compositions of plain torch operations that never wait for the host (but `codebook_groups`, made once).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg.reference.sampling import row_seeds, wrap_int64
from arimg.reference.sampling_accept import (
    RESIDUAL,
    TEST,
    Accepted,
    Law,
    _q_of_drafts,
    draw_below,
    draw_from,
    law_masses,
)

_WITHIN = 2**29  # the Philox draw of a token within its group
_INDEX_BITS = 24


def _masses(p: Law, draft: Tensor, q: Law | None, q_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masses of p and q for each draft, int64 [R, n, V]; q of a draft fixed in advance is one there."""
    n = draft.shape[1]
    ours, fixed = _q_of_drafts(q, q_start, p, n)
    certain = torch.zeros_like(ours.weights).scatter_(2, draft.clamp(min=0)[..., None], 2**30)
    weights = torch.where(fixed[..., None], certain, ours.weights)
    total = torch.where(fixed, 2**30, ours.total)
    return law_masses(Law(p.weights[:, :n], p.total[:, :n])), law_masses(Law(weights, total))


def group_masses(
    p: Law, draft: Tensor, q: Law | None, groups: Tensor, *, q_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Masses of each draft's group: groups int64 [V] numbers the parts of a partition."""
    p_mass, q_mass = _masses(p, draft, q, q_start)
    same = groups == groups[draft.clamp(min=0)][..., None]
    return torch.where(same, p_mass, 0).sum(-1), torch.where(same, q_mass, 0).sum(-1)


def codebook_groups(embedding: Tensor, size: int, *, max_distance: float = math.inf) -> Tensor:
    """Numbers of groups of tokens near to each other, int64 [V]: a partition for `grouped_accept`.

    Again and again the lowest token without a group takes the size - 1 nearest others without one (by squared
    distance, of equals the lowest), as far as they are within max_distance. Once per codebook.
    """
    codes = embedding.detach().double()
    groups = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    left, number = torch.arange(len(codes), device=codes.device), 0
    while len(left) > 0:
        squared = ((codes - codes[0]) ** 2).sum(-1)
        squared[0] = -1  # the leader comes first, whatever equals it
        values, order = squared.sort(stable=True)
        members = order[:size][values[:size] <= max_distance]
        groups[left[members]] = number
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[members] = False
        left, codes, number = left[stays], codes[stays], number + 1
    return groups


def rank_masses(
    p: Law,
    draft: Tensor,
    q: Law | None,
    *,
    ranks: int = 14,
    delta: float = 0.15,
    q_start: Tensor | None = None,
    embedding: Tensor | None = None,
    max_distance: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Masses of the `ranks` neighbours of each draft in the order of p, itself among them.

    Ranks [r - ranks / 2, r + ranks / 2) of the ascending order, without tokens whose p is further than delta
    and, with an embedding [V, D], without those whose squared distance is above max_distance.
    """
    p_mass, q_mass = _masses(p, draft, q, q_start)
    n, vocabulary = draft.shape[1], p.weights.shape[-1]
    index = torch.arange(vocabulary, device=draft.device)
    key = (p.weights[:, :n].long() << _INDEX_BITS) | index  # distinct, in the order of (p, index)
    own = key.gather(2, draft.clamp(min=0)[..., None])
    half = min(ranks // 2, vocabulary)
    beyond = 2**62
    up = torch.where(key >= own, key, beyond).topk(half, dim=-1, largest=False).values
    down = torch.where(key < own, key, -1).topk(half, dim=-1).values
    near = torch.cat((up, down), -1)
    valid = (near >= 0) & (near < beyond)
    token = torch.where(valid, near & (2**_INDEX_BITS - 1), 0)
    p_near, q_near = p_mass.gather(2, token), q_mass.gather(2, token)
    at = p_mass.gather(2, draft.clamp(min=0)[..., None])
    valid &= (p_near - at).abs() <= int(delta * 2**62)
    if embedding is not None:
        own_vector = embedding[draft.clamp(min=0)][:, :, None].double()
        squared = ((own_vector - embedding[token].double()) ** 2).sum(-1)
        valid &= (squared <= max_distance) | (token == draft[..., None])
    return torch.where(valid, p_near, 0).sum(-1), torch.where(valid, q_near, 0).sum(-1)


def grouped_accept(
    p: Law,
    draft: Tensor,
    q: Law | None,
    groups: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    q_start: Tensor | None = None,
) -> Accepted:
    """Test by the groups of a partition, and draw each token within its group again, which makes it exact."""
    rows, n = draft.shape
    vocabulary = p.weights.shape[-1]
    device = draft.device
    valid = (draft >= 0) & (draft < vocabulary)
    draft = torch.where(valid, draft, 0)
    seeds = row_seeds(seed, rows, device)[:, None]
    first = position.reshape(-1, 1) if isinstance(position, Tensor) else wrap_int64(position)
    positions = (torch.arange(n + 1, device=device) + first).expand(rows, n + 1)
    p_group, q_group = group_masses(p, draft, q, groups, q_start=q_start)
    passes = (draw_below(q_group, seeds, positions[:, :n], TEST) < p_group) & valid

    # The group of a rejected draft's successor, from max(0, p - q) of all groups.
    p_mass, q_mass = _masses(p, draft, q, q_start)
    q_mass = torch.where(valid[..., None], q_mass, 0)
    parts = groups.expand(rows, n, vocabulary)
    residual = torch.zeros_like(p_mass).scatter_add_(2, parts, p_mass - q_mass).clamp(min=0)
    other = draw_from(residual, seeds, positions[:, :n], RESIDUAL)

    group = torch.where(passes, groups[draft], other)
    inside = torch.where(groups == group[..., None], p.weights[:, :n].long(), 0)
    inside = torch.where(inside.sum(-1, keepdim=True) > 0, inside, p.weights[:, :n].long())
    token = draw_from(inside, seeds, positions[:, :n], _WITHIN)
    kept = (passes & (token == draft)).long().cumprod(-1).sum(-1, keepdim=True)
    last = draw_from(p.weights[:, n].long(), seeds[:, 0], positions[:, n], 0)[:, None]
    tokens = torch.cat((token, last), 1)
    return Accepted(torch.where(torch.arange(n + 1, device=device) <= kept, tokens, -1), kept[:, 0] + 1)
