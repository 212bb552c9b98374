"""Grouped acceptance: the bias of the published rule by its formula, the exact rule, the dynamic groups."""

from __future__ import annotations

import math

import pytest
import torch

from arimg import ops, reference
from arimg.ops import Law

VOCABULARY = 256


def make(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def pair(n, laws):
    """n rows of one draft each: p of `laws` positions, the draft and its q; and both as probabilities."""
    logits = make(VOCABULARY, seed=1, scale=1.5)
    drafted = logits + make(VOCABULARY, seed=2, scale=0.7)
    p, q = reference.token_law(logits), reference.token_law(drafted)
    draft = reference.sample(drafted.expand(1, n, VOCABULARY), seed=3).reshape(n, 1)
    many = Law(p.weights.expand(n, laws, VOCABULARY), p.total.expand(n, laws))
    many_q = Law(q.weights.expand(n, 1, VOCABULARY), q.total.expand(n, 1))
    return many, draft, many_q, p.weights.double() / p.total, q.weights.double() / q.total


def published_law(p, q, groups):
    """q min(1, p' / q') + (1 - alpha) max(0, p - q) / Z, and alpha."""
    sums = [torch.zeros(VOCABULARY, dtype=torch.float64).index_add_(0, groups, x)[groups] for x in (p, q)]
    kept = q * (sums[0] / sums[1]).clamp(max=1)
    residual = (p - q).clamp(min=0)
    return kept + (1 - kept.sum()) * residual / residual.sum(), kept.sum().item()


def distance(p, q):
    return (p - q).abs().sum().item() / 2


def limit(p, n):
    """The distance that n draws from p exceed with probability 1e-6 (McDiarmid)."""
    return (p * (1 - p) * 2 / (math.pi * n)).sqrt().sum().item() / 2 + math.sqrt(math.log(1e6) / (2 * n))


@pytest.mark.parametrize("size", [1, 4, 16])
def test_static_groups_have_the_bias_of_the_formula_and_the_exact_rule_has_none(size):
    n = 10_000
    many, draft, q_law, p, q = pair(n, 2)
    groups = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(5)) // size
    law, alpha = published_law(p, q, groups)
    bias = distance(law, p)
    assert bias < 1e-7 if size == 1 else 0.08 < bias < 0.2
    assert alpha >= 1 - distance(p, q) - 1e-9
    got = ops.grouped_accept(many, draft, q_law, groups, published=True, seed=10**6)
    seen = got.tokens[:, 0].bincount(minlength=VOCABULARY).double() / n
    assert distance(seen, law) < limit(law, n)
    assert abs((got.length == 2).double().mean().item() - alpha) < 5 * math.sqrt(0.25 / n)

    exact = ops.grouped_accept(many, draft, q_law, groups, published=False, seed=10**6)
    seen = exact.tokens[:, 0].bincount(minlength=VOCABULARY).double() / n
    assert distance(seen, p) < limit(p, n)
    assert torch.equal(exact.length == 2, exact.tokens[:, 0] == draft[:, 0])
    assert ((exact.tokens[:, 1] >= 0) == (exact.length == 2)).all()


def test_groups_of_one_are_plain_acceptance():
    many, draft, q, _, _ = pair(2000, 2)
    got = ops.grouped_accept(many, draft, q, torch.arange(VOCABULARY), published=True, seed=4, tail="redraw")
    want = ops.speculative_accept(many, draft, q, seed=4, tail="redraw")
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.length, want.length)


@pytest.mark.parametrize("ranks, delta", [(14, 0.15), (4, 1.0), (2, 0.0), (14, 0.001), (600, 1.0)])
def test_dynamic_groups_are_windows_of_ranks(ranks, delta):
    """Against a sort, and never less than plain acceptance gives."""
    rows, n = 3, 4
    logits = make(rows, n + 1, VOCABULARY, seed=7, scale=2.0)
    p, q = reference.token_law(logits), reference.token_law(logits[:, :n] + make(rows, n, VOCABULARY, seed=8))
    draft = torch.randint(VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(9))
    got = reference.rank_masses(p, draft, q, ranks=ranks, delta=delta)
    p_mass, q_mass = reference.sampling_accept.law_masses(p), reference.sampling_accept.law_masses(q)
    for r in range(rows):
        for j in range(n):
            order = p.weights[r, j].sort(stable=True).indices.tolist()
            rank = order.index(draft[r, j].item())
            window = order[max(rank - ranks // 2, 0) : rank + ranks // 2]
            own = p_mass[r, j, draft[r, j]].item()
            near = [c for c in window if abs(p_mass[r, j, c].item() - own) <= int(delta * 2**62)]
            for mass, sums in ((p_mass, got[0]), (q_mass, got[1])):
                assert sum(mass[r, j, c].item() for c in near) == sums[r, j].item()


def test_bad_input_is_refused():
    p, draft, q = torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 5)
    with pytest.raises(ValueError, match="a partition, for the exact rule, got None"):
        ops.grouped_accept(p, draft, q, published=False, seed=0)
    with pytest.raises(ValueError, match="expected groups with 5 elements"):
        ops.grouped_accept(p, draft, q, draft.reshape(-1), published=True, seed=0)
    with pytest.raises(ValueError, match="expected an even number of ranks"):
        ops.grouped_accept(p, draft, q, published=True, seed=0, ranks=3)
