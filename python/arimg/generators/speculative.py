"""Commit rules that guess tokens ahead and let one pass of the backbone check them all.

    tokens = final_tokens(generate(model, labels, commit=Jacobi(15), seed=0))[0]     # int64 [B, T]

A turn looks at the last token of each row and at `window` drafts behind it. `ops.speculative_accept` (or
`ops.grouped_accept`) says how many tokens each row keeps: at least one, and every row by itself, never as
many as the slowest row of the batch, which would change the law. Guidance, temperature and filters are inside
the laws that are compared. The random numbers of a token belong to its place in its own sequence, so a seed
gives the same tokens in any batch, and without drafts those of plain sampling.

`BiasedGrouped` alone does not keep the law of plain sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from arimg import ops
from arimg.generators.loop import Model, Run, Session, Turn

__all__ = ["BiasedGrouped", "Draft", "Grouped", "Jacobi", "Window"]

START_DRAW = 2**32 - 3  # the draw of docs/random-numbers.md that fresh drafts take
Tail = Literal["redraw", "couple", "gumbel"]
Start = Literal["random", "last"]


@dataclass(eq=False)
class Window(Turn):
    """A turn with drafts.

    depth: int64 [B], tokens that each row has before it. before: laws that the drafts were drawn from, draft
    j of row r from number from_law[r] + j, or fixed in advance where there is none. law: the target's laws of
    this turn.
    """

    depth: Tensor | None = None
    before: ops.Law | None = None
    from_law: Tensor | None = None
    law: ops.Law | None = None

    @property
    def place(self) -> Tensor:
        assert self.depth is not None
        return self.depth


class _Windows(ABC):
    """The turns of all rules that check drafts; subclasses say where drafts come from, and test them."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"expected a window of 0 or more drafts, got {self.window}")

    def turns(self, run: Run) -> Iterator[Turn]:
        guidance = _expect_steady(run)
        session = run.session
        tokens = len(session.layout)
        depth = torch.zeros(session.rows, dtype=torch.int64, device=run.seeds.device)
        source = self._drafts(run, guidance)
        last: Window | None = None
        number = 0
        while last is None or not last.done:
            step = min(int(depth.min()), tokens - 1)
            turn = Window(run, step, step, (1, 1), number, step, guidance, depth=depth)
            source.propose(turn, last)
            yield turn
            assert turn.length is not None
            depth, last, number = depth + turn.length, turn, number + 1

    def settle(self, turn: Turn) -> None:
        assert isinstance(turn, Window)
        run = turn.run
        turn.law = ops.token_law(turn.logits, **run.sampler.settings(turn))
        found = self._test(turn, turn.law)
        left = len(run.session.layout) - turn.place
        turn.tokens, turn.length = found.tokens, found.length.minimum(left)
        at = torch.arange(found.tokens.shape[1], device=left.device)
        turn.final = at < turn.length[:, None]
        turn.done = bool((turn.length == left).all())

    @abstractmethod
    def _drafts(self, run: Run, guidance: float | None) -> _Source:
        """Where the drafts of a generation come from."""

    @abstractmethod
    def _test(self, turn: Window, law: ops.Law) -> ops.Accepted:
        """What the drafts of a turn, and the tokens behind them, become."""


class _Source(Protocol):
    def propose(self, turn: Window, last: Window | None) -> None:
        """Sets the drafts of a turn and the laws that they come from; last: the turn before."""
        ...


# --- drafts from the pass before ---------------------------------------------------------------------------
class _FromPassBefore(_Windows):
    start: Start

    def to(self, device: torch.device) -> _FromPassBefore:
        """The rule with its tensors on a device; `generate` asks for it once, for that of its session."""
        held = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **held) if held else self  # type: ignore[type-var]

    def _drafts(self, run: Run, guidance: float | None) -> _Source:
        return _Tails(self.window, self.start)


@dataclass(frozen=True)
class Jacobi(_FromPassBefore):
    """Exact speculative Jacobi decoding (Lumina-mGPT 2.0; SCD with coupled tails, arXiv 2510.24211).

    The drafts are the tokens that the pass before proposed behind those that it kept. tail: how it draws them
    from its own laws: "redraw" as plain sampling, "couple" so that a draft stays as often as possible,
    "gumbel" by noise that belongs to place and token. start: fresh drafts at the end of the window, uniform
    at random, or the token that stands before them. window: how many drafts; 0 is plain sampling.
    """

    window: int = 15
    tail: Tail = "redraw"
    start: Start = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("tail", self.tail, ("redraw", "couple", "gumbel")),
            ("start", self.start, ("random", "last")),
        ):
            if value not in known:
                raise ValueError(f"expected a {name} of {known}, got {value!r}")

    def _test(self, turn: Window, law: ops.Law) -> ops.Accepted:
        return ops.speculative_accept(law, tail=self.tail, step=turn.number, **_tested(turn))


@dataclass(frozen=True)
class Grouped(_FromPassBefore):
    """Grouped speculative decoding (arXiv 2508.07747) made exact: drafts are tested by their groups' mass.

    groups: int64 [V], a partition of the vocabulary (`ops.codebook_groups`). A token that is accepted with
    its group is drawn again within it; if it changes, what stands behind it is drafted anew.
    """

    window: int
    groups: Tensor
    start: Start = "random"

    def _test(self, turn: Window, law: ops.Law) -> ops.Accepted:
        found = ops.grouped_accept(law, groups=self.groups, published=False, **_tested(turn))
        at = torch.arange(found.tokens.shape[1], device=found.tokens.device)
        drawn = _draw(law, turn.run.seeds, turn.place)
        return ops.Accepted(torch.where(at < found.length[:, None], found.tokens, drawn), found.length)


@dataclass(frozen=True)
class BiasedGrouped(_FromPassBefore):
    """Grouped speculative decoding as published: faster, and NOT with the law of plain sampling.

    groups: a partition int64 [V], or None for the window of `ranks` neighbours in the order of probability
    (`ops.grouped_accept` describes ranks, delta, embedding and max_distance).
    """

    window: int = 15
    groups: Tensor | None = None
    ranks: int = 14
    delta: float = 0.15
    embedding: Tensor | None = None
    max_distance: float = 0.5
    start: Start = "random"

    def _test(self, turn: Window, law: ops.Law) -> ops.Accepted:
        names = ("groups", "ranks", "delta", "embedding", "max_distance")
        how: dict[str, Any] = {n: getattr(self, n) for n in names}
        return ops.grouped_accept(
            law, published=True, tail="redraw", step=turn.number, **how, **_tested(turn)
        )


@dataclass
class _Tails:
    """What the turn before left behind its final tokens, then fresh drafts."""

    window: int
    start: Start

    def propose(self, turn: Window, last: Window | None) -> None:
        run, depth = turn.run, turn.place
        at = torch.arange(self.window, device=depth.device)
        fresh = self._fresh(run, depth, last)
        if last is None:
            turn.drafts = fresh
            return
        assert last.length is not None
        behind = last.length[:, None] + at
        kept = last.drawn.shape[1]
        old = last.drawn.gather(1, behind.clamp(max=kept - 1))
        turn.drafts = torch.where(behind < kept, old, fresh)
        turn.before, turn.from_law = last.law, last.length

    def _fresh(self, run: Run, depth: Tensor, last: Window | None) -> Tensor:
        if self.start == "last" and last is not None:
            return last.drawn[:, -1:].expand(-1, self.window)
        rows, vocabulary = len(depth), run.session.vocabulary
        tokens = len(run.session.layout) + self.window
        u = ops.philox_uniform(run.seeds, 0, tokens, draw=START_DRAW)
        at = depth[:, None] + torch.arange(self.window, device=depth.device)
        return (u.gather(1, at) * vocabulary).long().clamp(max=vocabulary - 1).view(rows, self.window)


# --- drafts from a second model ----------------------------------------------------------------------------
class Rewinding(Protocol):
    """A session whose rows can forget: `LlamaSession`."""

    def rewind(self, counts: Sequence[int], last: Tensor) -> None: ...


@dataclass(frozen=True)
class Draft(_Windows):
    """A smaller model writes `window` tokens one by one, the target checks them in one pass. Exact.

    model: over the same vocabulary and conditions, with sessions that rewind. It draws with the guidance and
    filters of the target.
    """

    model: Model
    window: int = 4

    def _drafts(self, run: Run, guidance: float | None) -> _Source:
        with torch.no_grad():
            session = self.model.begin(run.condition, guided=guidance is not None, window=self.window + 1)
        if session.device != run.session.device:
            raise ValueError(f"expected a draft model on {run.session.device}, got one on {session.device}")
        if session.vocabulary != run.session.vocabulary:
            raise ValueError(
                f"expected a draft model with {run.session.vocabulary} tokens, got {session.vocabulary}"
            )
        return _Written(session, self.window)

    def _test(self, turn: Window, law: ops.Law) -> ops.Accepted:
        return ops.speculative_accept(law, **_tested(turn))


@dataclass
class _Written:
    """Drafts that the session of a second model writes; it forgets those that were not kept."""

    session: Any
    window: int

    @torch.no_grad()
    def propose(self, turn: Window, last: Window | None) -> None:
        if last is not None:
            self._catch_up(last)
        drafts: list[Tensor] = []
        laws: list[ops.Law] = []
        for j in range(self.window):
            mine = self._pass(turn)
            law = ops.token_law(mine.logits, **turn.run.sampler.settings(mine))
            mine.tokens = _draw(law, turn.run.seeds, turn.place + j)
            self.session.feed(mine)
            drafts.append(mine.tokens)
            laws.append(law)
        if not drafts:
            turn.drafts = turn.place.new_empty(len(turn.place), 0)
            return
        turn.drafts = torch.cat(drafts, 1)
        turn.before = ops.Law(*(torch.cat(parts, 1) for parts in zip(*laws, strict=True)))

    def _pass(self, turn: Turn) -> Turn:
        mine = Turn(turn.run, turn.step, turn.start, (1, 1), guidance=turn.guidance)
        mine.logits = self.session.logits(mine)[:, -1:]
        return mine

    def _catch_up(self, last: Window) -> None:
        """Written are the token before the drafts and all of them but the last one."""
        assert last.length is not None
        if not self.window:
            return
        kept, written = last.length.tolist(), self.window
        if max(kept) > written:
            self._pass(last)  # a row kept the last draft as well
            written += 1
        # A row that is complete goes on from anything: nobody reads what follows.
        newest = last.newest(last.drawn[:, 0].clamp_min(0))
        self.session.rewind([written - n for n in kept], newest)


# --- what they share ---------------------------------------------------------------------------------------
def _tested(turn: Window) -> dict[str, Any]:
    return {
        "draft": turn.drafts, "q": turn.before, "q_start": turn.from_law,
        "seed": turn.run.seeds, "position": turn.place,
    }  # fmt: skip


def _draw(law: ops.Law, seeds: Tensor, place: Tensor) -> Tensor:
    """A token from each law [R, n, V] as `ops.sample` draws it at place[r] + j: int64 [R, n]."""
    rows, n, vocabulary = law.weights.shape
    at = place[:, None] + torch.arange(n, device=place.device)
    each = ops.Law(law.weights.reshape(rows * n, 1, vocabulary), law.total.reshape(rows * n, 1))
    none = at.new_empty(rows * n, 0)
    found = ops.speculative_accept(each, none, seed=seeds.repeat_interleave(n), position=at.reshape(-1))
    return found.tokens.view(rows, n)


def _expect_steady(run: Run) -> float | None:
    """Guidance and filters are the same at every place, for the rows of a turn stand at different ones."""
    session, sampler = run.session, run.sampler
    if run.given:
        raise ValueError(f"expected no given tokens with drafts, got {len(run.given)} steps")
    if session.vocabulary < 1 or any(n != 1 for n in session.layout.sizes):
        raise ValueError(f"expected a model that writes token by token, got steps {session.layout.sizes[:8]}")
    if sampler.processors is not None or type(session).processors is not Session.processors:
        raise ValueError("expected no processors with drafts, got some")
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if callable(getattr(sampler, name)):
            raise ValueError(f"expected {name} to be a number with drafts, got a function of the turn")
    steps = len(session.layout)
    scales = {run.guidance(step, steps) for step in range(steps)}
    if len(scales) > 1:
        raise ValueError(f"expected guidance that is the same at every token with drafts, got {len(scales)}")
    return scales.pop()
