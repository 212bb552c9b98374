"""Continuous speculative acceptance: the law by Kolmogorov's distance, tries, truncation."""

from __future__ import annotations

import math

import pytest
import torch

from arimg import ops


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kolmogorov(x, mean, std):
    n = len(x)
    cdf = 0.5 * (1 + torch.erf((x.sort().values - mean) / (std * math.sqrt(2))))
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
    n = 40_000
    x = qm + qs * normal(n, 1, 1)
    p, ps_, q, qs_ = (torch.tensor(v, dtype=torch.float32) for v in (pm, ps, qm, qs))
    values, length, tries = ops.gaussian_accept(x.float(), p, ps_, q, qs_, seed=5, max_tries=40)
    assert (length == 1).all()
    got = values[:, 0, 0].double()
    assert kolmogorov(got, pm, ps) < limit(n) < kolmogorov(x[:, 0, 0], pm, ps)
    alpha = overlap(pm, ps, qm, qs)
    rejected = tries > 0
    assert abs(rejected.double().mean().item() - (1 - alpha)) < 5 * math.sqrt(alpha * (1 - alpha) / n)
    # the tries of a rejected row are geometric with success 1 - alpha
    mean, deviation = 1 / (1 - alpha), math.sqrt(alpha) / (1 - alpha)
    error = tries[rejected].double().mean().item() - mean
    assert abs(error) < 5 * deviation / math.sqrt(int(rejected.sum()))


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


def test_empty_and_bad_input():
    one = torch.tensor(1.0)
    assert ops.gaussian_accept(torch.zeros(2, 0, 3), one, one, one, one, seed=0).length.tolist() == [0, 0]
    assert ops.gaussian_accept(torch.zeros(0, 2, 3), one, one, one, one, seed=0).values.shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"expected x \[R, n, d\] with d >= 1, got \[2, 3\]"):
        ops.gaussian_accept(torch.zeros(2, 3), one, one, one, one, seed=0)
    with pytest.raises(ValueError, match=r"expected p_mean that broadcasts to \[2, 3, 4\], got \[3\]"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), torch.zeros(3), one, one, one, seed=0)
    with pytest.raises(ValueError, match="expected max_tries"):
        ops.gaussian_accept(torch.zeros(2, 3, 4), one, one, one, one, seed=0, max_tries=0)
