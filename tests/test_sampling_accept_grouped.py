"""Grouped acceptance: the bias of the published rule by its formula, the exact rule, the dynamic groups."""

from __future__ import annotations

import math

import pytest
import torch

from arimg import _library, ops, reference
from arimg.ops import Law
from arimg.ops.sampling_accept_grouped import _masses

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


def drafts_and_laws(rows, n, vocabulary, *, seed=0, **filters):
    logits = make(rows, n + 1, vocabulary, seed=seed, scale=2.0)
    p, q = (
        reference.token_law(x, **filters) for x in (logits, logits[:, :n] + make(rows, n, vocabulary, seed=8))
    )
    return p, torch.randint(vocabulary, (rows, n), generator=torch.Generator().manual_seed(9)), q


def on(backend, x):
    return (
        Law(*(on(backend, y) for y in x))
        if isinstance(x, Law)
        else None
        if x is None
        else x.to(backend.device)
    )


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 1003])
@pytest.mark.parametrize("filters", [dict(), dict(top_k=9)], ids=str)
def test_masses_equal_the_reference(backend, vocabulary, filters):
    """Partition and ranks; top-k leaves many tokens of weight 0, whose order is that of the index."""
    p, draft, q = drafts_and_laws(2, 4, vocabulary, **filters)
    starts = torch.tensor([1, -2])
    groups = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(3)) // 5
    vectors = make(vocabulary, 11, seed=5).half()

    def get(q, start, groups, ranks, delta, embedding, most):
        given = (on(backend, x) for x in (p, draft, q, groups, start))
        got = _masses(*given, ranks, delta, on(backend, embedding), most)
        return [x.cpu() for x in got]

    for law, start in ((q, None), (q, starts), (None, None), (Law(q.weights[:, :2], q.total[:, :2]), None)):
        want = reference.group_masses(p, draft, law, groups, q_start=start)
        for a, b in zip(get(law, start, groups, 14, 0.1, None, 0.5), want, strict=True):
            assert torch.equal(a, b)
        windows = [(14, 0.15, None), (2, 1.0, 40.0), (6, 0.01, 80.0)]
        if backend.name != "emulated":  # a block's rounds are slow there
            windows.append((600, 1.0, None))
        for ranks, delta, most in windows:
            embedding = None if most is None else vectors
            near = dict(embedding=embedding, max_distance=most or 0.5)
            want = reference.rank_masses(p, draft, law, ranks=ranks, delta=delta, q_start=start, **near)
            for a, b in zip(get(law, start, None, ranks, delta, embedding, most or 0.5), want, strict=True):
                assert torch.equal(a, b)


def test_absent_drafts_and_a_row_alone(backend):
    p, draft, q = drafts_and_laws(4, 3, 200)
    draft[1, 0], draft[2, 1] = -1, 200
    groups = torch.arange(200) // 4
    for parts in (groups, None):
        keywords = dict(published=True, tail="redraw", position=6)
        whole = ops.grouped_accept(
            on(backend, p), on(backend, draft), on(backend, q), on(backend, parts), seed=50, **keywords
        )
        assert whole.length[1] == 1 and whole.length[2] <= 2
        for r in range(4):
            one = slice(r, r + 1)
            alone = ops.grouped_accept(
                on(backend, Law(p.weights[one], p.total[one])),
                on(backend, draft[one]),
                on(backend, Law(q.weights[one], q.total[one])),
                on(backend, parts),
                seed=50 + r,
                **keywords,
            )
            assert torch.equal(alone.tokens, whole.tokens[one]) and alone.length[0] == whole.length[r]


def test_embedding_distance_narrows_the_window():
    """None closer than 0: plain acceptance; all closer than infinity: ranks alone; between, in between."""
    many, draft, q, _, _ = pair(3000, 2)
    vectors = make(VOCABULARY, 8, seed=6)

    def accepted(**keywords):
        got = ops.grouped_accept(many, draft, q, published=True, seed=4, delta=1.0, **keywords)
        return (got.length == 2).double().mean().item()

    plain = (ops.speculative_accept(many, draft, q, seed=4).length == 2).double().mean().item()
    alone, some, every = (accepted(embedding=vectors, max_distance=x) for x in (0.0, 14.0, math.inf))
    assert alone == plain and every == accepted()
    assert plain < some < every


def test_codebook_groups_are_near_tokens():
    vectors = make(300, 4, seed=2)
    for size, most in ((1, math.inf), (8, math.inf), (8, 1.0), (300, math.inf)):
        groups = ops.codebook_groups(vectors, size, max_distance=most)
        counts = groups.bincount()
        assert groups.shape == (300,) and groups.min() == 0 and counts.max() <= size
        if most == math.inf:
            assert (counts[:-1] == size).all()
        spread = torch.stack([vectors[groups == g].var(0, unbiased=False).sum() for g in range(len(counts))])
        if size == 8:
            assert spread.mean() < 0.5 * vectors.var(0).sum()
        for g in range(len(counts)):
            members = (groups == g).nonzero()[:, 0]
            assert ((vectors[members] - vectors[members[0]]) ** 2).sum(-1).max() <= most
    equal = ops.codebook_groups(torch.zeros(7, 2), 3)
    assert equal.tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_opcheck_and_compile():
    p, draft, q = drafts_and_laws(2, 3, 30)
    groups, vectors = (torch.arange(30) // 4).int(), make(30, 5)
    spaces = [torch.ops.arimg]
    try:
        _library.load_emulated()
        spaces.append(torch.ops.arimg_emulated)
    except OSError:
        pass
    for space in spaces:
        starts = torch.tensor([0, 1])
        torch.library.opcheck(space.group_masses, (*p, draft, *q, starts, groups, 1, 0, None, 0.5))
        torch.library.opcheck(space.group_masses, (*p, draft, None, None, None, None, 3, 2**60, vectors, 0.5))

    def step(logits, draft, q):
        law = ops.token_law(logits)
        a = ops.grouped_accept(law, draft, Law(*q), groups.long(), published=True, seed=1)
        b = ops.grouped_accept(law, draft, Law(*q), published=True, seed=1, embedding=vectors)
        return *a, *b

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    logits = make(2, 4, 30)
    for got, want in zip(compiled(logits, draft, tuple(q)), step(logits, draft, tuple(q)), strict=True):
        assert torch.equal(got, want)


def test_bad_input_is_refused():
    p, draft, q = torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 5)
    with pytest.raises(ValueError, match="a partition, for the exact rule, got None"):
        ops.grouped_accept(p, draft, q, published=False, seed=0)
    with pytest.raises(ValueError, match="expected groups with 5 elements"):
        ops.grouped_accept(p, draft, q, draft.reshape(-1), published=True, seed=0)
    with pytest.raises(ValueError, match="expected an even number of ranks"):
        ops.grouped_accept(p, draft, q, published=True, seed=0, ranks=3)
    with pytest.raises(ValueError, match=r"expected an embedding \[5, D\], got \[4, 2\]"):
        ops.grouped_accept(p, draft, q, published=True, seed=0, embedding=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="expected an embedding or groups, not both"):
        ops.grouped_accept(p, draft, q, torch.arange(5), published=True, seed=0, embedding=torch.zeros(5, 2))
    with pytest.raises(TypeError, match="expected embedding of float32, bfloat16 or float16"):
        ops.codebook_groups(torch.zeros(4, 2, dtype=torch.int64), 2)
