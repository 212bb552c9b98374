"""Speculative acceptance in plain torch: the oracle of `arimg.ops.sampling_accept`, to the last bit.

A law is a row of integer weights with their sum. Masses are weights scaled to a sum of 2^62, so that two laws
compare as integers; every draw is an integer comparison (docs/ops/sampling_accept.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from arimg.reference.sampling import (
    _MASK,
    _philox,
    exponential,
    numbers,
    row_seeds,
    token_weights,
    wrap_int64,
)

# Numbers of the Philox draws at a position. 0 is the token itself (`sample`, redrawn tails, the last token).
TEST, RESIDUAL, COUPLED = 1, 2, 3
TAILS = ("none", "redraw", "couple", "gumbel")


class Law(NamedTuple):
    """What a token is drawn from: int32 weights [..., V] >= 0 and their sums, int64 [...]."""

    weights: Tensor
    total: Tensor


class Accepted(NamedTuple):
    """tokens int64 [R, n + 1], of which the first length [R] of each row are committed."""

    tokens: Tensor
    length: Tensor


def token_law(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
) -> Law:
    """The law that `sample` draws from with these arguments: logits [R, ..., V] -> weights [R, ..., V]."""
    shape = logits.shape[:-1]
    if guidance is not None:
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    tokens = shape[1:].numel()

    def repeated(setting: Any) -> Any:
        """A setting per row as one per token."""
        return setting.reshape(-1).repeat_interleave(tokens) if isinstance(setting, Tensor) else setting

    weights = token_weights(
        logits.reshape(-1, logits.shape[-1]),
        temperature=repeated(temperature),
        top_k=repeated(top_k),
        top_p=repeated(top_p),
        min_p=repeated(min_p),
        guidance=repeated(guidance),
    )
    return Law(weights.int().reshape(*shape, logits.shape[-1]), weights.sum(-1).reshape(shape))


def as_law(x: Law | Tensor) -> Law:
    """A law as it is; logits (-inf: dropped) as the law of their softmax."""
    return token_law(x) if isinstance(x, Tensor) else x


# --- integers ------------------------------------------------------------------------------------------
def law_masses(law: Law) -> Tensor:
    """The weights in units of 2^-62 of their sum, int64 [..., V]."""
    fraction, exponent = torch.frexp(law.total.double())
    factor = (2.0**31 / fraction).floor().clamp(max=2**32 - 1).long()[..., None]
    shift = exponent.long()[..., None] - 31
    return (law.weights.long() * factor >> shift.clamp(min=0)) << (-shift).clamp(min=0)


def words(seeds: Tensor, positions: Tensor, draw: int | Tensor) -> list[Tensor]:
    draws = torch.as_tensor(draw, dtype=torch.int64, device=seeds.device) & _MASK
    seeds, positions, draws = torch.broadcast_tensors(seeds, positions, draws)
    counter = [positions & _MASK, (positions >> 32) & _MASK, draws, torch.zeros_like(positions)]
    return _philox(counter, [seeds & _MASK, (seeds >> 32) & _MASK])


def draw_below(total: Tensor, seeds: Tensor, positions: Tensor, draw: int | Tensor) -> Tensor:
    """floor(total * u) for 0 <= total < 2^63 with u = the first 64 random bits / 2^64, in 32-bit pieces."""
    high, low, *_ = words(seeds, positions, draw)
    above, below = total >> 32, total & _MASK
    # products wrap modulo 2^64, which keeps both halves right
    parts = low * below, low * above, high * below
    middle = ((parts[0] >> 32) & _MASK) + (parts[1] & _MASK) + (parts[2] & _MASK)
    return high * above + ((parts[1] >> 32) & _MASK) + ((parts[2] >> 32) & _MASK) + (middle >> 32)


def draw_from(masses: Tensor, seeds: Tensor, positions: Tensor, draw: int | Tensor) -> Tensor:
    """The first index at which the running sum exceeds draw_below(sum); masses [..., V]. 0 without mass."""
    cumulative = masses.cumsum(-1)
    target = draw_below(cumulative[..., -1], seeds, positions, draw)[..., None]
    index = torch.searchsorted(cumulative, target, right=True)[..., 0]
    return torch.where(cumulative[..., -1] > 0, index, 0)


def shared_noise_draw(law: Law, *, seed: int | Tensor, position: int | Tensor = 0) -> Tensor:
    """Draws [R, N] from laws [R, N, V] by noise that belongs to (seed, position + j, token).

    The index of the smallest E_i / w_i with exponential numbers E_i (the Gumbel trick), as `sample` with
    method="gumbel" takes it: laws that differ a little mostly give the same token.
    """
    rows, n, vocabulary = law.weights.shape
    seeds = row_seeds(seed, rows, law.weights.device)
    noise = exponential(numbers(seeds, position, n, 0, vocabulary))
    return torch.where(law.weights > 0, noise / law.weights.float(), torch.inf).argmin(-1)


# --- acceptance ----------------------------------------------------------------------------------------
class _Window(NamedTuple):
    """Laws and drafts of the positions 0 .. n - 1, with q gathered for each draft."""

    p: Law
    q: Law
    fixed: Tensor  # bool [R, n]: the draft was fixed in advance
    draft: Tensor  # -1: none
    seeds: Tensor  # [R, 1]
    positions: Tensor  # [R, n]


def _q_of_drafts(q: Law | None, q_start: Tensor | None, p: Law, n: int) -> tuple[Law, Tensor]:
    if q is None:
        return Law(p.weights[:, :n], p.total[:, :n]), torch.ones_like(p.total[:, :n], dtype=torch.bool)
    rows, laws = q.total.shape
    at = torch.arange(n, device=q.total.device).expand(rows, n)
    if q_start is not None:
        at = at + q_start.reshape(rows, 1)
    fixed = (at < 0) | (at >= laws)
    if laws == 0:
        return Law(p.weights[:, :n], p.total[:, :n]), fixed
    at = at.masked_fill(fixed, 0)
    weights = q.weights.gather(1, at[..., None].expand(-1, -1, q.weights.shape[-1]))
    return Law(weights, q.total.gather(1, at)), fixed


def _accepts(w: _Window, draw: int | Tensor) -> Tensor:
    token = w.draft.clamp(min=0)[..., None]
    p, q = (law_masses(Law(law.weights.gather(-1, token), law.total))[..., 0] for law in (w.p, w.q))
    p = torch.where(w.fixed, w.p.weights.gather(-1, token)[..., 0].long(), p)
    q = torch.where(w.fixed, w.p.total, q)
    return (draw_below(q, w.seeds, w.positions, draw) < p) & (w.draft >= 0)


def _from_residual(w: _Window, draw: int | Tensor) -> Tensor:
    """Tokens [R, n] that take the place of rejected drafts."""
    p = w.p.weights.long()
    without = p.scatter(-1, w.draft.clamp(min=0)[..., None], 0)
    plain = torch.where((w.draft >= 0)[..., None], without, p)
    residual = (law_masses(w.p) - law_masses(w.q)).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    simple = w.fixed | (w.draft < 0)
    return draw_from(torch.where(simple[..., None], plain, residual), w.seeds, w.positions, draw)


def speculative_accept(
    p: Law | Tensor,
    draft: Tensor,
    q: Law | Tensor | None = None,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    q_start: Tensor | None = None,
    tail: str = "none",
    step: int | Tensor = 0,
    masses: tuple[Tensor, Tensor] | None = None,
) -> Accepted:
    """Test drafts [R, n] against the laws p [R, n + 1, V]: tokens int64 [R, n + 1] and lengths [R].

    Draft j of row r was drawn from q[r, q_start[r] + j] (q_start: 0), or fixed in advance where q holds no
    such law. See `arimg.ops.speculative_accept`.
    """
    p = as_law(p)
    q = None if q is None else as_law(q)
    rows, n = draft.shape
    seeds = row_seeds(seed, rows, draft.device)[:, None]
    first = position.reshape(-1, 1) if isinstance(position, Tensor) else wrap_int64(position)
    positions = torch.arange(n + 1, device=draft.device) + first
    positions = positions.expand(rows, n + 1)
    ours, fixed = _q_of_drafts(q, q_start, p, n)
    valid = (draft >= 0) & (draft < p.weights.shape[-1])
    w = _Window(
        Law(p.weights[:, :n], p.total[:, :n]),
        ours,
        fixed,
        torch.where(valid, draft, -1),
        seeds,
        positions[:, :n],
    )
    accepts = _accepts(w, TEST)
    if masses is not None:
        accepts = (draw_below(masses[1], seeds, w.positions, TEST) < masses[0]) & valid
    accepted = accepts.long().cumprod(-1).sum(-1, keepdim=True)

    fresh = draw_from(p.weights.long(), seeds, positions, 0)
    last = fresh[:, n:]
    if tail == "couple":
        number = COUPLED + 2 * step
        coupled = torch.where(_accepts(w, number), w.draft, _from_residual(w, number + 1))
        rest = torch.cat((torch.where(valid, coupled, fresh[:, :n]), last), 1)
    elif tail == "redraw":
        rest = fresh
    elif tail == "gumbel":
        rest = shared_noise_draw(p, seed=seed, position=position)
    else:
        rest = torch.full_like(fresh, -1)
    at = torch.arange(n + 1, device=draft.device)
    corrected = torch.cat((_from_residual(w, RESIDUAL), last), 1)
    drafts = torch.cat((w.draft, last), 1)
    tokens = torch.where(at < accepted, drafts, torch.where(at == accepted, corrected, rest))
    return Accepted(tokens, accepted[:, 0] + 1)
