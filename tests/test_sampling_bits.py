"""Bits drawn from pairs of logits: the law, the filters of two outcomes, the same bit everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.reference.sampling import numbers, token_weights
from arimg.reference.sampling_bits import _least, _log_one_plus, pair_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [
    dict(),
    dict(top_k=1),
    dict(top_k=2, top_p=0.97, temperature=0.5),  # NSARM
    dict(top_p=0.7),
    dict(top_p=0.5),
    dict(top_p=0.3),
    dict(min_p=0.4),
    dict(min_p=0.1, top_p=0.8, temperature=1.7),
]


def make(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def on(backend, x):
    return x.to(backend.device) if isinstance(x, torch.Tensor) else x


def draw(backend, logits, **arguments):
    arguments = {name: on(backend, value) for name, value in arguments.items()}
    got = ops.sample_bits(logits.to(backend.device), **arguments)
    return tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()


def check(backend, logits, **arguments):
    """Bits, log-probabilities and entropies of the reference, to the last bit."""
    want = reference.sample_bits(logits, return_logprob=True, **arguments)
    for got, expected in zip(draw(backend, logits, return_logprob=True, **arguments), want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(draw(backend, logits, **arguments), want[0])
    return want


# --- the law ---------------------------------------------------------------------------------------
def test_bits_have_the_frequencies_of_their_pairs(backend):
    n = 300 if backend.name == "emulated" else 20_000
    logits = make(5, 2, scale=1.0)
    bits = draw(backend, logits.expand(1, n, 5, 2).contiguous(), seed=3, temperature=0.5)
    p = (logits.double() / 0.5).softmax(-1)[:, 1]
    share = bits[0].double().mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_each_pair_is_a_row_of_sample(filters):
    """The weights are those that the filters of `sample` leave of a row of two logits."""
    x = make(300, 4, 2)
    x[:40, 0] = x[:40, 0, :1]  # ties
    x[0, 1], x[1, 1], x[2, 1] = -math.inf, math.inf, torch.tensor([-math.inf, 1.0])
    filters = dict(filters)
    scaled = x / torch.tensor(filters.pop("temperature", 1.0))
    settings = (filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0))
    got = pair_weights(scaled, _least(*settings, 1.0, scaled))
    assert torch.equal(got.reshape(-1, 2), token_weights(scaled.reshape(-1, 2), **filters))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_keep_what_their_definition_in_float64_keeps(backend, filters):
    """Nothing dropped is drawn; where the smaller outcome stays it is drawn with its probability."""
    logits = make(1, 40 if backend.name == "emulated" else 400, 6, 2, seed=4)
    bits, logprob, entropy = draw(backend, logits, seed=2, return_logprob=True, **filters)
    p = (logits.double() / filters.get("temperature", 1.0)).softmax(-1)
    large, small = p.amax(-1), p.amin(-1)
    dropped = torch.zeros_like(bits)
    if filters.get("top_k") == 1:
        dropped |= True
    dropped |= large >= filters.get("top_p", 1.0)
    dropped |= small < filters.get("min_p", 0.0) * large
    near = ((large - filters.get("top_p", 2.0)).abs() < 1e-7) | (
        (small - filters.get("min_p", -1.0) * large).abs() < 1e-7
    )
    assert near.sum() <= 2
    kept = torch.where(dropped[..., None] & (p == small[..., None]), 0.0, p)
    kept = kept / kept.sum(-1, keepdim=True)
    own = kept.gather(-1, bits.long()[..., None])[..., 0]
    assert (own[~near] > 0).all()
    # weights are rounded to 2^-30 of the larger one, exp is within 2^-22 of itself
    assert torch.allclose(logprob.double()[~near], own.log()[~near], rtol=1e-6, atol=1e-6)
    want = -torch.where(kept > 0, kept * kept.log(), 0.0).sum(-1)
    assert torch.allclose(entropy.double()[~near], want[~near], rtol=1e-5, atol=1e-6)


def test_the_logarithm_is_within_its_bound():
    r = torch.cat((torch.linspace(0, 1, 100_001), torch.logspace(-9, 0, 100_000)))
    exact = r.double().log1p()
    assert ((_log_one_plus(r) - exact).abs() <= 2**-21 * exact).all()
    assert _log_one_plus(torch.zeros(1)).item() == 0


def test_drafts_of_one_bit_are_coupled_as_well_as_can_be(backend):
    """With the same numbers two laws of a bit differ with the probability |p - q|, the least possible."""
    n = 500 if backend.name == "emulated" else 40_000
    one, other = torch.tensor([0.0, 0.4]), torch.tensor([0.0, -0.3])
    a, b = (draw(backend, x.expand(1, n, 1, 2).contiguous(), seed=8) for x in (one, other))
    gap = (one.double().softmax(-1)[1] - other.double().softmax(-1)[1]).item()
    assert abs((a != b).double().mean().item() - gap) < 5 * math.sqrt(gap * (1 - gap) / n)
    assert not (b & ~a).any()


# --- the same bit everywhere -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 14, 16, 33, 64, 65, 130])
def test_bits_equal_the_reference(backend, d, dtype):
    logits = make(2, 3, d, 2, seed=d, dtype=dtype)
    for filters in FILTERS:
        check(backend, logits, seed=9, position=2**32 - 2, **filters)
    check(backend, logits, seed=9, position=-5, guidance=3.0, temperature=0.5, top_p=0.97)


def test_settings_of_each_row(backend):
    logits = make(12, 2, 10, 2)
    inf, nan = math.inf, math.nan
    check(
        backend,
        logits,
        seed=torch.tensor([4, -1, 2**40, 7, 7, 0]),
        position=torch.tensor([2**33]),
        guidance=torch.tensor([1.0, 0.0, 3.5, -1.0, 2.0, 1.0]),
        temperature=torch.tensor([1.0, 0.0, 0.5, -1.0, nan, inf]),
        top_k=torch.tensor([0, 1, 2, 5, 1, -3]),
        top_p=torch.tensor([0.9, 0.5, 0.0, -1.0, nan, 0.8]),
        min_p=torch.tensor([0.0, 0.3, 1.0, 2.0, nan, -1.0]),
    )


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)], ids=str)
def test_bias_allowed_and_forced(backend, shape):
    logits, d = make(6, 4, 9, 2), 9
    bias = make(*shape, d, 2, seed=1)
    allowed = torch.rand(*shape, d, 2, generator=torch.Generator().manual_seed(2)) < 0.7
    forced = torch.randint(-2, 3, (3, 4, d), generator=torch.Generator().manual_seed(3))
    bits, logprob, _ = check(
        backend, logits, seed=1, guidance=2.0, temperature=0.7, bias=bias, allowed=allowed, forced=forced
    )
    assert torch.equal(bits[forced >= 0], (forced > 0)[forced >= 0])
    banned = ~allowed.expand(3, 4, d, 2) if shape != (3,) else ~allowed[:, None].expand(3, 4, d, 2)
    only_one = banned.sum(-1) == 1
    drawn = bits[only_one & (forced < 0)]
    assert torch.equal(drawn, banned[..., 0][only_one & (forced < 0)])
    impossible = only_one & (forced >= 0) & banned.gather(-1, bits.long()[..., None])[..., 0]
    assert (logprob[impossible] == -math.inf).all() and impossible.any()


def test_a_row_or_a_token_alone_gives_its_bits(backend):
    logits = make(5, 4, 20, 2)
    whole = draw(backend, logits, seed=40, position=9, top_p=0.9)
    assert whole.shape == (5, 4, 20) and whole.dtype == torch.bool
    for b in range(5):
        alone = draw(backend, logits[b : b + 1], seed=40 + b, position=9, top_p=0.9)
        assert torch.equal(alone[0], whole[b])
    assert torch.equal(draw(backend, logits[:, 2:], seed=40, position=11, top_p=0.9), whole[:, 2:])
    fewer = draw(backend, logits[:, :, :7], seed=40, position=9, top_p=0.9)
    assert torch.equal(fewer, whole[:, :, :7])  # a bit's number does not depend on how many there are


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_strides_and_filters(backend, data):
    rows, tokens, d = (data.draw(st.integers(0, n)) for n in (3, 3, 40))
    d += 1
    base = make(2 * rows, tokens + 2, d + 3, 3, seed=data.draw(st.integers(0, 1000)))
    view = data.draw(st.sampled_from(["narrow", "step", "outcomes first", "last token"]))
    if view == "narrow":
        logits = base[:, 1 : tokens + 1, 2 : d + 2, 1:]
    elif view == "step":
        logits = base[:, ::2, ::2, ::2]
    elif view == "outcomes first":
        logits = base[..., :2].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    else:
        logits = base[:, -1, :, :2]
    check(
        backend,
        logits,
        temperature=data.draw(st.floats(0.1, 10)),
        top_k=data.draw(st.integers(0, 3)),
        top_p=data.draw(st.floats(1e-6, 1)),
        min_p=data.draw(st.sampled_from([0.0, 0.1, 0.9])),
        guidance=data.draw(st.sampled_from([None, 1.0, 3.7, -0.5])),
        seed=data.draw(st.integers(-(2**70), 2**70)),
        position=data.draw(st.integers(0, 2**64)),
    )


def test_edge_cases(backend):
    nan, inf = math.nan, math.inf
    pairs = torch.tensor(
        [[nan, 0], [0, nan], [nan, nan], [-inf, -inf], [-inf, 0], [3, -inf], [0, inf], [inf, 0]]
    )
    certain = [1, 0, 0, 0, 1, 0, 1, 0]
    for filters in (dict(), dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0), dict(temperature=1e-30)):
        got = check(backend, pairs.expand(1, 9, 8, 2).contiguous(), seed=0, **filters)
        assert got[0].int().tolist() == [[certain] * 9]
        assert (got[1] == 0).all() and (got[2] == 0).all()
    equal = torch.tensor([[inf, inf], [0.0, -0.0], [5, 5]]).expand(1, 60, 3, 2).contiguous()
    share = check(backend, equal, seed=1)[0].float().mean((0, 1))
    assert ((share > 0.2) & (share < 0.8)).all()
    for filters in (dict(top_k=1), dict(top_p=0.5)):  # of equals the first
        assert not check(backend, equal, seed=1, **filters)[0].any()
    assert check(backend, equal, seed=1, top_p=0.51)[0].any()
    assert check(backend, equal, seed=1, min_p=1.0)[0].any()


def test_packed_bits(backend):
    for d in (1, 14, 63, 64):
        logits = make(2, 3, d, 2, seed=d)
        bits = draw(backend, logits, seed=5)
        packed, logprob, entropy = draw(backend, logits, seed=5, packed=True, return_logprob=True)
        assert torch.equal(packed, reference.pack_bits(bits)) and packed.dtype == torch.int64
        assert logprob.shape == entropy.shape == (2, 3, d)
        assert torch.equal(reference.sample_bits(logits, seed=5, packed=True), packed)
        if d < 64:
            assert packed.tolist() == [[int("".join(str(int(b)) for b in t), 2) for t in row] for row in bits]


def test_no_rows_no_bits(backend):
    for shape in ((0, 3, 5, 2), (2, 0, 5, 2)):
        assert draw(backend, torch.zeros(shape), seed=0).shape == shape[:-1]
        drawn = draw(backend, torch.zeros(shape), seed=0, packed=True, return_logprob=True)
        assert drawn[0].shape == shape[:-2] and drawn[1].shape == shape[:-1]


def test_a_bit_is_set_by_the_number_of_its_counter(backend):
    """The convention of docs/random-numbers.md, in float64 from the published generator."""
    logits = make(2, 3, 70, 2)
    bits = draw(backend, logits, seed=torch.tensor([11, 12]), position=6)
    word = numbers(torch.tensor([11, 12]), 6, 3, 0, 70).double()
    zero = logits.double().softmax(-1)[..., 0]
    near = (word / 2**32 - zero).abs() < 1e-7
    assert not near.any() and torch.equal(bits, word / 2**32 >= zero)


# --- the operator in torch -------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    operator = getattr(torch.ops, namespace).sample_bits
    none = (None,) * 4
    head = (make(4, 2, 10), None, 3, None, 7, 0.9, 0, 0.9, 0.01)
    torch.library.opcheck(operator, (*head, None, None, *none, None, None, None, False, False))
    row, pairs = torch.ones(2), make(2, 2, 10)
    forced = torch.zeros(2, 2, 5, dtype=torch.int64)
    each = (row, row.long(), row, row)
    torch.library.opcheck(operator, (*head, 1.5, None, *each, pairs, pairs > 0, forced, False, True))
    torch.library.opcheck(operator, (*head, None, row, *none, None, None, None, True, True))


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(logits, seeds, position):
        drawn = ops.sample_bits(
            logits, seed=seeds, position=position, top_p=0.97, guidance=1.5, return_logprob=True
        )
        return drawn.token, drawn.logprob.sum(-1)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, tokens in ((3, 4), (4, 5), (5, 9)):  # not 2, which is the size of a pair
        arguments = make(2 * rows, tokens, 14, 2), torch.arange(rows) + 7, torch.tensor([rows])
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1


def test_logits_that_need_a_gradient_are_sampled():
    logits = make(3, 2, 20, 2).requires_grad_()
    assert torch.equal(ops.sample_bits(logits, seed=1), ops.sample_bits(logits.detach(), seed=1))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(logits=torch.zeros(3, 4)),
            ValueError,
            r"expected logits \[R, ..., d, 2\] with d >= 1, got \[3, 4\]",
        ),
        (dict(logits=torch.zeros(3, 0, 2)), ValueError, r"expected logits \[R, ..., d, 2\]"),
        (dict(logits=torch.zeros(3, 4, 2).long()), TypeError, "expected logits of float32"),
        (
            dict(logits=torch.zeros(1, 65, 2), packed=True),
            ValueError,
            "expected at most 64 bits to pack, got 65",
        ),
        (dict(temperature=0.0), ValueError, "expected temperature > 0"),
        (dict(top_k=-1), ValueError, "expected top_k >= 0, got -1"),
        (dict(top_p=0.0), ValueError, r"expected top_p in \(0, 1\]"),
        (dict(min_p=1.5), ValueError, r"expected min_p in \[0, 1\]"),
        (dict(seed=1.5), TypeError, "expected seed to be an int or an int64 tensor, got float"),
        (dict(seed=torch.zeros(3).long()), ValueError, r"expected seed \[4\], one per row, got \[3\]"),
        (dict(position=torch.zeros(2).long()), ValueError, r"expected position \[1\]"),
        (
            dict(logits=torch.zeros(3, 5, 2), guidance=2.0),
            ValueError,
            r"expected logits \[2R, ..., d, 2\] with",
        ),
        (dict(guidance=math.nan), ValueError, "expected a finite guidance"),
        (dict(bias=torch.zeros(5)), ValueError, r"expected bias \[..., 5, 2\], got \[5\]"),
        (dict(bias=torch.zeros(3, 5, 2)), ValueError, r"expected bias \[10\], \[4, 10\]"),
        (dict(allowed=torch.ones(5, 2)), TypeError, "expected allowed of bool, got torch.float32"),
        (dict(forced=torch.zeros(4, 5)), TypeError, "expected forced of torch.int64"),
        (dict(forced=torch.zeros(4).long()), ValueError, r"expected forced \[20\]"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    arguments = dict(logits=torch.zeros(4, 5, 2), seed=0) | change
    with pytest.raises(error, match=text):
        ops.sample_bits(arguments.pop("logits"), **arguments)
