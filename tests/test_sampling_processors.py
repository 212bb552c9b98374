"""What stands around the filters: sets, factors, bias, forced tokens, Gumbel noise, settings of each row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.reference.sampling import exponential

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def members(*shape, seed=0, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def packed(mask):
    """Bits of a mask: bit i % 8 of byte i / 8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded.to(torch.int64) << torch.arange(8)).sum(-1).to(torch.uint8)


def on(backend, arguments):
    return {n: x.to(backend.device) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}


def draw(backend, logits, **arguments):
    got = ops.sample(logits.to(backend.device), **on(backend, arguments))
    return type(got)(*[x.cpu() for x in got]) if isinstance(got, ops.Drawn) else got.cpu()


def limit_of_chi_square(freedom):
    """The 1 - 1e-6 quantile by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9


def assert_frequencies(tokens, p):
    n = tokens.numel()
    seen = tokens.flatten().bincount(minlength=len(p)).double()
    assert (seen[p == 0] == 0).all(), "a token without probability was drawn"
    kept = p > 0
    statistic = ((seen - n * p)[kept] ** 2 / (n * p)[kept]).sum().item()
    assert statistic <= limit_of_chi_square(int(kept.sum()) - 1)


LOGITS = torch.tensor([1.2, -0.7, 0.0, 2.0, -1.5, 0.4, 0.9, -0.2, 1.7])
SEEN = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
FACTOR = torch.tensor([1.0, 0.5, 0.2, 0.3, 0.6, 1.0, 1.0, 0.9, 0.1])
BIAS = torch.tensor([0.0, 2.0, 0.0, -1.0, 2.0, 0.0, -math.inf, 2.0, 0.0])
ALLOWED = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)


def lowered(x, by):
    return torch.where(x < 0, x / by, x * by)


# name: arguments, the logits that they stand for
PROCESSORS = {
    "repetition": (
        dict(seen=SEEN, repetition_penalty=1.8),
        torch.where(SEEN, lowered(LOGITS, 1 / 1.8), LOGITS),
    ),
    "factor": (dict(factor=FACTOR), lowered(LOGITS, FACTOR)),
    "released factor": (dict(factor=FACTOR, multiply_negative=True), LOGITS * FACTOR),
    "bias": (dict(bias=BIAS), LOGITS + BIAS),
    "allowed": (dict(allowed=ALLOWED), LOGITS.where(ALLOWED, torch.tensor(-math.inf))),
    "allowed bits": (dict(allowed=packed(ALLOWED)), LOGITS.where(ALLOWED, torch.tensor(-math.inf))),
    "all": (
        dict(seen=SEEN, repetition_penalty=1.8, factor=FACTOR, bias=BIAS, allowed=ALLOWED, temperature=0.7),
        (lowered(torch.where(SEEN, lowered(LOGITS, 1 / 1.8), LOGITS), FACTOR) + BIAS).where(
            ALLOWED, torch.tensor(-math.inf)
        )
        / 0.7,
    ),
}


# --- distributions ---------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["draw", "gumbel"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_frequencies_are_those_of_the_processed_softmax(backend, name, method):
    arguments, logits = PROCESSORS[name]
    n = 300 if backend.name == "emulated" else 30_000
    tokens = draw(backend, LOGITS.expand(1, n, -1).contiguous(), seed=8, method=method, **arguments)
    assert_frequencies(tokens, logits.double().softmax(0))


@pytest.mark.parametrize(
    ("filters", "kept"), [(dict(top_k=5), 5), (dict(top_p=0.8), 4), (dict(min_p=0.25), 4)], ids=str
)
def test_gumbel_noise_draws_from_what_the_filters_keep(backend, filters, kept):
    n = 300 if backend.name == "emulated" else 30_000
    p = torch.zeros(9, dtype=torch.float64)
    best = LOGITS.argsort(descending=True)[:kept]
    p[best] = LOGITS.double()[best].softmax(0)
    tokens = draw(backend, LOGITS.expand(1, n, -1).contiguous(), seed=3, method="gumbel", **filters)
    assert_frequencies(tokens, p)


def test_suppression_lowers_what_the_released_code_raises():
    frequency = torch.tensor([100_000, 50_000, 200_000, 0])
    factor = ops.frequency_factor(frequency, 1e-4, 90_000)
    assert torch.allclose(factor, torch.tensor([math.exp(-1), 1.0, math.exp(-11), 1.0]))
    logits = torch.tensor([-1.0, 0.5, 2.0, -0.5])
    odds = []  # of a suppressed token with a negative logit against one that is not suppressed
    for released in (False, True):
        arguments = dict(factor=factor, multiply_negative=released)
        tokens = ops.sample(logits.expand(1, 20_000, 4).contiguous(), seed=1, **arguments)
        odds.append(((tokens == 0).sum() / (tokens == 1).sum()).item())
    assert odds[0] < 0.5 * math.exp(-1.5) and odds[1] > 1.5 * math.exp(-1.5)


def test_a_bias_multiplies_the_odds(backend):
    """A watermark's green tokens gain exp(delta) in odds."""
    green = members(64, seed=4)
    logits = make(64, seed=2, scale=1.0)
    n = 400 if backend.name == "emulated" else 40_000
    tokens = draw(backend, logits.expand(1, n, -1).contiguous(), seed=5, bias=2.0 * green)
    p = logits.softmax(0)[green].sum().item()
    want = p * math.e**2 / (p * math.e**2 + 1 - p)
    assert abs(green[tokens].float().mean().item() - want) < 5 * math.sqrt(want * (1 - want) / n)


# --- the same token everywhere ---------------------------------------------------------------------
def all_processors(rows, tokens, vocabulary, shape, bits=False):
    """Arguments whose processors have the given shape in front of [V]."""
    wide = {"V": (), "R": (rows,), "full": (rows, tokens)}[shape]
    allowed = members(*wide, vocabulary, seed=1, share=0.7)
    return dict(
        seen=packed(members(*wide, vocabulary, seed=2)) if bits else members(*wide, vocabulary, seed=2),
        repetition_penalty=1.3,
        factor=torch.rand(*wide, vocabulary, generator=torch.Generator().manual_seed(3)),
        bias=make(*wide, vocabulary, seed=4),
        allowed=packed(allowed) if bits else allowed,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["V", "R", "full"])
def test_tokens_equal_the_reference(backend, shape, dtype):
    for rows, tokens, vocabulary in ((3, 2, 7), (2, 2, 165), (2, 1, 1025)):
        logits = make(2 * rows, tokens, vocabulary, dtype=dtype)
        logits[0, 0, ::3] = -math.inf
        logits[1, 0, 0] = math.nan
        for method in ("draw", "gumbel"):
            arguments = all_processors(rows, tokens, vocabulary, shape, bits=method == "gumbel")
            arguments |= dict(seed=6, position=2**33, guidance=2.5, top_k=50, top_p=0.9, method=method)
            for extra in (dict(), dict(temperature=0.8, min_p=0.05, multiply_negative=True)):
                want = reference.sample(logits, **arguments, **extra, return_logprob=True)
                got = draw(backend, logits, **arguments, **extra, return_logprob=True)
                assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("vocabulary", [40961, 262144])
def test_large_vocabularies(backend, vocabulary):
    logits = make(1 if backend.name == "emulated" else 2, vocabulary)
    allowed = packed(members(vocabulary, seed=1, share=0.9))
    for method in ("draw", "gumbel"):
        arguments = dict(seed=2, allowed=allowed, top_p=0.9, method=method, return_logprob=True)
        want = reference.sample(logits, **arguments)
        assert all(torch.equal(g, w) for g, w in zip(draw(backend, logits, **arguments), want, strict=True))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    logits, arguments = make(4, 3, 130), all_processors(4, 3, 130, "R")
    for method in ("draw", "gumbel"):
        whole = draw(backend, logits, seed=40, position=9, top_p=0.9, method=method, **arguments)
        for b in range(4):
            own = {n: x[b : b + 1] if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
            one = draw(backend, logits[b : b + 1], seed=40 + b, position=9, top_p=0.9, method=method, **own)
            assert torch.equal(one[0], whole[b])


def test_k_heads_are_rows(backend):
    """ELM: logits [R, K, V]; head k of a row draws at position + k, as if it were a row of its own."""
    logits = make(3, 4, 50)
    together = draw(backend, logits, seed=7, position=8, top_k=20)
    assert together.shape == (3, 4)
    for k in range(4):
        assert torch.equal(draw(backend, logits[:, k], seed=7, position=8 + k, top_k=20), together[:, k])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_draw_leaves_the_allowed_set_or_what_the_filters_keep(backend, data):
    rows, vocabulary = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 120))
    logits = make(rows, 2, vocabulary, seed=data.draw(st.integers(0, 1000)))
    allowed = members(rows, vocabulary, seed=data.draw(st.integers(0, 1000)), share=0.4)
    allowed[:, data.draw(st.integers(0, vocabulary - 1))] = True
    k = data.draw(st.integers(1, 40))
    tokens = draw(
        backend,
        logits,
        seed=data.draw(st.integers(0, 2**40)),
        allowed=packed(allowed) if data.draw(st.booleans()) else allowed,
        top_k=k,
        top_p=data.draw(st.floats(0.1, 1.0)),
        method=data.draw(st.sampled_from(["draw", "gumbel"])),
    )
    assert allowed.gather(1, tokens).all()
    x = logits.masked_fill(~allowed[:, None], -math.inf)
    kth = x.sort(descending=True).values[..., min(k, vocabulary) - 1]
    assert (x.gather(2, tokens[..., None])[..., 0] >= kth).all()


# --- settings of each row --------------------------------------------------------------------------
def test_settings_of_each_row(backend):
    logits = make(5, 3, 200)
    per_row = dict(
        temperature=torch.tensor([0.5, 1.0, 2.0, 0.0, math.nan]),
        top_k=torch.tensor([0, 10, -3, 1000, 30]),
        top_p=torch.tensor([0.9, 1.0, 0.5, 0.3, 0.8]),
        min_p=torch.tensor([0.0, 0.1, 0.05, 0.3, 0.0]),
    )
    got = draw(backend, logits, seed=11, **per_row)
    assert torch.equal(got, reference.sample(logits, seed=11, **per_row))
    for r in range(3):
        own = {name: x[r].item() for name, x in per_row.items()}
        own["top_k"] = max(own["top_k"], 0)
        alone = draw(backend, logits[r : r + 1], seed=11 + r, **own)[0]
        assert torch.equal(alone, got[r])
    assert torch.equal(got[3:], logits[3:].argmax(-1)), "a temperature that is not above 0 is greedy"
    odd = dict(
        top_p=torch.tensor([0.0, -1.0, math.nan, 2.0, 1e-30]), min_p=torch.tensor([math.nan, 2.0, -1, 0, 0])
    )
    got = draw(backend, logits, seed=11, **odd)
    assert torch.equal(got, reference.sample(logits, seed=11, **odd))
    assert torch.equal(got[[0, 1, 4]], logits[[0, 1, 4]].argmax(-1))


# --- forced tokens, facts, noise -------------------------------------------------------------------
def test_forced_tokens(backend):
    logits = make(3, 4, 60)
    forced = torch.full((3, 4), -1)
    forced[0, 1], forced[2, 3], forced[1, 0] = 59, 0, 1000
    free = draw(backend, logits, seed=4, top_k=5)
    got = draw(backend, logits, seed=4, top_k=5, forced=forced)
    assert torch.equal(got, torch.where(forced >= 0, forced, free))
    told = draw(backend, logits, seed=4, top_k=5, forced=forced, return_logprob=True)
    assert torch.equal(told.token, got) and told.logprob[1, 0] == -math.inf
    kept = logits[0, 1] >= logits[0, 1].topk(5).values[-1]
    assert (told.logprob[0, 1] > -math.inf) == kept[59]


@pytest.mark.parametrize(
    "filters", [dict(), dict(top_k=7), dict(top_p=0.8), dict(top_k=9, min_p=0.2)], ids=str
)
def test_logprob_and_entropy(backend, filters):
    logits = make(4, 5, 90)
    got = draw(backend, logits, seed=2, return_logprob=True, **filters)
    assert torch.equal(got.token, draw(backend, logits, seed=2, **filters))
    weight = reference.sampling.token_weights(logits.flatten(0, 1), **filters).double()
    p = weight / weight.sum(-1, keepdim=True)
    x = logits.flatten(0, 1).double().masked_fill(weight == 0, -math.inf).log_softmax(-1)
    # a weight is off by 2^-31 of the largest and 2^-22 of itself at most
    log_p = x.gather(1, got.token.reshape(-1, 1))[:, 0]
    bound = 90 * 2.0**-31 / p.gather(1, got.token.reshape(-1, 1))[:, 0] + 2.0**-21
    assert ((got.logprob.flatten() - log_p).abs() <= bound + 2.0**-23 * log_p.abs()).all()
    entropy = -(x.exp() * x).nan_to_num(0.0).sum(-1)
    assert (got.entropy.flatten() - entropy).abs().max() < 2.0**-18


def test_entropy_at_the_edges(backend):
    rows = torch.tensor(
        [[0.0, 0, 0, 0], [9, math.inf, 0, math.inf], [-math.inf] * 4, [math.nan, 5, -1e30, 5]]
    )
    got = draw(backend, rows, seed=0, return_logprob=True)
    assert torch.allclose(got.entropy.exp(), torch.tensor([4.0, 2, 1, 2]))
    assert torch.allclose(got.logprob.exp(), torch.tensor([0.25, 0.5, 1, 0.5]))
    greedy = draw(backend, rows, seed=0, top_k=1, return_logprob=True)
    assert (greedy.logprob == 0).all() and (greedy.entropy == 0).all()


def test_exponential_numbers_have_the_same_bits_everywhere(backend):
    count = 20_000 if backend.name == "emulated" else 300_000
    special = torch.tensor([0, 1, 2, 3, -1, -2, 2**31 - 1, -(2**31), 2**29, 1258291200, 1258291199])
    g = torch.Generator().manual_seed(1)
    words = torch.cat([torch.randint(-(2**31), 2**31, (count,), generator=g), special]).int()
    name = "arimg_emulated" if backend.name == "emulated" else "arimg"
    got = getattr(torch.ops, name).exponentials(words.to(backend.device)).cpu()
    assert torch.equal(got, exponential(words))
    v = ((words.long() >> 1 & 0x7FFFFFFF).double() + 0.5) * 2.0**-31
    # v itself is rounded to float32, which 1 - v feels
    exact = -torch.log1p(-v)
    rounding = 2.0**-24 * v / (1 - v)
    assert ((got - exact).abs() <= exact * 2.0**-21 + rounding)[v < 1 - 2.0**-20].all()
    assert (got > 0).all() and got.isfinite().all()


def test_drafts_of_a_position_share_the_noise(backend):
    """Near distributions agree far more often by Gumbel noise than independent draws would."""
    logits = make(1, 200, 100)
    near = logits + 0.05 * make(1, 200, 100, seed=1, scale=1.0)
    agree = [
        (draw(backend, a, seed=3, method="gumbel") == draw(backend, b, seed=s, method="gumbel"))
        .float()
        .mean()
        for a, b, s in ((logits, near, 3), (logits, near, 4))
    ]
    assert agree[0] > 0.85 and agree[1] < 0.5


# --- the operator in torch -------------------------------------------------------------------------
@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    head = (make(4, 2, 30), None, 3, None, 7, 0.9, 5, 0.9, 0.01, None, None)
    none = (None, None, None, None)
    bias, mask = make(4, 2, 30), members(4, 2, 30)
    torch.library.opcheck(
        packet.sample_with, (*head, *none, mask, 1.2, None, False, bias, None, None, True, False)
    )
    row = torch.ones(4)
    forced = torch.zeros(4, 2, dtype=torch.int64)
    torch.library.opcheck(
        packet.sample_with,
        (*head, row, row.long(), row, row, None, 1.0, bias, True, None, packed(mask), forced, False, True),
    )
    torch.library.opcheck(packet.exponentials, (torch.arange(5, dtype=torch.int32),))


def test_compiles_without_graph_breaks():
    def step(logits, seeds, temperature, allowed, bias):
        return ops.sample(
            logits, seed=seeds, temperature=temperature, allowed=allowed, bias=bias, return_logprob=True
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = make(3, 2, 64), torch.arange(3), torch.full((3,), 0.8), members(3, 64), make(64)
    for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(bias=torch.zeros(4)), ValueError, r"expected bias \[5\], \[4, 5\] or \[4, 5\], got \[4\]"),
        (dict(factor=torch.zeros(5, dtype=torch.int64)), TypeError, "expected factor of float32"),
        (
            dict(allowed=torch.zeros(5)),
            TypeError,
            "expected allowed of bool, or bits of uint8, got torch.float32",
        ),
        (dict(allowed=torch.zeros(2, dtype=torch.uint8)), ValueError, r"expected allowed \[1\]"),
        (dict(repetition_penalty=2.0), ValueError, "expected seen with a repetition_penalty"),
        (dict(seen=torch.zeros(5), repetition_penalty=2.0), TypeError, "expected seen of bool"),
        (
            dict(seen=torch.zeros(5, dtype=torch.int64), repetition_penalty=2.0),
            ValueError,
            r"expected seen tokens \[4, n\], got \[5\]",
        ),
        (
            dict(seen=torch.ones(5).bool(), repetition_penalty=0.0),
            ValueError,
            "expected repetition_penalty > 0",
        ),
        (dict(forced=torch.zeros(4)), TypeError, "expected forced of torch.int64"),
        (dict(forced=torch.zeros(3, dtype=torch.int64)), ValueError, r"expected forced \[4\]"),
        (dict(method="argmax"), ValueError, "expected method 'draw' or 'gumbel', got 'argmax'"),
        (dict(temperature=torch.ones(4).double()), TypeError, "expected temperature of torch.float32"),
        (dict(top_k=torch.ones(3, dtype=torch.int64)), ValueError, r"expected top_k \[4\]"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.sample(torch.zeros(4, 5), seed=0, **change)


def test_seen_tokens_as_a_list():
    logits = make(3, 40)
    tokens = torch.tensor([[3, 7, -1, 3], [39, -1, -1, -1], [-1, -1, -1, -1]])
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0, [3, 7]] = mask[1, 39] = True
    for method in ("draw", "gumbel"):
        arguments = dict(seed=1, repetition_penalty=3.0, method=method)
        assert torch.equal(
            ops.sample(logits, seen=tokens, **arguments), ops.sample(logits, seen=mask, **arguments)
        )
