"""Keeping the most confident proposals; guidance formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arimg import _library, ops, reference
from arimg.guidance import BeyondConditional, FromUnconditional, Guidance, linear


def make(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def keep(backend, confidence, count, candidates=None):
    on = [x.to(backend.device) if isinstance(x, torch.Tensor) else x for x in (confidence, count, candidates)]
    return ops.keep_most_confident(*on).cpu()


def check(backend, confidence, count, candidates=None):
    """The bits of the reference, and in each row exactly its count."""
    got = keep(backend, confidence, count, candidates)
    assert torch.equal(got, reference.keep_most_confident(confidence, count, candidates))
    rows, length = confidence.shape
    most = torch.full((rows,), length) if candidates is None else candidates.sum(-1)
    wanted = torch.as_tensor(count).expand(rows).clamp(min=0)
    assert torch.equal(got.sum(-1), torch.minimum(wanted, most))
    return got


# --- keep-n-most-confident -------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_keeps_the_largest_and_of_equals_the_first(backend, data):
    rows, length = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 45))
    values = st.sampled_from([math.nan, -math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf])

    def table(of, dtype):
        each = [[data.draw(of) for _ in range(length)] for _ in range(rows)]
        return torch.tensor(each, dtype=dtype).reshape(rows, length)

    confidence = table(values, data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    count = torch.tensor([data.draw(st.integers(-2, length + 2)) for _ in range(rows)], dtype=torch.int64)
    candidates = table(st.booleans(), torch.bool)
    kept = check(backend, confidence, count, candidates)
    for r in range(rows):
        value = [-math.inf if math.isnan(c) else c for c in confidence[r].tolist()]
        order = sorted((i for i in range(length) if candidates[r, i]), key=lambda i: (-value[i], i))
        assert set(kept[r].nonzero().flatten().tolist()) == set(order[: max(0, int(count[r]))])
    n = data.draw(st.integers(-2, length + 2))
    assert torch.equal(
        keep(backend, confidence, n), check(backend, confidence, n, torch.ones_like(candidates))
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_lengths_and_strides(backend, data):
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 300))
    base = make(rows + 1, 2 * length + 3, seed=data.draw(st.integers(0, 1000)))
    dense = make(rows + 1, 2 * length + 3, seed=1) > data.draw(st.sampled_from([-9.0, 0.0, 2.0]))
    pick = {
        "narrow": lambda x: x[1:, 3 : length + 3],
        "step": lambda x: x[:rows, : 2 * length : 2],
        "shared": lambda x: x[:1, :length].expand(rows, length),
        "transposed": lambda x: x[:rows, :length].t().contiguous().t(),
    }
    confidence, candidates = (pick[data.draw(st.sampled_from(sorted(pick)))](x) for x in (base, dense))
    if data.draw(st.booleans()):
        confidence = (confidence * 2).round()  # many ties
    check(backend, confidence, data.draw(st.integers(0, length)), candidates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 16, 257, 1024, 4096])
def test_equals_the_reference(backend, length, dtype):
    confidence = make(4, length, seed=length).to(dtype)
    confidence[1] = confidence[1].sigmoid().log()  # as log-probabilities are
    confidence[2] = confidence[2].round()
    candidates = make(4, length, seed=1) < 0.5
    for count in (0, 1, length // 3, length - 1, length):
        check(backend, confidence, count, candidates)
    check(backend, confidence, torch.tensor([0, length // 2, 1, 10**12]))


@pytest.mark.parametrize("length", [20_000, 50_000])
def test_long_rows(backend, length):
    """Also one that does not fit into a block's shared memory."""
    confidence = make(2, length, seed=2)
    confidence[1] = confidence[1].round()
    check(backend, confidence, torch.tensor([length // 3, 777]), make(2, length, seed=3) > 0)


def test_values_that_are_hard_to_bracket(backend):
    """Neighbouring floats, huge ranges, denormals, infinities of both signs, nothing but one value."""
    g = torch.Generator().manual_seed(2)
    rows = [
        torch.nextafter(torch.full((500,), 1.0), torch.tensor(2.0)) + torch.arange(500) * 2.0**-23,
        torch.exp(-torch.rand(500, generator=g) * 100),
        -torch.exp(torch.rand(500, generator=g) * 88),
        torch.randn(500, generator=g) * 1e-42,
        torch.linspace(-3e38, 3e38, 500),
        torch.where(torch.rand(500, generator=g) < 0.5, math.inf, -math.inf),
        torch.where(torch.rand(500, generator=g) < 0.5, math.inf, torch.randn(500, generator=g)),
        torch.where(torch.rand(500, generator=g) < 0.9, -math.inf, torch.randn(500, generator=g)),
        torch.where(torch.rand(500, generator=g) < 0.9, math.nan, torch.randn(500, generator=g)),
        torch.full((500,), -math.inf),
        torch.full((500,), math.nan),
        torch.full((500,), 3.0),
    ]
    confidence = torch.stack(rows)[:, torch.randperm(500, generator=g)]
    candidates = torch.rand(len(rows), 500, generator=g) < 0.8
    for count in (1, 30, 200, 260, 399, 499):
        check(backend, confidence, count)
        check(backend, confidence, count, candidates)


def test_rows_without_candidates_and_counts_beyond_them(backend):
    confidence = make(5, 70)
    candidates = torch.zeros(5, 70, dtype=torch.bool)
    candidates[1, 69] = candidates[2, :3] = candidates[3] = True
    for count in (-3, 0, 1, 3, 70, 71, 2**40):
        check(backend, confidence, count, candidates)
    check(backend, confidence, torch.tensor([5, 0, -(2**60), 69, 2**60]), candidates)


def test_a_row_alone_keeps_the_same(backend):
    confidence, candidates = make(6, 300).round(), make(6, 300, seed=1) > 0
    count = torch.tensor([0, 5, 50, 100, 299, 1])
    whole = check(backend, confidence, count, candidates)
    for r in range(6):
        alone = keep(backend, confidence[r : r + 1], count[r : r + 1], candidates[r : r + 1])
        assert torch.equal(alone[0], whole[r])


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    operator = getattr(torch.ops, namespace).keep_confident
    torch.library.opcheck(operator, (make(3, 20), None, 4, None))
    torch.library.opcheck(operator, (make(3, 20), torch.tensor([1, 2, 30]), 0, make(3, 20, seed=1) > 0))


def test_bad_confidence_is_refused():
    confidence = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"expected confidence \[R, L\], got \[5\]"):
        ops.keep_most_confident(torch.zeros(5), 1)
    with pytest.raises(
        TypeError, match=r"expected confidence of float32, bfloat16 or float16, got torch\.int64"
    ):
        ops.keep_most_confident(confidence.long(), 1)
    with pytest.raises(TypeError, match="expected count to be an int or an int64 tensor, got float"):
        ops.keep_most_confident(confidence, 1.5)
    with pytest.raises(ValueError, match=r"expected count \[2\], one per row, got \[3\]"):
        ops.keep_most_confident(confidence, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected candidates of torch.bool"):
        ops.keep_most_confident(confidence, 1, confidence)
    with pytest.raises(ValueError, match=r"expected candidates \[R, L\], got \[5, 2\]"):
        ops.keep_most_confident(confidence, 1, torch.ones(5, 2, dtype=torch.bool))


def test_keeping_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ops.keep_most_confident, fullgraph=True, dynamic=True, backend=backend)
    for rows, length in ((3, 20), (4, 33), (2, 50)):
        arguments = make(rows, length), torch.arange(rows) * 9, make(rows, length, seed=1) > 0
        assert torch.equal(compiled(*arguments), ops.keep_most_confident(*arguments))
    assert len(graphs) == 1


# --- guidance --------------------------------------------------------------------------------------
@pytest.mark.parametrize("formula", [FromUnconditional(), BeyondConditional()])
def test_formulas_give_the_scale_of_sample(formula):
    cond, uncond = make(2, 3, 40).double()
    for strength in (0.0, 0.5, 1.0, 4.0):
        s = formula.scale(strength)
        assert torch.allclose(formula.mix(cond, uncond, strength), s * cond + (1 - s) * uncond, atol=1e-12)


def test_one_strength_means_two_scales():
    assert FromUnconditional().scale(1.5) == 1.5 and BeyondConditional().scale(1.5) == 2.5
    var = Guidance(1.5, linear, BeyondConditional())
    assert var.scale(0, 10) == 1.0 and var.scale(9, 10) == 2.5
    assert Guidance(4.0, linear).scale(5, 11) == 2.5 and Guidance(4.0, until=3).scale(3, 11) is None
