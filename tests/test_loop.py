"""The generation loop: what it draws, what it hands to the session, how plans and repeats become final."""

import itertools

import pytest
import torch
from torch import Tensor

from arimg import ops
from arimg.commit import ByCounts, Plan
from arimg.generators import EachStep, Repeat, Sampler, Session, Turn, final_tokens, generate
from arimg.guidance import (
    BeyondConditional,
    Guidance,
    after,
    cosine,
    half_linear,
    linear,
    linear_until,
    logarithm,
    power_cosine,
    square,
    square_root,
)
from arimg.layout import Layout

V, ROWS = 11, 3


class Toy(Session):
    """Logits that depend on the row, the step and the tokens of the step that are final; keeps what it was
    fed.
    """

    def __init__(self, layout: Layout, rows: int, guided: bool, heads: int = 0, bits: bool = False) -> None:
        self.layout, self.rows, self.guided, self.heads, self.bits = layout, rows, guided, heads, bits
        self.fed: list[tuple[int, int, bool, Tensor]] = []
        self.seen: list[Tensor | None] = []

    def logits(self, turn: Turn) -> Tensor:
        n = turn.shape[0] * turn.shape[1]
        self.seen.append(None if turn.tokens is None else turn.tokens.clone())
        generator = torch.Generator().manual_seed(100 * turn.step + turn.number)
        shape = (n, self.heads, V) if self.heads else (n, V)
        shape = (n, 5, 2) if self.bits else shape
        one = torch.randn(2, *shape, generator=generator)
        rows = self.rows if turn.guidance is not None else 0
        return torch.cat([one[:1].expand(self.rows, *shape), one[1:].expand(rows, *shape)])

    def feed(self, turn: Turn) -> None:
        self.fed.append((turn.step, turn.number, turn.done, turn.drawn.clone()))


class ToyModel:
    sampler = Sampler()

    def __init__(self, layout: Layout, **options: object) -> None:
        self.layout, self.options = layout, options

    def begin(self, condition: int, guided: bool, **options: object) -> Session:
        self.session = Toy(self.layout, condition, guided, **self.options)
        return self.session


LAYOUT = Layout.scales([1, 2, 3])


def test_each_step_draws_what_ops_sample_draws() -> None:
    model = ToyModel(LAYOUT)
    sampler = Sampler(Guidance(1.5, linear, BeyondConditional()), 0.8, top_k=5)
    turns = list(generate(model, ROWS, sampler=sampler, seed=7))
    assert [t.step for t in turns] == [0, 1, 2] and all(t.done for t in turns)
    for turn, s in zip(turns, (1.0, 1.75, 2.5)):
        assert turn.guidance == s and turn.position == turn.start
        want = ops.sample(turn.logits, seed=7, position=turn.start, temperature=0.8, top_k=5, guidance=s)
        assert torch.equal(turn.drawn, want)
    assert len(turns[-1].drawn.unique()) > 1


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    together = torch.cat(final_tokens(generate(ToyModel(LAYOUT), ROWS, seed=torch.tensor([5, 6, 7]))), 1)
    for b in range(ROWS):
        alone = torch.cat(final_tokens(generate(ToyModel(LAYOUT), 1, seed=5 + b)), 1)
        assert torch.equal(alone[0], together[b])


def test_settings_may_depend_on_the_turn() -> None:
    sampler = Sampler(temperature=lambda turn: 1.0 + turn.step, top_k=lambda turn: 1 if turn.step == 2 else 0)
    turns = list(generate(ToyModel(LAYOUT), ROWS, sampler=sampler))
    assert torch.equal(turns[2].drawn, turns[2].logits.argmax(-1))
    assert torch.equal(turns[1].drawn, ops.sample(turns[1].logits, seed=0, position=1, temperature=2.0))


def test_processors_of_sampler_and_session_reach_the_draw() -> None:
    class Odd(Toy):
        def processors(self, turn: Turn) -> dict[str, Tensor]:
            return {"allowed": torch.arange(V) % 2 == 1}

    class Model(ToyModel):
        def begin(self, condition: int, guided: bool, **options: object) -> Session:
            return Odd(self.layout, condition, guided)

    forced = Sampler(processors=lambda turn: {"bias": torch.where(torch.arange(V) == 3, 100.0, 0.0)})
    assert all((t.drawn % 2 == 1).all() for t in generate(Model(LAYOUT), ROWS))
    assert all((t.drawn == 3).all() for t in generate(Model(LAYOUT), ROWS, sampler=forced))


def test_guidance_that_ends_leaves_conditional_rows_alone() -> None:
    turns = list(generate(ToyModel(LAYOUT), ROWS, sampler=Sampler(Guidance(3.0, until=1))))
    assert [len(t.logits) for t in turns] == [2 * ROWS, ROWS, ROWS]


@pytest.mark.parametrize("options, shape", [({"heads": 4}, (ROWS, 9, 4)), ({"bits": True}, (ROWS, 9, 5))])
def test_several_tokens_or_bits_at_a_position(options: dict, shape: tuple[int, ...]) -> None:
    turns = list(generate(ToyModel(LAYOUT, **options), ROWS, seed=3))
    assert turns[-1].drawn.shape == shape
    sample = ops.sample_bits if "bits" in options else ops.sample
    last = turns[-1]
    assert torch.equal(last.drawn, sample(last.logits, seed=3, position=last.position))
    assert last.position == 5 * (4 if "heads" in options else 1)  # what the steps before have used


def test_a_plan_keeps_the_most_probable_and_shows_them_to_the_next_pass() -> None:
    counts = (2, 3, 4)
    rule = EachStep(lambda step, n: Plan(ByCounts(counts)) if n == 9 else None)
    model = ToyModel(LAYOUT)
    turns = list(generate(model, ROWS, commit=rule, seed=1))
    assert [(t.step, t.number, t.done) for t in turns] == [
        (0, 0, True), (1, 0, True), (2, 0, False), (2, 1, False), (2, 2, True),
    ]  # fmt: skip
    passes = turns[2:]
    assert [int(t.final[0].sum()) for t in passes] == [2, 5, 9]
    for before, now in itertools.pairwise(passes):
        kept = before.final
        assert torch.equal(now.drawn[kept], before.drawn[kept])  # final tokens stay
        assert (now.final | ~kept).all()
    first = passes[0]
    drawn = ops.sample(first.logits, seed=1, position=first.position, return_logprob=True)
    want = ops.keep_most_confident(drawn.logprob, 2, torch.ones_like(first.final))
    assert torch.equal(first.final, want)
    assert model.session.seen[3] is not None and torch.equal(model.session.seen[3], first.drawn)
    positions = [t.position for t in turns]
    assert positions == [0, 1, 5, 14, 23]  # every pass has numbers of its own


def test_repeat_draws_the_map_again_and_keeps_the_last() -> None:
    rule = EachStep(lambda step, n: Repeat(3) if step == 1 else None)
    turns = list(generate(ToyModel(LAYOUT), ROWS, commit=rule))
    assert [t.done for t in turns] == [True, False, False, True, True]
    assert turns[2].final is not None and not turns[2].final.any() and turns[3].final.all()
    assert torch.equal(turns[3].drawn, ops.sample(turns[3].logits, seed=0, position=turns[3].position))


def test_given_tokens_stay_and_the_rest_follows_the_same_numbers() -> None:
    free = final_tokens(generate(ToyModel(LAYOUT), ROWS))
    given = [torch.full((ROWS, 1), 9), torch.full((ROWS, 4), 8)]
    bound = final_tokens(generate(ToyModel(LAYOUT), ROWS, given=given))
    assert torch.equal(bound[0], given[0]) and torch.equal(bound[1], given[1])
    assert torch.equal(bound[2], free[2])
    with pytest.raises(ValueError, match=r"expected given tokens \[3, 1\], got \[3, 2\]"):
        next(generate(ToyModel(LAYOUT), ROWS, given=[torch.zeros(ROWS, 2, dtype=torch.int64)]))


def test_a_session_may_end_by_itself() -> None:
    class Ends(Toy):
        @property
        def finished(self) -> bool:
            return len(self.fed) == 2

    class Model(ToyModel):
        def begin(self, condition: int, guided: bool, **options: object) -> Session:
            return Ends(self.layout, condition, guided)

    assert len(list(generate(Model(Layout.groups([1] * 9)), ROWS))) == 2


def test_schedules_start_at_the_condition_alone_and_reach_the_strength() -> None:
    for schedule in (linear, cosine, square, square_root, logarithm):
        values = [Guidance(4.0, schedule).scale(k, 9) for k in range(9)]
        assert values[0] == 1.0 and values[-1] == pytest.approx(4.0)
        assert values == sorted(values)
    assert [Guidance(4.0, half_linear).scale(k, 8) for k in (0, 2, 4, 7)] == [1.0, 2.5, 4.0, 4.0]
    assert [Guidance(1.75, after(0.18)).scale(k, 100) for k in (17, 18)] == [1.0, 1.75]
    flex = Guidance(2.0, linear_until(9), BeyondConditional())
    assert flex.scale(9, 10) == 3.0 and flex.scale(12, 13) > 3.0
    rar = Guidance(6.0, power_cosine(1.15))
    assert rar.scale(0, 256) == 1.0 and 5.9 < rar.scale(255, 256) <= 6.0
