"""Acceptance of a window of drafts against plain torch: ratios, residual, cumulative sums and searches."""

from __future__ import annotations

import pytest
import torch

from arimg import ops, reference
from arimg.ops import Law

DRAFTS = 16
CASES = [(rows, vocabulary) for rows in (1, 8) for vocabulary in (8192, 16384)]


def inputs(rows, vocabulary):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, DRAFTS + 1, vocabulary, generator=g) * 2
    drafted = logits[:, :DRAFTS] + torch.randn(rows, DRAFTS, vocabulary, generator=g) * 0.3
    return logits, drafted, ops.sample(drafted, seed=1)


def search(law):
    """A draw from each row: faster than torch.multinomial, which makes a random number per token."""
    cumulative = law.cumsum(-1)
    u = torch.rand(*law.shape[:-1], 1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u, right=True)[..., 0].clamp(max=law.shape[-1] - 1)


def plain(p, q, draft, tail):
    """From probabilities, all rows at once: tokens and lengths; rows commit by themselves."""
    rows, n = draft.shape
    at = draft[..., None]
    ratio = (p[:, :n].gather(2, at) / q.gather(2, at))[..., 0]
    accepted = (torch.rand(rows, n) < ratio).long().cumprod(1).sum(1)
    index, row = accepted.clamp(max=n - 1), torch.arange(rows)
    residual = (p[row, index] - q[row, index]).clamp(min=0)
    token = search(torch.where((accepted == n)[:, None], p[:, n], residual))[:, None]
    rest = torch.full((rows, n + 1), -1)
    behind = torch.arange(n + 1) > accepted[:, None]
    if tail:
        rest[behind] = search(p[behind])
    tokens = torch.where(torch.arange(n + 1) < accepted[:, None], torch.cat((draft, token), 1), rest)
    return tokens.scatter(1, accepted[:, None], token), accepted + 1


def check(rows, vocabulary, result):
    """Both accept as often as the laws overlap, within five deviations of the mean of the first tests."""
    logits, drafted, _ = inputs(rows, vocabulary)
    overlap = torch.minimum(logits[:, :DRAFTS].softmax(-1), drafted.softmax(-1)).sum(-1)
    expected = 1 + overlap.cumprod(1).sum(1)
    assert ((result[1] - expected).abs() < 5 * DRAFTS**0.5).all()
    assert result[0].shape == (rows, DRAFTS + 1)


@pytest.mark.parametrize("peer", ["arimg", "plain torch"])
@pytest.mark.parametrize("tail", [False, True], ids=["no tail", "redraw"])
@pytest.mark.parametrize(("rows", "vocabulary"), CASES)
def test_accept(rows, vocabulary, tail, peer, measure):
    """The acceptance alone, from laws or probabilities that are there."""
    logits, drafted, draft = inputs(rows, vocabulary)
    laws, laws_q = ops.token_law(logits), ops.token_law(drafted)
    p, q = logits.softmax(-1), drafted.softmax(-1)
    function = {
        "arimg": lambda: ops.speculative_accept(
            laws, draft, laws_q, seed=5, tail="redraw" if tail else "none"
        ),
        "plain torch": lambda: plain(p, q, draft, tail),
    }[peer]
    tokens, length = function()
    check(rows, vocabulary, (tokens, length))
    passes = 2 * rows + ((DRAFTS + 1 - length).sum().item() if tail else 0)
    group = f"accept {rows} x 16, V = {vocabulary}, {'tail redrawn' if tail else 'no tail'}"
    measure(group, peer, function, bytes=passes * vocabulary * 4)


@pytest.mark.parametrize("peer", ["arimg", "plain torch"])
@pytest.mark.parametrize(("rows", "vocabulary"), CASES)
def test_a_step_of_jacobi_decoding(rows, vocabulary, peer, measure):
    """From guided logits, top-k 2000, to tokens with a redrawn tail; q is there from the step before."""
    logits, drafted, draft = inputs(rows, vocabulary)
    pair = torch.cat((logits, logits + 0.1 * torch.randn(logits.shape)))
    law_q, q = ops.token_law(drafted), drafted.softmax(-1)

    def ours():
        law: Law = ops.token_law(pair, guidance=3.0, top_k=2000)
        return ops.speculative_accept(law, draft, law_q, seed=5, tail="redraw")

    def torchs():
        cond, uncond = pair.chunk(2)
        x = 3 * cond - 2 * uncond
        x = x.masked_fill(x < x.topk(2000, dim=-1).values[..., -1:], -torch.inf)
        return plain(x.softmax(-1), q, draft, True)

    group = f"Jacobi step {rows} x 16, V = {vocabulary}, guidance + top-k 2000, tail redrawn"
    measure(group, peer, {"arimg": ours, "plain torch": torchs}[peer], bytes=pair.nbytes)


SIZES = [(2, 16, 16384), (8, 32, 16384), (2, 16, 65536)]


def laws_and_drafts(rows, n, vocabulary):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, n + 1, vocabulary, generator=g) * 2
    drafted = logits[:, :n] + torch.randn(rows, n, vocabulary, generator=g) * 0.3
    return ops.token_law(logits), ops.sample(drafted, seed=1), ops.token_law(drafted)


@pytest.mark.parametrize("peer", ["arimg", "torch composition"])
@pytest.mark.parametrize("rule", ["partition", "ranks"])
@pytest.mark.parametrize(("rows", "n", "vocabulary"), SIZES)
def test_grouped(rows, n, vocabulary, rule, peer, measure):
    """The published rule with a redrawn tail; the peer makes the masses of groups by torch operations."""
    p, draft, q = laws_and_drafts(rows, n, vocabulary)
    generator = torch.Generator().manual_seed(2)
    groups = torch.randperm(vocabulary, generator=generator) // 8 if rule == "partition" else None

    def composed():
        if groups is None:
            masses = reference.rank_masses(p, draft, q)
        else:
            masses = reference.group_masses(p, draft, q, groups)
        return ops.speculative_accept(p, draft, q, seed=5, tail="redraw", masses=masses)

    def ours():
        return ops.grouped_accept(p, draft, q, groups, published=True, seed=5, tail="redraw")

    for a, b in zip(ours(), composed(), strict=True):
        assert torch.equal(a, b)
    group = f"grouped accept {rows} x {n}, V = {vocabulary}, {rule}, tail redrawn"
    measure(group, peer, {"arimg": ours, "torch composition": composed}[peer])


@pytest.mark.parametrize("peer", ["arimg", "torch composition"])
@pytest.mark.parametrize(("rows", "n", "vocabulary"), SIZES)
def test_shared_noise(rows, n, vocabulary, peer, measure):
    """A "gumbel" tail; the peer makes exponential numbers with torch's generator."""
    p, draft, q = laws_and_drafts(rows, n, vocabulary)

    def ours():
        return ops.speculative_accept(p, draft, q, seed=5, tail="gumbel")

    def composed():
        tokens, length = ops.speculative_accept(p, draft, q, seed=5)
        noise = torch.empty(p.weights.shape).exponential_()
        chosen = (noise / p.weights).argmin(-1)
        return torch.where(torch.arange(n + 1) >= length[:, None], chosen, tokens), length

    mine = ours()
    first = (ops.Law(law.weights[:1], law.total[:1]) for law in (p, q))
    want = reference.speculative_accept(next(first), draft[:1], next(first), seed=5, tail="gumbel")
    assert torch.equal(mine.tokens[:1], want.tokens) and torch.equal(mine.length, composed()[1])
    group = f"accept {rows} x {n}, V = {vocabulary}, tail by shared noise"
    behind = (n + 1 - mine.length).sum().item()
    measure(group, peer, {"arimg": ours, "torch composition": composed}[peer], bytes=behind * vocabulary * 4)


@pytest.mark.parametrize("peer", ["arimg", "torch composition"])
@pytest.mark.parametrize(("rows", "n"), [(1, 16), (8, 16), (64, 1), (256, 8)])
def test_gaussian(rows, n, peer, measure):
    """Continuous tokens of 16 components, as MAR has them; the peer draws all 64 tries at once."""
    g = torch.Generator().manual_seed(0)
    q_mean = torch.randn(rows, n, 16, generator=g)
    p_mean = q_mean + 0.1 * torch.randn(rows, n, 16, generator=g)
    std = torch.ones(1)
    x = q_mean + torch.randn(rows, n, 16, generator=g)
    arguments = (x, p_mean, std, q_mean, std)
    got, want = (f(*arguments, seed=5) for f in (ops.gaussian_accept, reference.gaussian_accept))
    assert torch.equal(got.length, want.length) and torch.equal(got.tries, want.tries)
    function = {"arimg": ops.gaussian_accept, "torch composition": reference.gaussian_accept}[peer]
    measure(f"gaussian accept {rows} x {n} x 16", peer, lambda: function(*arguments, seed=5))
