"""Speculative acceptance of continuous tokens: Gaussian last steps, all in log space and float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arimg.reference.sampling import row_seeds, wrap_int64
from arimg.reference.sampling_accept import TEST, words

# Numbers of the Philox draws: the test of try t is _RETRY + t, its noise is _NOISE + t * ceil(d / 4) + i.
_RETRY, _NOISE = 2**30, 2**31


class AcceptedValues(NamedTuple):
    """values [R, n, d], of which the first length [R] of each row are final; tries [R]: redraws."""

    values: Tensor
    length: Tensor
    tries: Tensor


def _uniform(word: Tensor) -> Tensor:
    return (word.double() + 0.5) * 2.0**-32


def _normal(seeds: Tensor, positions: Tensor, tries: int, d: int) -> Tensor:
    """Standard normal numbers [R, tries, d], float64: Box and Muller, two pairs from four words."""
    blocks = -(-d // 4)
    draw = _NOISE + torch.arange(tries * blocks, device=seeds.device)
    u = [_uniform(w) for w in words(seeds[:, None], positions[:, None], draw)]
    pairs = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * a.log()).sqrt(), 2 * math.pi * b
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).reshape(len(seeds), tries, 4 * blocks)[..., :d]


def gaussian_accept(
    x: Tensor,
    p_mean: Tensor,
    p_std: Tensor,
    q_mean: Tensor,
    q_std: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    log_sigma: float | Tensor = 0.0,
    max_tries: int = 64,
) -> AcceptedValues:
    """Test drafts x [R, n, d] ~ N(q_mean, q_std) against N(p_mean, p_std), as `arimg.ops` says."""
    rows, n, d = x.shape
    seeds = row_seeds(seed, rows, x.device)
    first = position.reshape(-1, 1) if isinstance(position, Tensor) else wrap_int64(position)
    positions = (torch.arange(n, device=x.device) + first).expand(rows, n)
    if n == 0:
        zero = torch.zeros(rows, dtype=torch.int64, device=x.device)
        return AcceptedValues(x.clone(), zero, zero.clone())
    pm, ps, qm, qs = (t.double().expand(rows, n, d) for t in (p_mean, p_std, q_mean, q_std))
    usable = ((ps > 0) & (ps < 2.0**128) & (qs > 0) & (qs < 2.0**128)).all(-1)
    sigma = torch.as_tensor(log_sigma, dtype=torch.float64, device=x.device).expand(rows, n)
    constant = torch.where(usable, sigma + (qs.log() - ps.log()).sum(-1), math.nan)

    ratio = constant + 0.5 * (((x.double() - qm) / qs) ** 2 - ((x.double() - pm) / ps) ** 2).sum(-1)
    u = _uniform(words(seeds[:, None], positions, TEST)[0])
    accepted = (u.log() < ratio).long().cumprod(-1).sum(-1)

    # The first rejected token: draws x' from p, accepted with probability max(0, 1 - 1 / ratio(x')).
    # As 1 - u > 1 / ratio, which needs no more than a logarithm.
    at = accepted.clamp(max=n - 1)[:, None]
    spread = at[..., None].expand(-1, -1, d)
    pm, ps, qm, qs = (t.gather(1, spread) for t in (pm, ps, qm, qs))
    where = positions.gather(1, at)[:, 0]
    z = _normal(seeds, where, max_tries, d)
    again = pm + ps * z
    ratio = constant.gather(1, at) + 0.5 * (((again - qm) / qs) ** 2 - z**2).sum(-1)
    draw = _RETRY + torch.arange(max_tries, device=x.device)
    u = _uniform(words(seeds[:, None], where[:, None], draw)[0])
    good = (1 - u).log() > -ratio
    good[:, -1] = True  # the last try stands
    chosen = good.long().argmax(-1)
    new = again.gather(1, chosen[:, None, None].expand(-1, 1, d)).to(x.dtype)
    rejected = accepted < n
    values = x.scatter(1, spread, torch.where(rejected[:, None, None], new, x.gather(1, spread)))
    return AcceptedValues(values, (accepted + 1).clamp(max=n), torch.where(rejected, chosen + 1, 0))
