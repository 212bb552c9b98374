"""Guidance, filters and draw in one pass against torch's sort, softmax and multinomial."""

from __future__ import annotations

import pytest
import torch

from arimg import ops
from arimg.commit import ByCounts, LinearNoise, Plan

# name: rows, vocabulary, filters
CASES = {
    "VAR last scale, 256 x 4096, top-k 900 + top-p 0.96": (256, 4096, dict(top_k=900, top_p=0.96)),
    "256 x 4096, top-p 0.96": (256, 4096, dict(top_p=0.96)),
    "256 x 4096, no filter": (256, 4096, dict()),
    "8 x 131072, top-k 900 + top-p 0.96": (8, 131072, dict(top_k=900, top_p=0.96)),
    "8 x 131072, top-p 0.96": (8, 131072, dict(top_p=0.96)),
}


def by_sorting(logits, top_k=0, top_p=1.0):
    """The usual path: thresholds by topk and sort, draws by multinomial."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


def allowed(logits, top_k=0, top_p=1.0):
    """Which tokens the sorting path may draw, with a little room at the top-p cut."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k:
        kept &= logits >= logits.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1:
        x = logits.double().masked_fill(~kept, -torch.inf)
        ascending, order = x.sort(dim=-1)
        kept &= torch.zeros_like(kept).scatter_(1, order, ascending.softmax(-1).cumsum(-1) > 1 - top_p - 1e-6)
    return kept


@pytest.mark.parametrize("peer", ["arimg", "torch sort + multinomial", "one torch softmax"])
@pytest.mark.parametrize("case", CASES)
def test_sample(case, peer, measure):
    rows, vocabulary, filters = CASES[case]
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    drawn = ops.sample(logits, seed=0, **filters)
    assert allowed(logits, **filters).gather(1, drawn[:, None]).all()
    function = {
        "arimg": lambda: ops.sample(logits, seed=0, **filters),
        "torch sort + multinomial": lambda: by_sorting(logits, **filters),
        "one torch softmax": lambda: logits.softmax(-1),
    }[peer]
    measure(f"sample, {case}", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch sort + multinomial"])
def test_sample_with_guidance(peer, measure):
    logits = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) * 2
    filters = dict(top_k=900, top_p=0.96)

    def plain():
        cond, uncond = logits.chunk(2)
        return by_sorting(2.5 * cond - 1.5 * uncond, **filters)

    function = {
        "arimg": lambda: ops.sample(logits, seed=0, guidance=2.5, **filters),
        "torch sort + multinomial": plain,
    }[peer]
    group = "sample with guidance, 2 x 256 x 4096, top-k 900 + top-p 0.96"
    measure(group, peer, function, bytes=logits.nbytes)


EXTRAS = {
    "allowed [V]": dict(allowed=torch.rand(4096, generator=torch.Generator().manual_seed(1)) < 0.5),
    "bias [V]": dict(bias=torch.randn(4096, generator=torch.Generator().manual_seed(1))),
}


@pytest.mark.parametrize("peer", ["arimg", "torch sort + multinomial"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_sample_with_processors(extra, peer, measure):
    logits = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)) * 2
    filters, arguments = dict(top_k=900, top_p=0.96), EXTRAS[extra]

    def processed():
        if "bias" in arguments:
            return logits + arguments["bias"]
        return logits.masked_fill(~arguments["allowed"], -torch.inf)

    drawn = ops.sample(logits, seed=0, **filters, **arguments)
    assert allowed(processed(), **filters).gather(1, drawn[:, None]).all()
    function = {
        "arimg": lambda: ops.sample(logits, seed=0, **filters, **arguments),
        "torch sort + multinomial": lambda: by_sorting(processed(), **filters),
    }[peer]
    measure(f"sample, 256 x 4096, top-k 900 + top-p 0.96, {extra}", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch exponential + argmax"])
def test_gumbel(peer, measure):
    logits = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)) * 2
    function = {
        "arimg": lambda: ops.sample(logits, seed=0, method="gumbel"),
        "torch exponential + argmax": lambda: (logits - torch.empty_like(logits).exponential_().log()).argmax(
            -1
        ),
    }[peer]
    measure("Gumbel noise, 256 x 4096", peer, function, bytes=logits.nbytes)


def pairs(*shape):
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "peer", ["arimg", "torch rand < softmax", "torch rand < sigmoid", "torch multinomial"]
)
def test_bits(peer, measure):
    logits = pairs(1, 4096, 32)
    share, p = ops.sample_bits(logits, seed=0).float().mean(), logits.softmax(-1)[..., 1].mean()
    assert (share - p).abs() < 5 / (2 * 131072**0.5)
    function = {
        "arimg": lambda: ops.sample_bits(logits, seed=0),
        "torch rand < softmax": lambda: torch.rand(1, 4096, 32) < logits.softmax(-1)[..., 1],
        "torch rand < sigmoid": lambda: torch.rand(1, 4096, 32) < (logits[..., 1] - logits[..., 0]).sigmoid(),
        "torch multinomial": lambda: torch.multinomial(logits.view(-1, 2).softmax(-1), 1),
    }[peer]
    measure("bits, 4096 x 32", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch by odds", "torch sort + multinomial"])
def test_bits_filtered(peer, measure):
    """NSARM's settings; by odds, the smaller outcome goes where |x1 - x0| is beyond the odds of top-p."""
    logits, odds = pairs(1, 4096, 32) * 2, torch.logit(torch.tensor(0.97)).item()

    def by_odds():
        x = (logits[..., 1] - logits[..., 0]) / 0.5
        p = torch.where(x.abs() >= odds, (x > 0).float(), x.sigmoid())
        return torch.rand(1, 4096, 32) < p

    certain = ((logits[..., 1] - logits[..., 0]) / 0.5).abs() >= odds + 1e-5
    assert torch.equal(
        ops.sample_bits(logits, seed=0, top_p=0.97, temperature=0.5)[certain], by_odds()[certain]
    )
    function = {
        "arimg": lambda: ops.sample_bits(logits, seed=0, top_k=2, top_p=0.97, temperature=0.5),
        "torch by odds": by_odds,
        "torch sort + multinomial": lambda: by_sorting(logits.view(-1, 2) / 0.5, top_k=2, top_p=0.97),
    }[peer]
    measure("bits, 4096 x 32, temperature 0.5 + top-k 2 + top-p 0.97", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch sigmoid"])
def test_bits_with_logprob(peer, measure):
    logits = pairs(1, 4096, 32)

    def plain():
        x = logits[..., 1] - logits[..., 0]
        p = x.sigmoid()
        bits = torch.rand(1, 4096, 32) < p
        one, zero = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
        return bits, torch.where(bits, one, zero), -(p * one + (1 - p) * zero)

    assert torch.allclose(ops.sample_bits(logits, seed=0, return_logprob=True).entropy, plain()[2], atol=1e-6)
    function = {
        "arimg": lambda: ops.sample_bits(logits, seed=0, return_logprob=True),
        "torch sigmoid": plain,
    }[peer]
    measure("bits with log-probability and entropy, 4096 x 32", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("count", [100, "a count per row"])
@pytest.mark.parametrize("peer", ["arimg", "torch topk", "torch sort"])
def test_keep_most_confident(peer, count, measure):
    if peer == "torch topk" and count != 100:
        pytest.skip("topk takes one count")
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randn(64, 1024, generator=generator)
    candidates = torch.rand(64, 1024, generator=generator) < 0.5
    masked = confidence.masked_fill(~candidates, -torch.inf)
    wanted = 100 if count == 100 else torch.arange(64) * 7
    at = torch.arange(1024)

    def by_sorting_all():
        order = confidence.masked_fill(~candidates, -torch.inf).argsort(-1, descending=True)
        kept = at < (wanted if count == 100 else wanted[:, None])
        return torch.zeros(64, 1024, dtype=torch.bool).scatter_(1, order, kept.expand(64, -1))

    assert torch.equal(ops.keep_most_confident(confidence, wanted, candidates), by_sorting_all())
    if count == 100:
        kept = ops.keep_most_confident(confidence, 100, candidates)
        assert torch.equal(kept, masked >= masked.topk(100).values[:, -1:])
    function = {
        "arimg": lambda: ops.keep_most_confident(confidence, wanted, candidates),
        "torch topk": lambda: confidence.masked_fill(~candidates, -torch.inf).topk(100),
        "torch sort": by_sorting_all,
    }[peer]
    measure(f"keep the most confident, {count}, 64 x 1024", peer, function, bytes=confidence.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch"])
def test_step_of_a_masked_model(peer, measure):
    """log p + T Gumbel of 64 x 1024 proposals, and the 100 most confident of each row."""
    generator = torch.Generator().manual_seed(0)
    logprob = torch.randn(64, 1024, generator=generator).sigmoid().log()
    final = torch.rand(64, 1024, generator=generator) < 0.5
    plan = Plan(ByCounts((100, 924)), "gumbel", noise=LinearNoise(2.0))
    seeds = torch.arange(64)
    kept = plan.commit(0, logprob, final, seeds)
    assert (kept.sum(-1) == 100).all() and not (kept & final).any()

    def plain():
        noise = -(-torch.rand(64, 1024).log()).log()
        return (logprob + 2.0 * noise).masked_fill(final, -torch.inf).topk(100)

    function = {"arimg": lambda: plan.commit(0, logprob, final, seeds), "torch": plain}[peer]
    measure("log p + T Gumbel, then keep 100, 64 x 1024", peer, function, bytes=logprob.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch rand"])
def test_uniform_numbers(peer, measure):
    seeds = torch.arange(64)
    function = {
        "arimg": lambda: ops.philox_uniform(seeds, 0, 1024),
        "torch rand": lambda: torch.rand(64, 1024),
    }[peer]
    measure("uniform numbers, 64 x 1024", peer, function, bytes=64 * 1024 * 4)
