"""Speculative acceptance: the same result everywhere, its law by enumeration, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.ops import Law

TAILS = ["none", "redraw", "couple", "gumbel"]
FILTERS = [dict(), dict(top_k=5), dict(top_k=1), dict(top_p=0.8, temperature=1.3), dict(min_p=0.1, top_k=20)]


def make(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def on(backend, x):
    if isinstance(x, torch.Tensor):
        return x.to(backend.device)
    if isinstance(x, Law):
        return Law(on(backend, x.weights), on(backend, x.total))
    return tuple(on(backend, y) for y in x) if isinstance(x, tuple) else x


def accept(backend, *arguments, **keywords):
    keywords = {name: on(backend, value) for name, value in keywords.items()}
    result = ops.speculative_accept(*(on(backend, x) for x in arguments), **keywords)
    return result.tokens.cpu(), result.length.cpu()


def window(rows, n, vocabulary, *, seed=0, near=0.4, **filters):
    """p, drafts and the q they were drawn from; q is p disturbed by `near`."""
    logits = make(rows, n + 1, vocabulary, seed=seed)
    drafted = logits[:, :n] + make(rows, n, vocabulary, seed=seed + 1, scale=near)
    draft = (
        reference.sample(drafted, seed=31, position=1000) if n else torch.zeros(rows, 0, dtype=torch.int64)
    )
    return reference.token_law(logits, **filters), draft, reference.token_law(drafted)


def probabilities(law):
    return law.weights.double() / law.total[..., None]


def same(got, want):
    assert torch.equal(got[0], want.tokens) and torch.equal(got[1], want.length)


def chi_square_limit(freedom):
    """Wilson and Hilferty's quantile of the chi-square distribution at z = 4.75 (1e-6)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_frequencies(tokens, p):
    seen = tokens.bincount(minlength=len(p)).double()
    assert (seen[p == 0] == 0).all()
    expected = (len(tokens) * p)[p > 0]
    statistic = ((seen[p > 0] - expected) ** 2 / expected).sum().item()
    assert statistic <= chi_square_limit(max(int((p > 0).sum()) - 1, 1))


# --- laws ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 300])
def test_laws_equal_the_reference(backend, vocabulary, filters):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = make(4, 3, vocabulary, seed=vocabulary, dtype=dtype)
        logits[0, 0] = math.nan
        logits[1, 0, ::2] = -math.inf
        logits[2, 0, 0] = math.inf
        got = on(backend, logits)
        for guidance in (None, 2.5, torch.tensor([0.5, 3.0])):
            want = reference.token_law(logits, guidance=guidance, **filters)
            law = ops.token_law(got, guidance=on(backend, guidance), **filters)
            assert torch.equal(law.weights.cpu(), want.weights) and torch.equal(law.total.cpu(), want.total)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=torch.tensor([0.5, 0.0, 2.0])),
        dict(top_k=torch.tensor([3, 0, 1]), top_p=0.9),
        dict(top_p=torch.tensor([0.5, 1.0, 0.9]), guidance=torch.tensor([1.0, 3.0, 0.5])),
        dict(min_p=torch.tensor([0.0, 0.2, 0.01]), temperature=0.7),
    ],
    ids=lambda s: "+".join(s),
)
def test_settings_of_one_per_row(backend, settings):
    """As `sample` takes them: the same law row by row, and drawn from it the same tokens."""
    logits = make(6 if "guidance" in settings else 3, 2, 90)
    keywords = {name: on(backend, x) for name, x in settings.items()}
    law = ops.token_law(on(backend, logits), **keywords)
    want = reference.token_law(logits, **settings)
    assert torch.equal(law.weights.cpu(), want.weights) and torch.equal(law.total.cpu(), want.total)
    tokens, _ = accept(backend, want, torch.full((3, 1), -1), seed=4, tail="gumbel")
    assert torch.equal(tokens[:, 1], reference.sample(logits, seed=4, method="gumbel", **settings)[:, 1])


def test_large_laws_equal_the_reference(backend):
    """Longer than what a CUDA block keeps in shared memory."""
    logits = make(1, 41000)
    for filters in (dict(top_k=900), dict()):
        law, want = ops.token_law(on(backend, logits), **filters), reference.token_law(logits, **filters)
        assert torch.equal(law.weights.cpu(), want.weights) and torch.equal(law.total.cpu(), want.total)


def test_masses_add_up_to_2_to_the_62():
    for law in (
        reference.token_law(make(50, 1000, scale=5.0)),
        Law(torch.full((1, 2**20), 2**30, dtype=torch.int32), torch.tensor([2**50])),
        Law(torch.tensor([[1, 2, 0]], dtype=torch.int32), torch.tensor([3])),
    ):
        total = reference.sampling_accept.law_masses(law).sum(-1)
        short = 1 - total.double() / 2**62
        assert (short >= 0).all() and (short < 2**-31 + law.weights.shape[-1] * 2**-62).all()


# --- the same tokens everywhere --------------------------------------------------------------------
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 64, 1000, 4100])
def test_tokens_equal_the_reference(backend, vocabulary, tail):
    for rows, n, near in ((3, 0, 0.0), (4, 3, 0.4), (2, 18, 0.1), (2, 5, 3.0)):
        p, draft, q = window(rows, n, vocabulary, near=near, top_k=max(2, vocabulary // 3))
        for start in (None, torch.arange(rows) - 1):
            keywords = dict(seed=5, position=2**33 + torch.arange(rows), q_start=start, tail=tail, step=2)
            got = accept(backend, p, draft, q, **keywords)
            same(got, reference.speculative_accept(p, draft, q, **keywords))
        same(accept(backend, p, draft, seed=1), reference.speculative_accept(p, draft, seed=1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_drafts_and_starts(backend, data):
    rows, n, vocabulary = (data.draw(st.integers(*range_)) for range_ in ((0, 3), (0, 6), (1, 70)))
    p, draft, q = window(rows, n, vocabulary, seed=data.draw(st.integers(0, 99)), near=0.2)
    laws = data.draw(st.integers(0, n))
    q = Law(q.weights[:, :laws], q.total[:, :laws])
    holes = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) < 0.1
    draft = torch.where(holes, data.draw(st.sampled_from([-1, vocabulary, 2**40])), draft)
    start = torch.tensor([data.draw(st.integers(-3, n)) for _ in range(rows)], dtype=torch.int64)
    keywords = dict(
        seed=data.draw(st.integers(-(2**70), 2**70)),
        position=data.draw(st.integers(-5, 2**64)),
        q_start=data.draw(st.sampled_from([None, start])),
        tail=data.draw(st.sampled_from(TAILS)),
        step=data.draw(st.integers(0, 2**30)),
    )
    got = accept(backend, p, draft, q, **keywords)
    same(got, reference.speculative_accept(p, draft, q, **keywords))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    p, draft, q = window(5, 6, 200, near=0.2)
    position = torch.tensor([3, 9, 0, 40, 2**40])
    whole = accept(backend, p, draft, q, seed=70, position=position, tail="couple")
    for r in range(5):
        one = slice(r, r + 1)
        alone = accept(
            backend,
            Law(p.weights[one], p.total[one]),
            draft[one],
            Law(q.weights[one], q.total[one]),
            seed=70 + r,
            position=position[one],
            tail="couple",
        )
        assert torch.equal(alone[0], whole[0][one]) and torch.equal(alone[1], whole[1][one])


def test_logits_strides_and_tensors_of_numbers(backend):
    logits = make(3, 5, 90)
    logits[..., ::3] = -math.inf
    draft = torch.randint(0, 90, (3, 4), generator=torch.Generator().manual_seed(0))
    want = accept(backend, reference.token_law(logits), draft, seed=4, position=6, tail="couple", step=9)
    numbers = dict(seed=torch.tensor([4, 5, 6]), position=torch.tensor([6]), step=torch.tensor([9]))
    got = accept(backend, logits, draft.t().contiguous().t(), tail="couple", **numbers)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    law = reference.token_law(make(3, 9, 90))
    view = Law(law.weights[:, ::2], law.total[:, ::2])
    packed = Law(view.weights.contiguous(), view.total.contiguous())
    same(accept(backend, view, draft, seed=4), reference.speculative_accept(packed, draft, seed=4))


# --- what it means ---------------------------------------------------------------------------------
def test_without_drafts_it_is_sample(backend):
    logits = make(300, 1, 40)
    tokens, length = accept(backend, logits, torch.zeros(300, 0, dtype=torch.int64), seed=3, position=8)
    assert torch.equal(tokens, reference.sample(logits, seed=3, position=8)) and (length == 1).all()


def test_drafts_from_the_target_itself_are_all_accepted(backend):
    p, _, _ = window(40, 6, 100)
    draft = reference.sampling_accept.draw_from(
        p.weights[:, :6].long(), torch.arange(40)[:, None] + 5, torch.arange(6), 0
    )
    tokens, length = accept(backend, p, draft, p, seed=5)
    assert (length == 7).all() and torch.equal(tokens[:, :6], draft)
    # without drafts the tail draws the same tokens, from the same numbers
    none = accept(backend, p, torch.full_like(draft, -1), seed=5, tail="redraw")
    assert (none[1] == 1).all() and torch.equal(tokens[:, 1:], none[0][:, 1:])


def test_missing_drafts_are_drawn_from_p(backend):
    p, draft, _ = window(3, 4, 50)
    draft[1, 2], draft[2, 0] = -1, 50
    tokens, length = accept(backend, p, draft, seed=2, q=Law(p.weights[:, :4], p.total[:, :4]))
    want = reference.sampling_accept.draw_from(
        p.weights.long(), torch.tensor([2, 3, 4])[:, None], torch.arange(5), 2
    )
    assert length[1] <= 3 and length[2] == 1
    assert tokens[2, 0] == want[2, 0] and (length[1] < 3 or tokens[1, 2] == want[1, 2])


@pytest.mark.parametrize("how", ["drawn", "fixed", "missing"])
@pytest.mark.parametrize("filters", [dict(), dict(top_k=4)], ids=str)
def test_the_first_token_has_the_law_of_p(backend, how, filters):
    """Chi-square at a fixed seed; q misses tokens of p and has some of its own."""
    n = 400 if backend.name == "emulated" else 40_000
    logits, drafted = make(11, seed=5, scale=1.0), make(11, seed=6, scale=1.5)
    drafted[3] = -math.inf
    p, q = reference.token_law(logits, **filters), reference.token_law(drafted)
    every = Law(p.weights.expand(n, 2, 11).contiguous(), p.total.expand(n, 2).contiguous())
    draft = reference.sample(drafted.expand(1, n, 11), seed=9).reshape(n, 1)
    laws = Law(q.weights.expand(n, 1, 11).contiguous(), q.total.expand(n, 1).contiguous())
    if how == "missing":
        draft = torch.full_like(draft, -1)
    tokens, length = accept(backend, every, draft, laws if how == "drawn" else None, seed=10**6)
    assert_frequencies(tokens[:, 0], probabilities(p))
    assert_frequencies(tokens[:, 1][length == 2], probabilities(p)) if how != "missing" else None
    if how == "drawn":  # accepted as often as the laws overlap
        overlap = torch.minimum(probabilities(p), probabilities(q)).sum().item()
        bound = 5 * math.sqrt(overlap * (1 - overlap) / n)
        assert abs((length == 2).double().mean().item() - overlap) < bound


@pytest.mark.parametrize("tail", ["redraw", "couple", "gumbel"])
def test_tail_tokens_have_the_law_of_p(backend, tail):
    """Behind a rejection: new drafts from p, coupled ones equal to the old with probability 1 - TV."""
    n = 300 if backend.name == "emulated" else 40_000
    logits, drafted = make(9, seed=5, scale=1.0), make(9, seed=5, scale=1.0) + make(9, seed=8, scale=0.5)
    p, q = reference.token_law(logits), reference.token_law(drafted)
    every = Law(p.weights.expand(n, 3, 9).contiguous(), p.total.expand(n, 3).contiguous())
    laws = Law(q.weights.expand(n, 2, 9).contiguous(), q.total.expand(n, 2).contiguous())
    draft = reference.sample(drafted.expand(2, n, 9), seed=9).t().contiguous()
    draft[:, 0] = -1
    tokens, length = accept(backend, every, draft, laws, seed=10**6, tail=tail, step=4)
    assert (length == 1).all()
    for j in range(3):
        assert_frequencies(tokens[:, j], probabilities(p))
    stays = (tokens[:, 1] == draft[:, 1]).double().mean().item()
    overlap = torch.minimum(probabilities(p), probabilities(q)).sum().item()
    bound = 5 * math.sqrt(overlap * (1 - overlap) / n)
    assert abs(stays - overlap) < bound if tail == "couple" else stays < overlap - bound


def test_shared_noise_keeps_the_token_of_laws_that_differ_a_little():
    """P(same token) of the Gumbel coupling is at least (1 - TV) / (1 + TV); independent draws agree less."""
    n, logits = 20_000, make(9, seed=5, scale=1.0)
    laws = [reference.token_law(logits + d) for d in (0, make(9, seed=8, scale=0.5))]
    drawn = [
        reference.shared_noise_draw(
            Law(law.weights.expand(1, n, 9), law.total.expand(1, n)), seed=3, position=17
        )[0]
        for law in laws
    ]
    a, b = (probabilities(law) for law in laws)
    tv = (a - b).abs().sum().item() / 2
    assert_frequencies(drawn[1], b)
    same_token = (drawn[0] == drawn[1]).double().mean().item()
    assert same_token > (1 - tv) / (1 + tv) - 5 * math.sqrt(0.25 / n) > (a * b).sum().item() + 0.2


def test_tail_none_is_minus_one_and_the_others_are_sample(backend):
    logits = make(50, 5, 30)
    draft = torch.randint(0, 30, (50, 4), generator=torch.Generator().manual_seed(0))
    none, length = accept(backend, logits, draft, seed=7, position=3)
    redrawn, _ = accept(backend, logits, draft, seed=7, position=3, tail="redraw")
    shared, _ = accept(backend, logits, draft, seed=7, position=3, tail="gumbel")
    behind = torch.arange(5) >= length[:, None]
    assert behind.any() and (none[behind] == -1).all()
    assert torch.equal(redrawn[behind], reference.sample(logits, seed=7, position=3)[behind])
    assert torch.equal(redrawn[~behind], none[~behind]) and torch.equal(shared[~behind], none[~behind])
    want = reference.sample(logits, seed=7, position=3, method="gumbel")
    assert torch.equal(shared[behind], want[behind])


# --- the operator in torch -------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    torch.library.opcheck(
        packet.token_law, (make(4, 3, 30), 0.9, 5, 0.9, 0.01, None, torch.tensor([1.5, 2.0]), *(None,) * 4)
    )
    two = torch.tensor([0.5, 0.9])
    rows = (two + 1, torch.tensor([3, 0]), two, two / 9)
    torch.library.opcheck(packet.token_law, (make(2, 3, 30), 1.0, 0, 1.0, 0.0, None, None, *rows))
    p, draft, q = window(2, 3, 30)
    numbers = torch.tensor([1, 2])
    torch.library.opcheck(
        packet.speculative_accept,
        (*p, draft, *q, numbers, None, None, numbers, 0, numbers, 0, numbers[:1], 0, 2),
    )
    nothing = (None,) * 6
    torch.library.opcheck(packet.speculative_accept, (*p, draft, *nothing, 3, None, 4, None, 0, 0))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(logits, draft, law, start, seeds, position):
        p = ops.token_law(logits, top_k=20, guidance=1.5)
        q = Law(*law)
        tokens, length = ops.speculative_accept(
            p, draft, q, q_start=start, seed=seeds, position=position, tail="redraw"
        )
        return tokens + 1, length, p.weights

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, n in ((2, 6), (3, 9), (5, 12)):
        _, draft, q = window(rows, n, 64)
        logits, numbers = make(2 * rows, n + 1, 64), torch.arange(rows) + 1
        arguments = logits, draft, tuple(q), numbers, numbers + 9, numbers * 3
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(p=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "expected p to be a Law or logits"),
        (dict(p=torch.zeros(2, 4)), ValueError, r"expected p \[R, n \+ 1, V\] with V >= 1, got \[2, 4\]"),
        (dict(p=torch.zeros(2, 3, 4)), ValueError, r"expected draft \[2, 2\] for p, got \[2, 3\]"),
        (dict(draft=torch.zeros(2, 3)), TypeError, "expected draft of torch.int64, got torch.float32"),
        (dict(q=torch.zeros(2, 3, 6)), ValueError, r"expected q \[2, m, 5\], got \[2, 3, 6\]"),
        (
            dict(q=Law(torch.zeros(2, 3, 5), torch.zeros(2, 3))),
            TypeError,
            "expected q of int32 weights and int64 totals, got torch.float32",
        ),
        (dict(q_start=torch.zeros(3, dtype=torch.int64)), ValueError, "expected q_start with 2 elements"),
        (dict(position=torch.zeros(3, dtype=torch.int64)), ValueError, r"expected position \[2\], one"),
        (dict(seed=1.5), TypeError, "expected seed to be an int or an int64 tensor, got float"),
        (dict(step=torch.zeros(1)), TypeError, "expected step of torch.int64, got torch.float32"),
        (dict(tail="some"), ValueError, "expected tail to be one of none, redraw, couple, gumbel, got some"),
        (dict(masses=(torch.zeros(2), torch.zeros(2))), TypeError, "expected masses of torch.int64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, error, text):
    arguments = dict(p=torch.zeros(2, 4, 5), draft=torch.zeros(2, 3, dtype=torch.int64), seed=0) | change
    with pytest.raises(error, match=text):
        ops.speculative_accept(arguments.pop("p"), arguments.pop("draft"), **arguments)
