"""Row-interval attention: gradients, sinks, own keys, shared heads and head factors, against torch."""

from __future__ import annotations

import pytest
import torch

from arimg import ops, reference
from arimg.layout import Layout
from test_attention import DTYPES, make, moved, random_intervals
from tolerance import assert_close

PYRAMID = Layout.scales([1, 2, 3, 4, 5])  # 55 tokens


def grouped(B, H, Hkv, L, D, dtype=torch.float32, device="cpu", keys=None):
    q, k, v = make(B, H, L, D, dtype, device, keys=keys)
    grad = torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)
    return q, k[:, :Hkv], v[:, :Hkv], grad


def attend(q, k, v, *rest, **options):
    return ops.row_interval_attention(q, k, v, *rest, **options)


def gradients(function, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def check(got_function, formula, tensors, grad, names="qkv"):
    """Every gradient as near to float64 as four times what torch's in the same dtype is.

    Four, not two: the weights are computed again from the lse, whose own rounding they inherit.
    """
    got = gradients(got_function, tensors, grad)
    for i, name in enumerate(names):

        def one(*given, i=i):
            *inputs, g = given
            return gradients(formula, inputs, g.to(inputs[0].dtype))[i]

        try:
            assert_close(got[i], one, *tensors, grad, k=4)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["level-causal", "level-diagonal", "token-causal", "full"])
def test_gradients(backend, rule, dtype):
    q, k, v, grad = grouped(1, 2, 2, PYRAMID.length, 32, dtype, backend.device)
    start, end = PYRAMID.intervals(rule)
    check(
        lambda *t: attend(*t, start.to(backend.device), end.to(backend.device)),
        lambda *t: reference.row_interval_attention(*t, start, end),
        (q, k, v),
        grad,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 128, 256])
def test_head_dims(backend, D, dtype):
    q, k, v, grad = grouped(1, 1, 1, 19, D, dtype, backend.device)
    start, end = Layout.scales([2, 3, (2, 3)]).intervals("level-causal")
    check(
        lambda *t: attend(*t, start.to(backend.device), end.to(backend.device)),
        lambda *t: reference.row_interval_attention(*t, start, end),
        (q, k, v),
        grad,
    )


CASES = {
    "sinks": dict(sinks=3),
    "sinks beyond a tile": dict(sinks=70),
    "self": dict(self_key=True),
    "both": dict(sinks=2, self_key=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_sinks_and_own_keys_with_random_intervals(backend, case, dtype):
    B, L = 2, 75
    q, k, v, grad = grouped(B, 2, 1, L, 16, dtype, backend.device)
    start, end = random_intervals(B, L)
    end[0, 3], start[0, 3] = 5, 9
    options = CASES[case]

    def formula(*t):
        return reference.row_interval_attention(*t, start, end, **options)

    def ours(*t):
        return attend(*t, start.to(backend.device), end.to(backend.device), **options)

    assert_close(ours(q, k, v), formula, q, k, v)
    check(ours, formula, (q, k, v), grad)


@pytest.mark.parametrize("H, Hkv", [(4, 2), (3, 1), (2, 2)])
def test_shared_heads_and_head_factors(backend, H, Hkv):
    q, k, v, grad = grouped(2, H, Hkv, 33, 32, device=backend.device)
    start, end = random_intervals(2, 33, seed=4)
    factor = torch.linspace(0.0, 2.0, H, device=backend.device)  # a factor of 0 has a gradient too

    def formula(q, k, v, factor):
        return reference.row_interval_attention(q, k, v, start, end, head_scale=factor)

    def ours(q, k, v, factor):
        return attend(q, k, v, start.to(backend.device), end.to(backend.device), head_scale=factor)

    assert_close(ours(q, k, v, factor), formula, q, k, v, factor)
    check(ours, formula, (q, k, v, factor), grad, ["q", "k", "v", "head_scale"])


@pytest.mark.parametrize("L, keys", [(5, 90), (1, 3), (40, 41)])
def test_fewer_queries_than_keys(backend, L, keys):
    q, k, v, grad = grouped(1, 2, 2, L, 24, device=backend.device, keys=keys)
    end = torch.arange(keys - L + 1, keys + 1, dtype=torch.int32)
    start = (end - 7).clamp(min=0)

    def formula(*t):
        return reference.row_interval_attention(*t, start, end - 1, self_key=True)

    def ours(*t):
        return attend(*t, start.to(backend.device), (end - 1).to(backend.device), self_key=True)

    assert_close(ours(q, k, v), formula, q, k, v)
    check(ours, formula, (q, k, v), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lse(backend, dtype):
    q, k, v, _ = grouped(2, 2, 1, 40, 16, dtype, backend.device)
    start, end = random_intervals(2, 40, seed=2)
    end[1, 7] = start[1, 7]
    _, lse = attend(q, k, v, *moved((start, end), backend.device), return_lse=True)
    _, want = reference.row_interval_attention(
        q.cpu().double(), k.cpu().double(), v.cpu().double(), start, end, return_lse=True
    )
    assert lse.dtype == torch.float32 and lse.shape == (2, 2, 40)
    assert torch.equal(lse.cpu().isinf(), want.isinf()) and (lse[1, :, 7] == -torch.inf).all()
    finite = want.isfinite()
    assert (lse.cpu()[finite] - want[finite]).abs().max() < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_gradients(backend, dtype):
    B, L, H, D = 2, 21, 2, 32
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(B, L, 3, H, D + 1, generator=g).to(dtype).to(backend.device)[..., 1:]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.randn(B, L, H, D, generator=g).to(dtype).to(backend.device).transpose(1, 2)
    rule = moved(random_intervals(B, L), backend.device)
    # expanded: all strides 0
    for g_out in (grad, torch.ones((), dtype=dtype, device=backend.device).expand(grad.shape)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        got = torch.autograd.grad(attend(*leaves, *rule), leaves, g_out)
        want = gradients(
            lambda *t: attend(*t, *rule), [t.contiguous() for t in (q, k, v)], g_out.contiguous()
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_row_alone_has_the_gradients_of_the_row_in_a_batch(backend):
    q, k, v, grad = grouped(3, 4, 2, 50, 32, device=backend.device)
    start, end = moved(random_intervals(3, 50), backend.device)
    whole = gradients(lambda *t: attend(*t, start, end), (q, k, v), grad)
    for b in range(3):
        s = slice(b, b + 1)
        alone = gradients(lambda *t: attend(*t, start[b], end[b]), (q[s], k[s], v[s]), grad[s])  # noqa: B023
        assert all(torch.equal(a, w[s]) for a, w in zip(alone, whole))


def test_gradients_are_the_same_from_run_to_run_and_with_threads():
    q, k, v, grad = grouped(1, 4, 4, 300, 64)
    rule = Layout.scales([(1, 30), (2, 35), (2, 100)]).intervals("level-causal")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(lambda *t: attend(*t, *rule), (q, k, v), grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_keys_and_no_rows(backend):
    rows = torch.zeros(3, dtype=torch.int32, device=backend.device)
    q = torch.ones(1, 2, 3, 16, device=backend.device, requires_grad=True)
    k = torch.ones(1, 2, 0, 16, device=backend.device, requires_grad=True)
    out = attend(q, k, k, rows, rows + 4)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all() and k.grad.shape == k.shape
    none = torch.ones(1, 2, 0, 16, device=backend.device, requires_grad=True)
    many = torch.ones(1, 2, 5, 16, device=backend.device, requires_grad=True)
    attend(none, many, many, rows[:0], rows[:0]).sum().backward()
    assert (many.grad == 0).all()


def test_the_oracle_has_the_gradient_of_its_differences():
    q, k, v, _ = grouped(1, 2, 1, 9, 8)
    rule = random_intervals(1, 9)
    inputs = [t.double().requires_grad_() for t in (q, k, v, torch.tensor([0.5, 1.5]))]

    def oracle(q, k, v, factor):
        return reference.row_interval_attention(q, k, v, *rule, head_scale=factor, sinks=1, self_key=True)

    assert torch.autograd.gradcheck(oracle, inputs)


def test_training_compiles_without_graph_breaks():
    q, k, v, grad = grouped(1, 2, 2, 14, 16)
    start, end = Layout.scales([1, 2, 3]).intervals("level-causal")

    def step(q, k, v):
        return ops.row_interval_attention(q * 2, k, v, start, end) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = gradients(compiled, (q, k, v), grad), gradients(step, (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(sinks=-1), ValueError, "expected sinks >= 0, got -1"),
        (
            dict(k=torch.zeros(2, 2, 4, 16), v=torch.zeros(2, 2, 4, 16), self_key=True),
            ValueError,
            "a key per query",
        ),
        (dict(k=torch.zeros(2, 3, 5, 16)), ValueError, r"expected k \[2, a divisor of 4, keys, 16\]"),
        (dict(v=torch.zeros(2, 2, 6, 16)), ValueError, r"expected v of k's shape \[2, 2, 5, 16\]"),
        (
            dict(head_scale=torch.zeros(4).half()),
            TypeError,
            "expected head_scale of float32, got torch.float16",
        ),
        (dict(head_scale=torch.zeros(2)), ValueError, r"expected head_scale \[4\] on cpu, got \[2\] on cpu"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    rows = torch.zeros(5, dtype=torch.int32)
    q, k = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 5, 16)
    with pytest.raises(error, match=text):
        ops.row_interval_attention(**(dict(q=q, k=k, v=k, row_start=rows, row_end=rows) | change))
