"""Speculative acceptance: what a window of drafts commits, so that the output has exactly the target's law.

See docs/ops/sampling_accept.md for the definitions and docs/random-numbers.md for the random numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.ops._sampling_rows import (
    MAX_VOCABULARY,
    check_filters,
    check_guidance,
    check_integers,
    number,
    tensor,
)
from arimg.ops._sampling_rows import expect as _expect
from arimg.reference.sampling import wrap_int64
from arimg.reference.sampling_accept import TAILS, Accepted, Law

__all__ = ["Accepted", "Law", "speculative_accept", "token_law"]


def token_law(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
) -> Law:
    """The law that `sample` draws from with these arguments, as integer weights and their sum.

    logits [R, ..., V] -> weights int32 [R, ..., V], total int64 [R, ...]; with guidance 2R leading rows, the
    conditional ones first. The largest weight is 2^30, a dropped token has 0. Arguments and limits are those
    of `sample`, tensors [R] of one setting per row included.
    """
    expect_floating("logits", logits)
    _expect(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits [..., V] with V >= 1", list(logits.shape))
    _expect(logits.shape[-1] <= MAX_VOCABULARY, f"at most {MAX_VOCABULARY} logits per row", logits.shape[-1])
    shape = logits.shape[:-1]
    if guidance is not None:
        fits = logits.dim() >= 2 and logits.shape[0] % 2 == 0
        _expect(fits, "logits [2R, ..., V] with guidance", list(logits.shape))
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    rows = shape[0] if shape else 1
    check_guidance(guidance, logits, rows)
    check_filters(temperature, top_k, top_p, min_p, rows, logits)
    logits = logits.detach()  # a draw has no gradient
    ops = kernels(logits)
    if ops is None:
        return reference.token_law(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance
        )
    leading = rows * (1 if guidance is None else 2)
    weights, total = ops.token_law(
        logits.reshape(leading, math.prod(shape[1:]), logits.shape[-1]).contiguous(),
        number(temperature, 1.0),
        0 if isinstance(top_k, Tensor) else top_k,
        number(top_p, 1.0),
        number(min_p, 0.0),
        guidance if isinstance(guidance, (int, float)) else None,
        *(tensor(x) for x in (guidance, temperature, top_k, top_p, min_p)),
    )
    return Law(weights.reshape(*shape, logits.shape[-1]), total.reshape(shape))


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
    """Test a window of drafts against the target's laws; each row commits by itself, and exactly.

    p: laws [R, n + 1, V] of the positions position + j (from `token_law`, or logits with -inf for dropped
    tokens); draft: int64 [R, n], below 0 where there is none. Draft j is accepted with probability
    min(1, p_j(d) / q_j(d)), from left to right; the first rejected one is replaced by a draw from
    max(0, p_j - q_j) normalised; when all are accepted, one more token is drawn from p_n as `sample` does.
    The first `length` tokens of a row (1 to n + 1) are final: they have the law of plain sampling from p.

    q: laws [R, m, V] that the drafts were drawn from; draft j of row r from law q_start[r] + j (int64 [R],
    default 0). A draft without such a law (also q=None) was fixed in advance without looking at p: q(d) = 1.
    So Jacobi decoding passes the p and the length of the call before as q and q_start, and new drafts of any
    origin at the end of the window.
    tail: the tokens behind `length`. "none": -1. "redraw": drawn from p_j as `sample` does. "couple": drawn
    from p_j so that a draft stays the same as often as possible; `step` must differ from call to call.
    "gumbel": drawn from p_j by noise that belongs to the position and the token, the same in every call: the
    token that `sample` draws there with method="gumbel".
    masses: (p, q) int64 [R, n] in units of 2^-62, which the tests compare instead of the drafts' own
    (grouped acceptance; not exact).
    seed: int (row r uses seed + r) or int64 [R]; position: int, or int64 [1] or [R]; step: int or int64 [1].

    Returns (tokens int64 [R, n + 1], length int64 [R]). No gradient, no synchronisation with the host.
    """
    p = _as_law("p", p)
    _check_window(p, draft)
    rows, n = draft.shape
    if q is not None:
        q = _as_law("q", q)
        _check_like_p(q, p)
    if q_start is not None:
        _check_rows("q_start", q_start, rows, p)
    if masses is not None:
        for mass in masses:
            _check_rows("masses", mass, rows * n, p)
    _check_numbers(seed, position, p)
    check_integers("step", step, 1, p.weights)
    _expect(tail in TAILS, f"tail to be one of {', '.join(TAILS)}", tail)
    ops = kernels(p.weights)
    if ops is None:
        return reference.speculative_accept(
            p,
            draft,
            q,
            seed=seed,
            position=position,
            q_start=q_start,
            tail=tail,
            step=step,
            masses=masses,
        )
    tokens, length = ops.speculative_accept(
        p.weights.contiguous(),
        p.total.contiguous(),
        draft.contiguous(),
        None if q is None else q.weights.contiguous(),
        None if q is None else q.total.contiguous(),
        None if q_start is None else q_start.contiguous(),
        None if masses is None else masses[0].contiguous(),
        None if masses is None else masses[1].contiguous(),
        seed.contiguous() if isinstance(seed, Tensor) else None,
        0 if isinstance(seed, Tensor) else wrap_int64(seed),
        position.contiguous() if isinstance(position, Tensor) else None,
        0 if isinstance(position, Tensor) else wrap_int64(position),
        step.contiguous() if isinstance(step, Tensor) else None,
        0 if isinstance(step, Tensor) else step,
        TAILS.index(tail),
    )
    return Accepted(tokens, length)


# --- checks --------------------------------------------------------------------------------------------
def _as_law(name: str, x: Law | Tensor) -> Law:
    if isinstance(x, Tensor) and x.is_floating_point():
        return token_law(x)
    if not isinstance(x, tuple) or len(x) != 2:
        raise TypeError(f"expected {name} to be a Law or logits, got {_name(x)}")
    weights, total = x
    if weights.dtype != torch.int32 or total.dtype != torch.int64:
        raise TypeError(
            f"expected {name} of int32 weights and int64 totals, got {weights.dtype} and {total.dtype}"
        )
    if weights.dim() < 1 or total.shape != weights.shape[:-1]:
        raise ValueError(
            f"expected {name} with weights [..., V] and totals [...], got {list(weights.shape)} and "
            f"{list(total.shape)}"
        )
    _expect(total.device == weights.device, f"{name}'s totals on {weights.device}", total.device)
    return Law(weights, total)


def _name(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _check_window(p: Law, draft: Tensor) -> None:
    shape = p.weights.shape
    if len(shape) != 3 or shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"expected p [R, n + 1, V] with V >= 1, got {list(shape)}")
    _expect(shape[2] <= MAX_VOCABULARY, f"at most {MAX_VOCABULARY} weights per law", shape[2])
    if not isinstance(draft, Tensor) or draft.dtype != torch.int64:
        raise TypeError(f"expected draft of torch.int64, got {_name(draft)}")
    if draft.dim() != 2 or draft.shape[0] != shape[0] or draft.shape[1] != shape[1] - 1:
        raise ValueError(f"expected draft [{shape[0]}, {shape[1] - 1}] for p, got {list(draft.shape)}")
    _expect(draft.device == p.weights.device, f"draft on p's device {p.weights.device}", draft.device)


def _check_like_p(q: Law, p: Law) -> None:
    rows, _, vocabulary = p.weights.shape
    shape = q.weights.shape
    if len(shape) != 3 or shape[0] != rows or shape[2] != vocabulary:
        raise ValueError(f"expected q [{rows}, m, {vocabulary}], got {list(shape)}")
    _expect(q.weights.device == p.weights.device, f"q on p's device {p.weights.device}", q.weights.device)


def _check_rows(name: str, x: Tensor, count: int, p: Law) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"expected {name} of torch.int64, got {_name(x)}")
    _expect(x.device == p.weights.device, f"{name} on p's device {p.weights.device}", x.device)
    if x.numel() != count:
        raise ValueError(f"expected {name} with {count} elements, got {list(x.shape)}")


def _check_numbers(seed: int | Tensor, position: int | Tensor, p: Law) -> None:
    rows = p.weights.shape[0]
    check_integers("seed", seed, rows, p.weights)
    one = isinstance(position, Tensor) and position.numel() == 1
    check_integers("position", position, 1 if one else rows, p.weights)


# --- shapes --------------------------------------------------------------------------------------------
@fake("token_law")
def _token_law_fake(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    guidance: float | None,
    guidances: Tensor | None,
    *per_row: Tensor | None,
) -> tuple[Tensor, Tensor]:
    guided = guidance is not None or guidances is not None
    shape = (logits.shape[0] // 2 if guided else logits.shape[0], logits.shape[1])
    weights = logits.new_empty((*shape, logits.shape[2]), dtype=torch.int32)
    return weights, logits.new_empty(shape, dtype=torch.int64)


@fake("speculative_accept")
def _speculative_accept_fake(
    p: Tensor, p_total: Tensor, draft: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    rows, laws = p_total.shape
    return draft.new_empty((rows, laws)), draft.new_empty((rows,))
