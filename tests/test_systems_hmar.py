"""HMAR: scales that see the reconstruction alone, refinement by confidence, guidance in every pass."""

from typing import cast

import pytest
import torch
from torch import Tensor

from arimg.commit import ByRatio, Plan
from arimg.generators.loop import ALWAYS, EachStep, Sampler, Turn, generate
from arimg.guidance import Guidance
from arimg.systems import find
from arimg.systems.hmar import HMAR, RELEASED_STRENGTH, WEIGHTS, HmarSession, refine, scale_weights
from arimg.tokenizers import VQVAE
from conftest import Backend
from system_checks import LABELS, check_rows_alone, close, same_tokens_emulated, spread, turns_of


@pytest.fixture(scope="module")
def model() -> HMAR:
    torch.manual_seed(0)
    tokenizer = VQVAE(40, 8, 8, (1, 1, 1, 1), [1, 2, 3, 4], blocks=1).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    model: HMAR = spread(HMAR(tokenizer, 3, depth=3, width=32, heads=2, branch=1))
    return model


def finals(turns: list[Turn]) -> Tensor:
    return torch.cat([t.drawn for t in turns if t.done], 1)


def inputs(model: HMAR, tokens: Tensor) -> Tensor:
    return model.tokenizer.quantize.generator_input(tokens.split(model.layout.sizes, 1))


def test_every_pass_of_the_loop_has_the_logits_of_teacher_forcing(model: HMAR) -> None:
    turns = turns_of(model)
    assert [t.number for t in turns] == [0, 0, 1, 0, 1, 2, 3, 0]
    labels, tokens = torch.tensor(LABELS), finals(turns)
    x = inputs(model, tokens)
    forced = model(labels, x)
    before: Turn | None = None
    for t in turns:
        start, end = model.layout.segments[t.step]
        if t.number == 0:
            assert close(t.logits[:3], forced[:, start:end])
        else:
            assert before is not None and before.final is not None
            final = torch.ones_like(tokens, dtype=torch.bool)
            final[:, start:end] = before.final
            known = tokens.clone()
            known[:, start:end] = before.drawn
            assert close(t.logits[:3], model.masked(labels, x, known, final)[:, start:end])
            kept = before.final
            assert torch.equal(t.drawn[kept], before.drawn[kept])
        before = t
    # the running sum of the loop is that of the final tokens
    f_hat = model.tokenizer.quantize.features(tokens.split(model.layout.sizes, 1))
    assert torch.equal(cast(HmarSession, turns[-1].run.session).f_hat, f_hat)


def test_a_scale_depends_on_its_own_input_alone(model: HMAR) -> None:
    x = torch.randn(1, model.layout.length - 1, 8, generator=torch.Generator().manual_seed(1))
    base = model(torch.tensor([0]), x)
    other = x.clone()
    other[:, 4:13] += 1.0  # the third scale, tokens 5..13
    changed = (model(torch.tensor([0]), other) != base).any(-1)[0]
    assert changed[5:14].all() and not changed[:5].any() and not changed[14:].any()


def test_rows_are_independent_and_repeat(model: HMAR) -> None:
    check_rows_alone(model)
    check_rows_alone(model, commit=ALWAYS)


def test_each_pass_commits_its_most_confident_tokens(model: HMAR) -> None:
    counts = {1: (1, 3), 2: (1, 1, 2, 5)}
    done = torch.zeros(3, dtype=torch.long)
    for t in turns_of(model):
        if t.step in counts:
            assert t.final is not None
            done = t.final.sum(1)
            assert done.tolist() == [sum(counts[t.step][: t.number + 1])] * 3


def test_the_schedule_changes_without_training(model: HMAR) -> None:
    for commit, passes in (
        (ALWAYS, 4),
        (EachStep(refine([1, 1, 3, 5])), 10),
        (EachStep(refine([1, 4, 9, 16])), 30),
    ):
        turns = turns_of(model, commit=commit)
        assert len(turns) == passes and finals(turns).shape == (3, 30)
        assert all(t.final is None or bool(t.final.all()) for t in turns if t.done)


def test_given_scales_are_kept_and_added_once(model: HMAR) -> None:
    tokens = finals(turns_of(model))
    given = list(tokens.split(model.layout.sizes, 1)[:3])
    turns = turns_of(model, given=given)
    assert [t.number for t in turns] == [0] * 4 and torch.equal(finals(turns)[:, :14], tokens[:, :14])
    f_hat = model.tokenizer.quantize.features(finals(turns).split(model.layout.sizes, 1))
    assert torch.equal(cast(HmarSession, turns[-1].run.session).f_hat, f_hat)


def test_guidance_is_applied_in_refinement_and_as_released_it_is_not(model: HMAR) -> None:
    def scales(strength: float, **options: bool) -> list[tuple[int, float | None]]:
        sampler = Sampler(Guidance(strength))
        return [(t.number, t.guidance) for t in turns_of(model, sampler=sampler, **options)]

    assert {s for _, s in scales(3.0)} == {3.0}
    assert {s for n, s in scales(3.0, released=True) if n == 0} == {3.0}
    assert {s for n, s in scales(3.0, released=True) if n > 0} == {1.0 + RELEASED_STRENGTH}

    # Refined tokens follow the strength, unless it is the released one; greedy, so no noise is in it.
    def refined(strength: float, released: bool) -> Tensor:
        sampler = Sampler(Guidance(strength), top_k=1)
        given = list(finals(turns_of(model)).split(model.layout.sizes, 1)[:2])
        turns = turns_of(
            model, sampler=sampler, commit=EachStep(refine([1, 1, 9, 1])), given=given, released=released
        )
        turn = next(t for t in turns if t.step == 2 and t.number == 1)
        chosen = turn.logits[:3].argmax(-1)  # of the condition alone
        before = next(t for t in turns if t.step == 2 and t.number == 0)
        assert before.final is not None
        return (turn.drawn == chosen)[~before.final]

    assert refined(6.0, released=True).all()
    assert not refined(6.0, released=False).all()


@pytest.mark.parametrize("seed", range(3))
def test_refinement_keeps_a_constraint_that_one_pass_breaks(seed: int) -> None:
    """The four tokens of a scale are equal: one pass draws them apart, refinement sees what is final."""
    torch.manual_seed(seed)
    tokenizer = VQVAE(2, 4, 8, (1, 1), [1, 2], blocks=1).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    model = HMAR(tokenizer, 1, depth=2, width=32, heads=2, branch=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        bit = torch.randint(2, (64, 1))
        examples = torch.cat((torch.zeros_like(bit), bit.expand(-1, 4)), 1)
        loss = model.loss(examples, torch.zeros(64, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def broken(commit: EachStep) -> float:
        labels, sampler = torch.zeros(256, dtype=torch.long), Sampler()
        last = list(generate(model, labels, sampler=sampler, commit=commit, seed=0))[-1].drawn
        return float((last != last[:, :1]).any(1).float().mean())

    assert broken(ALWAYS) > 0.6  # 7/8 of independent fair bits
    assert broken(EachStep(lambda step, n: Plan(ByRatio(2, lambda r: 0.75)) if n == 4 else None)) < 0.1


def test_the_same_tokens_on_every_backend(backend: Backend, model: HMAR) -> None:
    turns = turns_of(model.to(backend.device), [1], commit=EachStep(refine([1, 2, 1, 1])))
    assert finals(turns).shape == (1, 30)
    for t in turns:  # every draw is that of the oracle from the same logits
        from arimg import reference

        drawn = reference.sample(
            t.logits.cpu(), seed=torch.tensor([9]), position=t.position, **t.run.sampler.settings(t)
        )
        free = torch.ones_like(drawn, dtype=torch.bool)
        if t.number:
            free[turns[turns.index(t) - 1].final.cpu()] = False  # type: ignore[union-attr]
        assert torch.equal(drawn[free], t.drawn.cpu()[free])


def test_weights_of_the_scales() -> None:
    torch.testing.assert_close(scale_weights(10), torch.tensor(WEIGHTS), atol=2e-4, rtol=0)
    for n in (1, 5, 14):
        assert scale_weights(n).shape == (n,) and abs(float(scale_weights(n).sum()) - 1) < 1e-6


def test_full_size_and_refusals() -> None:
    with torch.device("meta"):
        big = HMAR(VQVAE(), 1000, depth=16)
    shapes = {k: tuple(v.shape) for k, v in big.state_dict().items()}
    assert shapes["mask_blocks.7.attn.mat_qkv.weight"] == (3072, 1024) and shapes["pos_1LC"] == (1, 680, 1024)
    assert shapes["mask_head.weight"] == (4096, 1024) and "mask_blocks.8.attn.proj.weight" not in shapes
    small = VQVAE(8, 4, 8, (1, 1), [1, 2], blocks=1)
    state = HMAR(small, 1, depth=3, width=32, heads=2, branch=2).state_dict()
    assert cast(HMAR, HMAR.from_state_dict(state, tokenizer=small)).branch == 2
    with pytest.raises(ValueError, match=r"expected a branch of 1\.\.1 blocks, got 2"):
        HMAR(VQVAE(8, 4, 8, (1, 1), [1, 2], blocks=1), 1, depth=2, width=32, heads=2, branch=2)
    plans = [
        cast(EachStep, HMAR.commit)._plan(k, n * n) for k, n in enumerate((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    ]
    assert sum(1 if p is None else p.steps for p in plans) == 14  # the passes as published
    diagonal, causal = (big.layout.visibility(rule).density for rule in (big.rule, "level-causal"))
    assert abs(diagonal / causal - 0.386) < 1e-3  # of VAR's pairs of tokens
    assert find("hmar").title == "HMAR"


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: HMAR) -> None:
    same_tokens_emulated(model)
    same_tokens_emulated(model, sampler=Sampler(top_k=1))
