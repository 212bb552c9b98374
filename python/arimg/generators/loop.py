"""The generation loop that all systems share: visible state -> backbone -> head -> guidance, processors,
sampler -> commit -> feedback.

A model opens a `Session`, which holds what one generation carries (caches, the map so far) and knows how to
run the backbone and the head. A `Sampler` says how tokens are drawn, a commit rule which of them become
final: `EachStep` here, windows of drafts in `arimg.generators.speculative`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from arimg import ops
from arimg.commit import Plan
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.reference.sampling import row_seeds


@dataclass(eq=False)
class Turn:
    """One pass of the backbone: where it stands, then what became of it.

    step: of the layout; number: which pass of this step; start: its first token in the sequence; shape: (h,
    w).
    position: where the random numbers of the pass begin. guidance: the s of s c + (1 - s) u, None for
    conditional rows alone. tokens: int64 [B, n] (or [B, n, K]; bool [B, n, bits]), the proposals of the pass
    before, None at first; the loop replaces them by the new ones. final: bool [B, n], which of them stay.
    done: the step is over.
    drafts: int64 [B, w], tokens that are assumed behind the last one (speculation); length: int64 [B], how
    many of `tokens` each row keeps then. logits: before guidance, conditional rows first.
    """

    run: Run
    step: int
    start: int
    shape: tuple[int, int]
    number: int = 0
    position: int = 0
    guidance: float | None = None
    tokens: Tensor | None = None
    final: Tensor | None = None
    done: bool = False
    drafts: Tensor | None = None
    length: Tensor | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def drawn(self) -> Tensor:
        """The tokens, where there are some."""
        assert self.tokens is not None
        return self.tokens

    def newest(self, before: Tensor) -> Tensor:
        """The last token that each row keeps, int64 [B]; before: [B], where it keeps none."""
        if self.length is None:
            return self.drawn[:, -1]
        last = self.drawn.gather(1, (self.length - 1).clamp_min(0)[:, None])[:, 0]
        return torch.where(self.length > 0, last, before)


class Session(ABC):
    """What one generation carries. Subclasses have `layout` and `rows` (B) and define `logits`, mostly
    `feed`.

    vocabulary: V, where drafts are possible. Where guidance is on there are 2B rows, the conditional ones
    first. bits: tokens are bits, logits [..., d, 2].
    finished: no further step is needed (a model that ends by itself).
    """

    layout: Layout
    rows: int
    device = torch.device("cpu")
    vocabulary = 0
    bits = False
    finished = False

    @abstractmethod
    def logits(self, turn: Turn) -> Tensor:
        """Backbone and head: [B or 2B, n, V], [.., n, K, V] or [.., n, d, 2]; with drafts one more than
        drafts.
        """

    def feed(self, turn: Turn) -> None:  # noqa: B027 (a session may carry nothing)
        """Feedback: called after every pass; where `turn.done` the tokens of the step are final."""

    def processors(self, turn: Turn) -> dict[str, Any]:
        """Arguments of `ops.sample` that the state decides: allowed, bias, forced, seen, ..."""
        return {}


class Model(Protocol):
    """What `generate` needs of a model."""

    sampler: Sampler

    @property
    def begin(self) -> Callable[..., Session]:
        """begin(condition, guided, **options) opens a generation; guided: with unconditional rows beside
        them.
        """
        ...


Setting = float | Callable[[Turn], float]  # a number, or one for each turn


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn: the arguments of `ops.sample`, each a number or a function of the turn.

    top_k = 0, top_p = 1 and min_p = 0 switch the filters off. processors: further arguments (allowed, bias,
    forced, seen, ...) for a turn.
    """

    guidance: Guidance | None = None
    temperature: Setting = 1.0
    top_k: Setting = 0
    top_p: Setting = 1.0
    min_p: Setting = 0.0
    processors: Callable[[Turn], dict[str, Any]] | None = None

    def settings(self, turn: Turn) -> dict[str, Any]:
        """Guidance and filters of this turn: arguments of `ops.sample` and `ops.token_law` alike."""
        values = {n: getattr(self, n) for n in ("temperature", "top_k", "top_p", "min_p")}
        found = {n: v(turn) if callable(v) else v for n, v in values.items()}
        found["top_k"] = int(found["top_k"])
        return {**found, "guidance": turn.guidance}

    def draw(self, turn: Turn) -> ops.Drawn:
        """Tokens of a turn with their log-probabilities."""
        run = turn.run
        extra = run.session.processors(turn)
        if self.processors is not None:
            extra = {**extra, **self.processors(turn)}
        sample: Any = ops.sample_bits if run.session.bits else ops.sample
        drawn = sample(
            turn.logits, seed=run.seeds, position=turn.position, return_logprob=run.logprob,
            **self.settings(turn), **extra,
        )  # fmt: skip
        return drawn if run.logprob else ops.Drawn(drawn, None, None)  # type: ignore[arg-type]


@dataclass(eq=False)
class Run:
    """One call of `generate`. given: tokens of the first steps, kept as they are. logprob: drawn with the
    tokens. condition: what it generates from, for a second model that drafts.
    """

    session: Session
    sampler: Sampler
    seeds: Tensor
    given: Sequence[Tensor] = ()
    logprob: bool = False
    condition: Any = None

    def guidance(self, step: int, steps: int) -> float | None:
        chosen = self.sampler.guidance
        return None if chosen is None else chosen.scale(step, steps)


class Commit(Protocol):
    """Which pass comes next, and which of its tokens become final."""

    def turns(self, run: Run) -> Iterator[Turn]:
        """The passes; each is complete when the iterator goes on."""
        ...

    def settle(self, turn: Turn) -> None:
        """From the logits of a turn its tokens, and whether they are final."""
        ...


@dataclass(frozen=True)
class Repeat:
    """A plan that draws a whole map several times, each time seeing the last one (TokenFlow's multi-step)."""

    steps: int

    def commit(self, step: int, logprob: Tensor, final: Tensor, seeds: Tensor, position: int = 0) -> Tensor:
        return torch.full_like(final, step + 1 == self.steps)


Planned = Plan | Repeat


@dataclass(frozen=True)
class EachStep:
    """Step after step of the layout. plans(step, n): how the n tokens of a step become final; None: at
    once.
    """

    plans: Callable[[int, int], Planned | None] | None = None

    def turns(self, run: Run) -> Iterator[Turn]:
        layout, position = run.session.layout, 0
        for step, (start, end) in enumerate(layout.segments):
            plan = self._plan(step, end - start)
            guidance = run.guidance(step, len(layout))
            tokens = final = None
            for number in range(1 if plan is None else plan.steps):
                turn = Turn(run, step, start, layout.shapes[step], number, position, guidance, tokens, final)
                yield turn
                tokens, final = turn.tokens, turn.final
                position += turn.drawn[0].numel() if not run.session.bits else end - start
                if turn.done:
                    break  # given tokens need no further pass
            if run.session.finished:
                return

    def settle(self, turn: Turn) -> None:
        run, before = turn.run, turn.tokens
        if turn.step < len(run.given):
            turn.tokens, turn.done = run.given[turn.step], True
            turn.final = torch.ones(turn.tokens.shape[:2], dtype=torch.bool, device=turn.tokens.device)
            return
        n = turn.shape[0] * turn.shape[1]
        plan = self._plan(turn.step, n)
        drawn = run.sampler.draw(turn)
        if plan is None:
            turn.tokens, turn.done = drawn.token, True
            return
        tokens, logprob = drawn.token, drawn.logprob
        if logprob.dim() > 2:  # several tokens or bits at a place
            logprob = logprob.flatten(2).sum(2)
        final = torch.zeros_like(logprob, dtype=torch.bool) if turn.final is None else turn.final
        if before is not None:
            stays = final.reshape(*final.shape, *[1] * (tokens.dim() - 2))
            tokens = torch.where(stays, before, tokens)
        first = turn.position - turn.number * n  # where the numbers of this step begin
        turn.tokens = tokens
        turn.final = final | plan.commit(turn.number, logprob, final, run.seeds, first)
        turn.done = turn.number + 1 == plan.steps

    def _plan(self, step: int, n: int) -> Planned | None:
        return None if self.plans is None else self.plans(step, n)


ALWAYS = EachStep()


def generate(
    model: Model,
    condition: Any,
    *,
    sampler: Sampler | None = None,
    commit: Commit | None = None,
    seed: int | Tensor = 0,
    given: Sequence[Tensor] = (),
    **options: Any,
) -> Iterator[Turn]:
    """The passes of a generation, each with its tokens; those with `turn.done` end a step of the layout.

    condition: what the model generates from (labels [B], text, ...). sampler and commit default to the
    model's own (`model.sampler`, `model.commit`, else everything at once). seed: an int s (row r draws with s
    + r) or int64 [B].
    given: int64 [B, n] tokens of the first steps, kept as they are. options: for the model (`begin`).
    Labels, seeds, given tokens and what a rule holds may lie on the host, wherever the model is.
    """
    sampler = sampler or model.sampler
    rule: Commit = getattr(model, "commit", ALWAYS) if commit is None else commit
    if window := getattr(rule, "window", 0):
        options = {"window": window, **options}
    with torch.no_grad():
        session = model.begin(condition, guided=sampler.guidance is not None, **options)
        if to := getattr(rule, "to", None):
            rule = to(session.device)
    for tokens, n in zip(given, session.layout.sizes):
        if tuple(tokens.shape[:2]) != (session.rows, n):
            raise ValueError(f"expected given tokens [{session.rows}, {n}], got {list(tokens.shape)}")
    given = [tokens.to(session.device) for tokens in given]
    run = Run(session, sampler, row_seeds(seed, session.rows, session.device), given, condition=condition)
    run.logprob = not (isinstance(rule, EachStep) and rule.plans is None)
    for turn in rule.turns(run):
        with torch.no_grad():
            turn.logits = session.logits(turn)
            rule.settle(turn)
            session.feed(turn)
        yield turn


def final_tokens(turns: Iterator[Turn]) -> list[Tensor]:
    """The tokens of each step of a generation; of one with drafts a single tensor [B, T] of all of them."""
    steps: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for turn in turns:
        if turn.length is not None:
            kept.append((turn.drawn, turn.length))
        elif turn.done:
            steps.append(turn.drawn)
    return [*steps, side_by_side(kept)] if kept else steps


def side_by_side(passes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of each pass (tokens [B, n], lengths [B]) the first tokens of each row, one behind another: [B, T].

    All rows have the same number of tokens in the end.
    """
    tokens = torch.cat([t for t, _ in passes], 1)
    kept = torch.cat([torch.arange(t.shape[1], device=t.device) < n[:, None] for t, n in passes], 1)
    return tokens[kept].view(len(tokens), -1)
