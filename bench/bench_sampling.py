"""Guidance, filters and draw in one pass against torch's sort, softmax and multinomial."""

from __future__ import annotations

import pytest
import torch

from arimg import ops

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


@pytest.mark.parametrize("peer", ["arimg", "torch rand < softmax", "torch multinomial"])
def test_bits(peer, measure):
    logits = torch.randn(1, 4096, 32, 2, generator=torch.Generator().manual_seed(0))
    function = {
        "arimg": lambda: ops.sample_bits(logits, seed=0),
        "torch rand < softmax": lambda: torch.rand(1, 4096, 32) < logits.softmax(-1)[..., 1],
        "torch multinomial": lambda: torch.multinomial(logits.view(-1, 2).softmax(-1), 1),
    }[peer]
    measure("bits, 4096 x 32", peer, function, bytes=logits.nbytes)


@pytest.mark.parametrize("peer", ["arimg", "torch topk"])
def test_keep_most_confident(peer, measure):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randn(64, 1024, generator=generator)
    candidates = torch.rand(64, 1024, generator=generator) < 0.5
    masked = confidence.masked_fill(~candidates, -torch.inf)
    kept = ops.keep_most_confident(confidence, 100, candidates)
    assert torch.equal(kept, masked >= masked.topk(100).values[:, -1:])
    function = {
        "arimg": lambda: ops.keep_most_confident(confidence, 100, candidates),
        "torch topk": lambda: confidence.masked_fill(~candidates, -torch.inf).topk(100),
    }[peer]
    measure("keep the 100 most confident, 64 x 1024", peer, function, bytes=confidence.nbytes)
