"""Sampling: the exact distribution, the kept sets, and the same token everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.reference.sampling import _philox, exp_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [
    dict(),
    dict(top_k=1),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(top_k=6, top_p=0.8),
    dict(top_k=5, top_p=0.9, min_p=0.1, temperature=1.4),
    dict(top_p=0.6, temperature=0.5),
]
LARGE_FILTERS = [dict(), dict(top_k=900, top_p=0.96), dict(top_p=0.9, temperature=0.8), dict(top_k=1)]


def make(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def on(backend, x):
    return x.to(backend.device) if isinstance(x, torch.Tensor) else x


def draw(backend, logits, **arguments):
    arguments = {name: on(backend, value) for name, value in arguments.items()}
    return ops.sample(logits.to(backend.device), **arguments).cpu()


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The definition by sorting, in float64, for one row; and how near top-p's cut each cumulative sum is."""
    x = logits.double() / temperature
    order = sorted(range(len(x)), key=lambda i: (-x[i].item(), i))
    kept = order
    if top_k == 1:
        kept = order[:1]
    elif 0 < top_k < len(x):
        kept = [i for i in order if x[i] >= x[order[top_k - 1]]]
    p = torch.zeros_like(x)
    p[kept] = x[kept].softmax(0)
    distance = math.inf
    if top_p < 1:
        cumulative = p[kept].flip(0).cumsum(0).flip(0)  # of the token and all that are less likely
        distance = (cumulative - (1 - top_p)).abs().min().item()
        kept = [i for n, i in enumerate(kept) if n == 0 or cumulative[n] > 1 - top_p]
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    out = torch.zeros_like(x)
    out[kept] = p[kept] / p[kept].sum()
    return out, distance


# --- numbers ---------------------------------------------------------------------------------------
def test_philox_known_answers():
    """The published vectors of Philox4x32-10, all four words."""
    vectors = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in vectors:
        got = _philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
        assert [w.item() for w in got] == [int(w, 16) for w in words.split()]


def test_uniform_numbers(backend):
    # counter 0, key 0, draw 0: the first published vector
    first = ops.philox_uniform(torch.zeros(1, dtype=torch.int64, device=backend.device), 0, 1).item()
    assert first == ((0x6627E8D5 >> 8) + 0.5) * 2.0**-24
    seeds = torch.tensor([0, -1, 2**62, 12345])
    for position, n, number in [(0, 300, 0), (2**32 - 5, 40, 7), (-3, 9, 2**32 - 1), (2**63 - 2, 5, 1)]:
        got = ops.philox_uniform(seeds.to(backend.device), position, n, draw=number).cpu()
        assert torch.equal(got, reference.philox_uniform(seeds, position, n, draw=number))
    assert ops.philox_uniform(on(backend, seeds), 5, 0).shape == (4, 0)


def test_uniform_numbers_never_reach_one(backend):
    """A counter whose word 0 begins with 24 ones: its number would round to 1."""
    seed = torch.zeros(1, dtype=torch.int64, device=backend.device)
    assert ops.philox_uniform(seed, 38471471, 1).item() == 1 - 2**-24


def test_exp_has_the_same_bits_everywhere(backend):
    count = 20_000 if backend.name == "emulated" else 400_000
    special = torch.tensor([0.0, -0.0, -1e-45, -1e-30, -21.48, -22.5, -1e30, -math.inf, math.nan])
    d = torch.cat([-torch.rand(count, generator=torch.Generator().manual_seed(1)) * 23, special])
    name = "arimg_emulated" if backend.name == "emulated" else "arimg"
    got = getattr(torch.ops, name).exp_weights(d.to(backend.device)).cpu().long()
    assert torch.equal(got, exp_weight(d))
    exact = d.double().exp().nan_to_num(0.0) * 2**30
    assert ((got - exact).abs() <= 0.5 + 1e-7 * exact).all()
    assert got[-len(special)] == got[-len(special) + 1] == 2**30 and got[-1] == 0


# --- distribution ----------------------------------------------------------------------------------
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_are_those_of_the_float64_softmax(backend, filters):
    """Chi-square at a fixed seed: the statistic must lie below the 1 - 1e-6 quantile."""
    logits = make(11, seed=5, scale=1.0)
    logits[3] = logits[7]
    p, _ = probabilities(logits, **filters)
    n = 400 if backend.name == "emulated" else 40_000
    drawn = draw(backend, logits.expand(1, n, 11).contiguous(), seed=21, **filters)[0]
    seen = drawn.bincount(minlength=11).double()
    assert (seen[p == 0] == 0).all(), "a dropped token was drawn"
    kept = p > 0
    statistic = ((seen - n * p)[kept] ** 2 / (n * p)[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's quantile of the chi-square distribution at z = 4.75
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert statistic <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_stay_in_the_kept_set(backend, filters, dtype):
    """Against the sort in float64; only rows with a cut within rounding of a token may differ."""
    rows, vocabulary = (6, 40) if backend.name == "emulated" else (60, 200)
    logits = make(rows, vocabulary, seed=3, dtype=dtype)
    near = 0
    for repeat in range(4):
        drawn = draw(backend, logits, seed=100 * repeat, **filters)
        for row, token in zip(logits, drawn.tolist()):
            p, distance = probabilities(row, **filters)
            near += distance < 1e-6 and p[token] == 0
            assert p[token] > 0 or distance < 1e-6
    assert near <= rows // 20


# --- the same token everywhere ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 111, 1000, 4096])
def test_tokens_equal_the_reference(backend, vocabulary, dtype):
    rows = 6
    for scale in (0.05, 2.0, 40.0):
        logits = make(rows, vocabulary, seed=vocabulary, scale=scale, dtype=dtype)
        logits[1, ::2] = -math.inf
        logits[2] = 0
        for filters in [*FILTERS, dict(top_k=50), dict(top_k=vocabulary), dict(top_p=1e-12), dict(min_p=1.0)]:
            want = reference.sample(logits, seed=9, position=2**40, **filters)
            assert torch.equal(draw(backend, logits, seed=9, position=2**40, **filters), want)


@pytest.mark.parametrize("vocabulary", [32000, 40961, 131072, 262144])
def test_large_vocabularies(backend, vocabulary):
    rows = 1 if backend.name == "emulated" else 3
    logits = make(rows, vocabulary, seed=1)
    for filters in LARGE_FILTERS[1:3] if backend.name == "emulated" else LARGE_FILTERS:
        want = reference.sample(logits, seed=4, **filters)
        assert torch.equal(draw(backend, logits, seed=4, **filters), want)


def test_values_that_are_hard_to_bracket(backend):
    """Many ties, neighbouring floats, huge ranges, denormals, both signs."""
    g = torch.Generator().manual_seed(2)
    rows = [
        torch.randint(-2, 3, (500,), generator=g).float(),
        torch.nextafter(torch.full((500,), 1.0), torch.tensor(2.0)) + torch.arange(500) * 2.0**-23,
        torch.exp(-torch.rand(500, generator=g) * 100),
        -torch.exp(torch.rand(500, generator=g) * 88),
        torch.randn(500, generator=g) * 1e-42,
        torch.cat([torch.full((250,), 1e9), torch.full((250,), 1e9 - 64)]),
        torch.linspace(-3e38, 3e38, 500),
        torch.full((500,), -3.4028234663852886e38),
    ]
    logits = torch.stack(rows)
    logits = logits[:, torch.randperm(500, generator=g)]
    for filters in [dict(top_k=k) for k in (2, 100, 250, 499)] + [dict(top_p=p) for p in (0.01, 0.5, 0.999)]:
        for seed in (0, 50):
            want = reference.sample(logits, seed=seed, **filters)
            assert torch.equal(draw(backend, logits, seed=seed, **filters), want), filters


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_strides_and_filters(backend, data):
    rows, tokens = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    vocabulary = data.draw(st.integers(1, 150))
    base = make(2 * rows, tokens + 2, vocabulary + 3, seed=data.draw(st.integers(0, 1000)))
    view = data.draw(st.sampled_from(["narrow", "swapped", "step"]))
    if view == "narrow":
        logits = base[:, 1 : tokens + 1, 2 : vocabulary + 2]
    elif view == "swapped":
        logits = base.transpose(0, 1)[: 2 * (tokens // 2)]
    else:
        logits = base[:, ::2, ::2]
    filters = dict(
        temperature=data.draw(st.floats(0.1, 10)),
        top_k=data.draw(st.integers(0, 200)),
        top_p=data.draw(st.floats(1e-6, 1)),
        min_p=data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        guidance=data.draw(st.sampled_from([None, 1.0, 3.7, -0.5])),
        seed=data.draw(st.integers(-(2**70), 2**70)),
        position=data.draw(st.integers(0, 2**64)),
    )
    assert torch.equal(draw(backend, logits, **filters), reference.sample(logits, **filters))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    logits = make(5, 3, 300)
    whole = draw(backend, logits, seed=40, position=9, top_k=60, top_p=0.9)
    assert whole.shape == (5, 3)
    for b in range(5):
        assert torch.equal(
            draw(backend, logits[b : b + 1], seed=40 + b, position=9, top_k=60, top_p=0.9)[0], whole[b]
        )
        one = draw(backend, logits[b, 2], seed=40 + b, position=11, top_k=60, top_p=0.9)
        assert one.shape == () and one == whole[b, 2]


def test_seed_position_and_guidance_as_tensors(backend):
    logits = make(6, 4, 90)
    seeds = torch.tensor([5, 6, 7])
    want = draw(backend, logits, seed=5, position=12, guidance=2.5, top_k=30)
    same = draw(
        backend, logits, seed=seeds, position=torch.tensor([12]), guidance=torch.full((3,), 2.5), top_k=30
    )
    assert torch.equal(same, want)
    per_row = torch.tensor([1.0, 2.5, 7.0])
    got = draw(backend, logits, seed=seeds, position=12, guidance=per_row, top_k=30)
    assert torch.equal(got, reference.sample(logits, seed=seeds, position=12, guidance=per_row, top_k=30))
    assert torch.equal(got[1], want[1])


def test_guidance_equals_the_manual_combination(backend):
    """With numbers whose combination is exact in float32, so that there is nothing to round."""
    logits = (make(8, 120) * 16).round() / 16
    cond, uncond = logits.chunk(2)
    want = draw(backend, 2.5 * cond - 1.5 * uncond, seed=3, top_p=0.8)
    assert torch.equal(draw(backend, logits, seed=3, top_p=0.8, guidance=2.5), want)


def test_edge_cases(backend):
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[nan, 0, nan, -1], [0, inf, 3, nan], [-inf] * 4, [nan] * 4, [2, 5, 5, 1]])
    assert draw(backend, rows, seed=0, top_k=1).tolist() == [1, 1, 0, 0, 1]
    assert draw(backend, rows, seed=0, top_p=1e-9).tolist() == [1, 1, 0, 0, 1]
    assert draw(backend, rows[1:4], seed=0).tolist() == [1, 0, 0]
    several = torch.tensor([inf, 9.0, inf, -inf, inf]).expand(1, 200, 5).contiguous()
    for filters in (dict(), dict(top_k=2), dict(top_p=0.99), dict(temperature=0.1)):
        assert set(draw(backend, several, seed=1, **filters)[0].tolist()) == {0, 2, 4}
    ties = torch.zeros(1, 300, 4)
    assert set(draw(backend, ties, seed=1, top_k=2)[0].tolist()) == {0, 1, 2, 3}  # all tie with the 2nd
    assert set(draw(backend, ties, seed=1, top_p=0.5)[0].tolist()) == {0, 1}  # 2 and 3 go first
    zeros = torch.tensor([0.0, -0.0, 0.0]).expand(1, 100, 3).contiguous()
    assert set(draw(backend, zeros, seed=1, top_k=2)[0].tolist()) == {0, 1, 2}
    masked = torch.tensor([[0.0, -inf, 1.0], [0.5, -inf, 1.0]])
    assert draw(backend, masked, seed=0, guidance=3.0).item() in (0, 2)


def test_empty_inputs(backend):
    assert draw(backend, torch.zeros(0, 5), seed=0).shape == (0,)
    assert draw(backend, torch.zeros(3, 0, 5), seed=0).shape == (3, 0)
    assert draw(backend, torch.zeros(0, 4, 5), seed=0, guidance=2.0).shape == (0, 4)


# --- the operator in torch -------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    tail = (0.9, 5, 0.9, 0.01)
    torch.library.opcheck(packet.sample, (make(4, 2, 30), None, 3, None, 7, *tail, None, None))
    seeds, position = torch.tensor([1, 2]), torch.tensor([5])
    torch.library.opcheck(
        packet.sample, (make(4, 2, 30), seeds, 0, position, 0, *tail, None, torch.tensor([1.5, 2.0]))
    )
    torch.library.opcheck(packet.philox_uniform, (seeds, 3, 10, 0))
    torch.library.opcheck(packet.exp_weights, (torch.tensor([-1.0, 0.0]),))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(logits, seeds, position):
        return ops.sample(logits, seed=seeds, position=position, top_k=20, top_p=0.9, guidance=1.5) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, tokens in ((2, 3), (3, 5), (4, 9)):
        arguments = make(2 * rows, tokens, 64), torch.arange(rows) + 7, torch.tensor([rows])
        assert torch.equal(compiled(*arguments), step(*arguments))
    assert len(graphs) == 1


def test_logits_that_need_a_gradient_are_sampled():
    logits = make(3, 20).requires_grad_()
    assert torch.equal(ops.sample(logits, seed=1), ops.sample(logits.detach(), seed=1))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(logits=torch.zeros(3, 0)), ValueError, r"expected logits \[..., V\] with V >= 1, got \[3, 0\]"),
        (dict(logits=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "expected logits of float32"),
        (dict(temperature=0.0), ValueError, "expected temperature > 0 .*, got 0.0"),
        (dict(temperature=-1.0), ValueError, "expected temperature > 0"),
        (dict(temperature=math.nan), ValueError, "expected temperature > 0"),
        (dict(top_k=-1), ValueError, "expected top_k >= 0, got -1"),
        (dict(top_p=0.0), ValueError, r"expected top_p in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), ValueError, r"expected top_p in \(0, 1\], got 1.5"),
        (dict(min_p=-0.1), ValueError, r"expected min_p in \[0, 1\], got -0.1"),
        (dict(seed=1.5), TypeError, "expected seed to be an int or an int64 tensor, got float"),
        (dict(seed=torch.zeros(3)), TypeError, "expected seed of torch.int64, got torch.float32"),
        (
            dict(seed=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"expected seed \[4\], one per row, got \[2\]",
        ),
        (dict(position=torch.zeros(2, dtype=torch.int64)), ValueError, r"expected position \[1\]"),
        (dict(guidance=math.inf), ValueError, "expected a finite guidance, got inf"),
        (
            dict(logits=torch.zeros(3, 4), guidance=2.0),
            ValueError,
            r"expected logits \[2R, ..., V\] with guidance",
        ),
        (dict(guidance=torch.zeros(3)), ValueError, r"expected guidance \[2\]"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    arguments = dict(logits=torch.zeros(4, 5), seed=0) | change
    with pytest.raises(error, match=text):
        ops.sample(arguments.pop("logits"), **arguments)
