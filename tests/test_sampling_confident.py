"""Keeping the most confident proposals, mask schedules, bits from pairs of logits, guidance formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arimg import commit, ops, reference
from arimg.guidance import BeyondConditional, FromUnconditional, LinearRamp


def make(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- keep-n-most-confident -------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_keeps_the_largest_and_of_equals_the_first(data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    values = st.sampled_from([math.nan, -math.inf, -1.0, 0.0, 0.5, 1.0, math.inf])
    confidence = torch.tensor([[data.draw(values) for _ in range(length)] for _ in range(rows)])
    count = torch.tensor([data.draw(st.integers(-2, length + 2)) for _ in range(rows)])
    candidates = torch.tensor([[data.draw(st.booleans()) for _ in range(length)] for _ in range(rows)])
    kept = ops.keep_most_confident(confidence, count, candidates)
    for r in range(rows):
        value = [-math.inf if math.isnan(c) else c for c in confidence[r].tolist()]
        order = sorted((i for i in range(length) if candidates[r, i]), key=lambda i: (-value[i], i))
        assert set(kept[r].nonzero().flatten().tolist()) == set(order[: max(0, int(count[r]))])
    n = int(count[0])
    everyone = torch.ones_like(candidates)
    want = ops.keep_most_confident(confidence, torch.full((rows,), n), everyone)
    assert torch.equal(ops.keep_most_confident(confidence, n), want)


def test_bad_confidence_is_refused():
    confidence = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"expected confidence \[R, L\], got \[5\]"):
        ops.keep_most_confident(torch.zeros(5), 1)
    with pytest.raises(TypeError, match="expected count to be an int or an int64 tensor, got float"):
        ops.keep_most_confident(confidence, 1.5)
    with pytest.raises(TypeError, match=r"expected candidates of torch.bool"):
        ops.keep_most_confident(confidence, 1, confidence)


def test_keeping_compiles_without_graph_breaks():
    compiled = torch.compile(ops.keep_most_confident, fullgraph=True, backend="aot_eager")
    arguments = make(3, 20), torch.tensor([1, 5, 30]), make(3, 20, seed=1) > 0
    assert torch.equal(compiled(*arguments), ops.keep_most_confident(*arguments))


@pytest.mark.parametrize("kind", ["probability", "gumbel", "random"])
def test_every_step_leaves_exactly_its_count_masked(kind):
    """A whole generation of 256 tokens in 8 steps: counts as scheduled, nothing is committed twice."""
    masked = commit.masked_after(256, 8)
    assert masked[:-1] == [math.floor(256 * math.cos(math.pi / 2 * (k + 1) / 8)) for k in range(7)]
    seeds, rows = torch.tensor([3, 4]), 2
    final = torch.zeros(rows, 256, dtype=torch.bool)
    noise = commit.AnnealedNoise(2.0)
    for step in range(8):
        drawn = ops.sample(
            make(rows, 256, 20, seed=step), seed=seeds, position=step * 256, return_logprob=True
        )
        confidence = {
            "probability": lambda d=drawn: commit.probability_confidence(d.logprob),
            "gumbel": lambda d=drawn, k=step: commit.gumbel_confidence(
                d.logprob, noise.temperature(k, 8), seeds, k * 256
            ),
            "random": lambda: commit.random_confidence(seeds, 256),
        }[kind]()
        before = 256 - (masked[step - 1] if step else 256)
        chosen = ops.keep_most_confident(confidence, 256 - before - masked[step], ~final)
        assert not (chosen & final).any()
        final |= chosen
        assert ((~final).sum(-1) == masked[step]).all()


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


# --- bits ------------------------------------------------------------------------------------------
def test_bits_have_the_frequencies_of_their_pairs(backend):
    n = 300 if backend.name == "emulated" else 20_000
    logits = make(5, 2, scale=1.0)
    bits = ops.sample_bits(logits.expand(1, n, 5, 2).contiguous().to(backend.device), seed=3, temperature=0.5)
    p = (logits.double() / 0.5).softmax(-1)[:, 1]
    share = bits.cpu()[0].double().mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_equal_the_reference_and_each_other(backend, dtype):
    logits = make(4, 3, 14, 2).to(dtype)
    arguments = dict(seed=9, temperature=0.5, top_p=0.97, guidance=3.0)
    bits = ops.sample_bits(logits.to(backend.device), position=5, **arguments).cpu()
    assert bits.shape == (2, 3, 14) and bits.dtype == torch.bool
    assert torch.equal(bits, reference.sample_bits(logits, position=5, **arguments))
    later = ops.sample_bits(
        logits[:, 1:].to(backend.device), position=torch.tensor([6], device=backend.device), **arguments
    )
    assert torch.equal(later.cpu(), bits[:, 1:])
    packed = ops.sample_bits(logits.to(backend.device), position=5, packed=True, **arguments).cpu()
    assert packed.tolist() == [[int("".join(str(int(b)) for b in t), 2) for t in row] for row in bits]


def test_bits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected logits \[R, ..., d, 2\] with d >= 1, got \[3, 4\]"):
        ops.sample_bits(torch.zeros(3, 4), seed=0)
    with pytest.raises(ValueError, match="expected at most 63 bits to pack, got 64"):
        ops.sample_bits(torch.zeros(1, 64, 2), seed=0, packed=True)


# --- guidance --------------------------------------------------------------------------------------
@pytest.mark.parametrize("formula", [FromUnconditional(), BeyondConditional()])
def test_formulas_give_the_scale_of_sample(formula):
    cond, uncond = make(2, 3, 40).double()
    for strength in (0.0, 0.5, 1.0, 4.0):
        s = formula.scale(strength)
        assert torch.allclose(formula.mix(cond, uncond, strength), s * cond + (1 - s) * uncond, atol=1e-12)


def test_one_strength_means_two_scales():
    assert FromUnconditional().scale(1.5) == 1.5 and BeyondConditional().scale(1.5) == 2.5
    assert LinearRamp(1.5).scale(0, 10) == 1.0 and LinearRamp(1.5).scale(9, 10) == 2.5
    assert LinearRamp(4.0, FromUnconditional()).scale(5, 11) == 2.0
