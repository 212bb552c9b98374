"""Continuous speculative acceptance: the same result everywhere, its law, tries, truncation."""

from __future__ import annotations

import math

import pytest
import torch

from arimg import _library, ops, reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(rows, n, d, *, seed=0, gap=0.5, dtype=torch.float32):
    """Drafts from q, and the means and deviations of p and q."""
    q_mean = normal(rows, n, d, seed=seed)
    p_mean = q_mean + gap * normal(rows, n, d, seed=seed + 1)
    p_std, q_std = (0.5 + torch.rand(rows, n, d, generator=torch.Generator().manual_seed(s)) for s in (8, 9))
    x = q_mean + q_std * normal(rows, n, d, seed=seed + 2)
    return tuple(t.to(dtype) for t in (x, p_mean, p_std, q_mean, q_std))


def accept(backend, *tensors, **keywords):
    def on(x):
        return x.to(backend.device) if isinstance(x, torch.Tensor) else x

    got = ops.gaussian_accept(*(on(t) for t in tensors), **{name: on(x) for name, x in keywords.items()})
    return tuple(t.cpu() for t in got)


def same(got, want):
    """Equal decisions; values that were drawn again may round the other way."""
    assert torch.equal(got[1], want.length) and torch.equal(got[2], want.tries)
    a, b = got[0].double(), want.values.double()
    assert torch.equal(a.isnan(), b.isnan())
    differs = (a != b) & ~a.isnan()
    assert differs.double().mean() < 1e-2
    step = torch.finfo(got[0].dtype).eps
    assert ((a - b).abs() <= step * b.abs())[differs].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(backend, dtype):
    for rows, n, d, gap in ((3, 5, 16, 0.2), (4, 1, 1, 1.0), (2, 33, 3, 0.1), (2, 2, 37, 0.4)):
        for tries in (1, 2, 40):
            tensors = heads(rows, n, d, gap=gap, dtype=dtype)
            sigma = 0.3 * normal(rows, n, seed=4)
            for numbers in (
                dict(seed=7, position=2**34, log_sigma=-0.2),
                dict(seed=torch.arange(rows) - 2, position=torch.arange(rows) * 9, log_sigma=sigma),
            ):
                got = accept(backend, *tensors, max_tries=tries, **numbers)
                same(got, reference.gaussian_accept(*tensors, max_tries=tries, **numbers))


def test_every_backend_gives_the_same_bits(backend):
    tensors = heads(20, 6, 19, gap=0.15)
    got = accept(backend, *tensors, seed=3)
    assert 20 < int(got[1].sum()) < 120 and int(got[2].max()) > 1
    want = torch.ops.arimg.gaussian_accept(*tensors, None, 3, None, 0, None, 0.0, 64)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_shared_heads_and_strides(backend):
    x, p_mean, _, q_mean, _ = heads(3, 4, 6, gap=0.3)
    p_std, q_std = torch.tensor([0.9]), torch.tensor(1.1)
    shared = (x, p_mean[:, :1], p_std, q_mean[0], q_std)
    full = tuple(t.expand(3, 4, 6).contiguous() for t in shared)
    want = accept(backend, *full, seed=2)
    for got in (
        accept(backend, *shared, seed=2),
        accept(backend, *(t.transpose(0, 2).contiguous().transpose(0, 2) for t in full), seed=2),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_what_is_no_number_is_rejected(backend):
    """NaN, infinite and zero deviations: the draft goes, the last try stands."""
    for which, value in ((0, math.nan), (0, math.inf), (1, math.nan), (2, 0.0), (2, -1.0), (2, math.inf),
                         (3, math.nan), (4, 0.0), (4, math.nan), (4, math.inf)):  # fmt: skip
        tensors = tuple(t.clone() for t in heads(2, 3, 5, gap=0.0))
        tensors[2][:] = tensors[4]  # q = p
        tensors[which][0, 1, 2] = value
        got = accept(backend, *tensors, seed=1, max_tries=20)
        same(got, reference.gaussian_accept(*tensors, seed=1, max_tries=20))
        assert got[1].tolist() == [2, 3] and got[2][1] == 0
        assert got[2][0] > 0 if which == 0 else got[2][0] == 20


def kolmogorov(x, mean, std):
    n = len(x)
    cdf = 0.5 * (1 + torch.erf((x.sort().values.double() - mean) / (std * math.sqrt(2))))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((cdf - steps[:-1]).max().item(), (steps[1:] - cdf).max().item())


def limit(n):
    """What n draws from the right law exceed with probability 1e-6 (Dvoretzky, Kiefer, Wolfowitz)."""
    return math.sqrt(math.log(2e6) / (2 * n))


def overlap(pm, ps, qm, qs):
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = (
        torch.exp(-0.5 * ((grid - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for m, s in ((pm, ps), (qm, qs))
    )
    return torch.trapezoid(torch.minimum(p, q), grid).item()


@pytest.mark.parametrize("pm, ps, qm, qs", [(1.0, 1.0, 0.0, 1.0), (0.3, 0.8, 0.0, 1.1)])
def test_one_step_heads_give_the_law_of_the_target(pm, ps, qm, qs):
    """Kolmogorov's distance below 0.002 takes millions of draws: 400k perfect ones exceed it in one of 12."""
    n = 4_000_000
    x = (qm + qs * normal(n, 1, 1)).float()
    p, ps_, q, qs_ = (torch.tensor(v, dtype=torch.float32) for v in (pm, ps, qm, qs))
    values, length, tries = ops.gaussian_accept(x, p, ps_, q, qs_, seed=5)
    assert (length == 1).all()
    assert kolmogorov(values[:, 0, 0], p.double(), ps_.double()) < limit(n) < 2e-3
    assert kolmogorov(x[:100_000, 0, 0], pm, ps) > 0.05
    alpha = overlap(pm, ps, qm, qs)
    rejected = tries > 0
    assert abs(rejected.double().mean().item() - (1 - alpha)) < 5 * math.sqrt(alpha * (1 - alpha) / n)
    # the tries of a rejected row are geometric with success 1 - alpha
    mean, deviation = 1 / (1 - alpha), math.sqrt(alpha) / (1 - alpha)
    error = tries[rejected].double().mean().item() - mean
    assert abs(error) < 5 * deviation / math.sqrt(int(rejected.sum()))


def test_the_numbers_of_a_redraw_are_normal_and_independent():
    """With a q far away every draft goes and the first try stands: plain draws from p, in all components."""
    n, d = 50_000, 6
    zero, one, far = torch.zeros(()), torch.ones(()), torch.tensor(100.0)
    x = torch.full((n, 1, d), 100.0)
    values, _, tries = ops.gaussian_accept(x, zero, one, far, one, seed=11)
    assert (tries == 1).all()
    z = values[:, 0].double()
    for i in range(d):
        assert kolmogorov(z[:, i], 0.0, 1.0) < limit(n)
    off = (z.T @ z / n - torch.eye(d)).abs()
    assert off.max() < 5 * math.sqrt(2 / n)


def test_equal_heads_accept_everything():
    x, mean = normal(300, 4, 16).float(), normal(4, 16, seed=1).float()
    std = torch.tensor(0.7)
    values, length, tries = ops.gaussian_accept(x, mean, std, mean, std, seed=1)
    assert torch.equal(values, x) and (length == 4).all() and (tries == 0).all()


def test_nothing_behind_a_rejection_is_final():
    x = torch.zeros(50, 3, 2)
    q_mean = torch.zeros(3, 2)
    p_mean = q_mean.clone()
    p_mean[1] = 40.0
    values, length, tries = ops.gaussian_accept(
        x, p_mean, torch.tensor(1.0), q_mean, torch.tensor(1.0), seed=1
    )
    assert (length == 2).all() and (tries == 1).all()
    assert torch.equal(values[:, 0], x[:, 0]) and ((values[:, 1] - 40).abs() < 7).all()


def test_sigma_is_not_inverted():
    """Accepted with probability sigma where the last steps agree."""
    n, sigma = 20_000, 0.25
    one = torch.tensor(1.0)
    x = normal(n, 1, 1).float()
    _, _, tries = ops.gaussian_accept(
        x, 0 * one, one, 0 * one, one, seed=3, log_sigma=math.log(sigma), max_tries=3
    )
    error = (tries == 0).double().mean().item() - sigma
    assert abs(error) < 5 * math.sqrt(sigma * (1 - sigma) / n)
    # sigma p - q is nowhere positive: the last try stands
    assert (tries[tries > 0] == 3).all()


def test_a_row_alone_equals_the_row_in_a_batch():
    x, mean = normal(6, 3, 5).float(), normal(6, 3, 5, seed=1).float()
    std, position = torch.tensor(1.0), torch.arange(6) * 7
    whole = ops.gaussian_accept(x, mean, std, 0 * mean, std, seed=9, position=position)
    for r in range(6):
        one = slice(r, r + 1)
        alone = ops.gaussian_accept(
            x[one], mean[one], std, 0 * mean[one], std, seed=torch.tensor([9 + r]), position=position[one]
        )
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[r])


def test_opcheck():
    with_kernels = [torch.ops.arimg]
    try:
        _library.load_emulated()
        with_kernels.append(torch.ops.arimg_emulated)
    except OSError:
        pass
    x, *given = heads(2, 3, 5)
    numbers = torch.tensor([4, 5])
    sigma = torch.zeros(2, 3, dtype=torch.float64)
    for namespace in with_kernels:
        op = namespace.gaussian_accept
        torch.library.opcheck(op, (x, *given, numbers, 0, numbers, 3, sigma, 0.0, 8))
        torch.library.opcheck(
            op, (x, *(t[:1, :1].expand(2, 3, 5) for t in given), None, 1, None, 2, None, 0.1, 8)
        )


def test_compiles_without_graph_breaks_and_without_recompiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, pm, ps, qm, qs, seeds):
        return tuple(ops.gaussian_accept(x * 1, pm, ps, qm, qs, seed=seeds, position=seeds + 1))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, n in ((2, 3), (5, 4), (3, 9)):
        arguments = *heads(rows, n, 7), torch.arange(rows)
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) == 1


def test_empty_and_bad_input():
    one = torch.tensor(1.0)
    assert ops.gaussian_accept(torch.zeros(2, 0, 3), one, one, one, one, seed=0).length.tolist() == [0, 0]
    assert ops.gaussian_accept(torch.zeros(0, 2, 3), one, one, one, one, seed=0).values.shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"expected x \[R, n, d\] with d >= 1, got \[2, 3\]"):
        ops.gaussian_accept(torch.zeros(2, 3), one, one, one, one, seed=0)
    with pytest.raises(ValueError, match=r"expected p_mean that broadcasts to \[2, 3, 4\], got \[3\]"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), torch.zeros(3), one, one, one, seed=0)
    with pytest.raises(TypeError, match="expected seed to be an int or an int64 tensor, got float"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), one, one, one, one, seed=0.5)
    with pytest.raises(TypeError, match=r"expected q_std of x's dtype torch.float32, got torch.float64"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), one, one, one, one.double(), seed=0)
    with pytest.raises(ValueError, match=r"expected log_sigma that broadcasts to \[2, 3\], got \[4\]"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), one, one, one, one, seed=0, log_sigma=torch.zeros(4))
    with pytest.raises(ValueError, match="expected max_tries"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), one, one, one, one, seed=0, max_tries=0)
