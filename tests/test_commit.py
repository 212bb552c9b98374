"""Plans of commitment: the published schedules against their formulas, and whole generations by them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from arimg import commit, ops
from arimg.commit import HMAR, PUBLISHED, ByRatio, Plan


def make(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def masked(plan, tokens):
    """After each step."""
    return [tokens - done for done in itertools.accumulate(plan.committed(tokens))]


# --- how many: the formulas as their systems write them ----------------------------------------------
def by_formula(tokens, steps, share):
    """floor(N share((k + 1) / K)), one fewer than before at least, one at least until the last step takes
    all: MAR's clamp, which each of these loops has in its own words."""
    left, counts = tokens, []
    for k in range(steps):
        wanted = math.floor(tokens * share((k + 1) / steps))
        left = 0 if k == steps - 1 else max(1, min(left - 1, wanted))
        counts.append(left)
    return counts


@pytest.mark.parametrize(
    "name, tokens, steps, share",
    [
        ("MaskGIT", 256, 8, lambda r: math.cos(math.pi * r / 2)),
        ("Meissonic", 1024, 64, lambda r: math.cos(math.pi * r / 2)),
        ("Meissonic", 4096, 48, lambda r: math.cos(math.pi * r / 2)),
        ("Show-o", 256, 18, lambda r: math.cos(math.pi * r / 2)),
        ("MAR", 256, 256, lambda r: math.cos(math.pi / 2 * r)),
        ("MAR", 256, 64, lambda r: math.cos(math.pi / 2 * r)),
        ("Hi-MAR pivots", 64, 32, lambda r: math.cos(math.pi / 2 * r)),
        ("Hi-MAR dense", 256, 4, lambda r: math.cos(math.pi / 2 * r)),
        ("Hi-MAR dense", 256, 12, lambda r: math.cos(math.pi / 2 * r)),
        ("STAR refiner", 1024, 8, lambda r: math.acos(r) / (math.pi / 2)),
        ("STAR refiner", 4096, 15, lambda r: math.acos(r) / (math.pi / 2)),
    ],
)
def test_published_counts_follow_their_formula(name, tokens, steps, share):
    plan = PUBLISHED[name]
    plan = replace(plan, amounts=replace(plan.amounts, steps=steps))
    assert masked(plan, tokens) == by_formula(tokens, steps, share)
    assert sum(plan.committed(tokens)) == tokens and plan.steps == steps


def test_where_the_cosine_alone_falls_by_more_than_one_nothing_is_clamped():
    assert masked(PUBLISHED["MaskGIT"], 256) == [
        math.floor(256 * math.cos(math.pi / 2 * k / 8)) for k in range(1, 9)
    ]
    assert masked(PUBLISHED["Hi-MAR dense"], 256) == [236, 181, 97, 0]


def test_hmar_refines_its_small_scales():
    """[[1], [1, 3], [1, 1, 2, 5], [16], ...]: 14 passes over the ten scales of VAR, as published."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    counts = [plan.committed(side * side) for plan, side in zip(HMAR, sides, strict=True)]
    assert counts[:4] == [[1], [1, 3], [1, 1, 2, 5], [16]]
    assert sum(plan.steps for plan in HMAR) == 14 and sum(map(sum, counts)) == 680
    assert {plan.rule for plan in HMAR} == {"probability"}
    with pytest.raises(ValueError, match=r"expected counts that sum to the 5 tokens, got \(1, 3\)"):
        HMAR[1].committed(5)


@pytest.mark.parametrize(
    "noise, want",
    [
        (commit.AnnealedNoise(4.5), [4.5 * (1 - k / 4) for k in (1, 2, 3, 4)]),
        (commit.LinearNoise(2.0), [2.0, 4 / 3, 2 / 3, 0.0]),
        (commit.CompoundingNoise(1.0), [3 / 4, 3 / 4 * 2 / 4, 3 / 4 * 2 / 4 / 4, 0.0]),
    ],
)
def test_temperatures_fall_to_zero(noise, want):
    assert [noise.temperature(k, 4) for k in range(4)] == pytest.approx(want)
    assert noise.temperature(0, 1) == 0.0


# --- in which order ----------------------------------------------------------------------------------
def run(plan, tokens, seeds, position=0):
    """A whole generation: the step at which each token became final, the log-probabilities of each step."""
    rows = len(seeds)
    final, when, seen = torch.zeros(rows, tokens, dtype=torch.bool), torch.full((rows, tokens), -1), []
    for step, count in enumerate(plan.committed(tokens)):
        logits = make(rows, tokens, 20, seed=step)
        drawn = ops.sample(logits, seed=seeds, position=position + step * tokens, return_logprob=True)
        chosen = plan.commit(step, drawn.logprob, final, seeds, position)
        assert not (chosen & final).any() and (chosen.sum(-1) == count).all()
        final |= chosen
        when[chosen] = step
        seen.append(drawn.logprob)
    assert final.all()
    return when, seen


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_whole_generation_commits_every_token_once(name):
    run(PUBLISHED[name], 64, torch.tensor([3, -4]), position=7)


@pytest.mark.parametrize("plan", HMAR[:4], ids=lambda plan: str(plan.amounts))
def test_the_most_probable_proposals_come_first(plan):
    tokens = sum(plan.amounts.counts)
    when, seen = run(plan, tokens, torch.tensor([3, 4]))
    for step, logprob in enumerate(seen):
        for r in range(2):
            chosen, later = logprob[r][when[r] == step], logprob[r][when[r] > step]
            assert len(later) == 0 or chosen.min() >= later.max()


def test_a_random_order_is_one_permutation_of_the_map():
    seeds = torch.arange(50)
    when, _ = run(PUBLISHED["MAR"], 32, seeds)
    order = commit.random_confidence(seeds, 32).argsort(-1, descending=True)
    fast, _ = run(Plan(ByRatio(4), "random"), 32, seeds)
    for r in range(50):
        assert (when[r][order[r]].diff() >= 0).all() and (fast[r][order[r]].diff() >= 0).all()
    assert abs(when.double().mean(0) - when.double().mean()).max() < 60  # no place is always early
    assert len({tuple(row.tolist()) for row in order}) == 50


def test_stars_refiner_begins_in_random_order():
    plan = replace(PUBLISHED["STAR refiner"], amounts=ByRatio(15, commit.arccosine))
    seeds, logprob = torch.tensor([1, 2]), make(2, 40, seed=3)
    random = commit.random_confidence(seeds, 40, 9)
    for step in range(15):
        got = plan.confidence(step, logprob, seeds, 9)
        assert torch.equal(got, random if step < 5 else logprob.exp())


def test_gumbel_plans_anneal_and_take_new_noise_at_each_step():
    plan, seeds, logprob = PUBLISHED["Meissonic"], torch.tensor([1, 2]), make(2, 40, seed=3)
    noise = [
        (plan.confidence(step, logprob, seeds) - logprob) / plan.noise.temperature(step, 64)
        for step in range(63)
    ]
    assert not torch.equal(noise[0], noise[1])
    every = torch.stack(noise).double()
    assert abs(every.mean().item() - 0.5772) < 5 * 1.2826 / math.sqrt(
        every.numel()
    )  # Euler's constant, pi/sqrt 6
    assert torch.equal(plan.confidence(63, logprob, seeds), logprob)


@pytest.mark.parametrize("ratio", [commit.cosine, commit.arccosine, commit.linear])
def test_schedules_fall_to_zero(ratio):
    assert ratio(0.0) == 1.0 and abs(ratio(1.0)) < 1e-15
    for tokens, steps in ((256, 256), (256, 64), (64, 32), (5, 9), (1, 1), (0, 3)):
        counts = commit.masked_after(tokens, steps, ratio)
        assert len(counts) == steps and counts[-1] == 0
        inner = [tokens, *counts[:-1]]
        assert all(b < a or a <= 1 for a, b in itertools.pairwise(inner))


def test_schedules_at_known_points():
    assert commit.masked_after(10, 4, commit.linear) == [7, 5, 2, 0]
    assert commit.masked_after(100, 2, commit.arccosine) == [66, 0]  # arccos(1/2) = pi/3
    assert commit.masked_after(16, 3) == [13, 8, 0]
    # MAR at 256 steps: the cosine alone would repeat a count at first, so one token goes at each step
    assert commit.masked_after(256, 256)[:3] == [255, 254, 253]


def test_gumbel_confidence_orders_by_the_softmax():
    """Of n proposals, i comes first with probability p_i: confidence log p + Gumbel."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds = torch.arange(20_000)
    confidence = commit.gumbel_confidence(p.log().expand(20_000, 4), 1.0, seeds)
    share = ops.keep_most_confident(confidence, 1).float().mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    assert torch.equal(commit.gumbel_confidence(p.log(), 0, seeds), p.log())
