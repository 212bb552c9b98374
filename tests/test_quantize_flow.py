"""The softmax over a codebook against float64, and the flows through it against sampling and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from arimg import ops, reference
from tolerance import assert_close

# rows, codes, dimensions: tails of every tile, more than 32 dimensions, more than one segment of codes
SHAPES = [(1, 1, 1), (7, 33, 4), (65, 130, 8), (13, 300, 33), (20, 1100, 16), (3, 2050, 40)]


def make(rows, codes, dim, seed=0, shared=False, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, codebook = torch.randn(rows, dim, generator=g), torch.randn(codes, dim, generator=g)
    logits = 2 * torch.randn(1 if shared else rows, codes, generator=g)
    scale, sigma = torch.rand(rows, generator=g), 0.2 + torch.rand(rows, generator=g)
    return [t.to(device) for t in (x, codebook, logits, scale, sigma)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_the_codes(backend, shape, shared):
    inputs = make(*shape, shared=shared, device=backend.device)
    got = ops.codebook_softmax_mean(*inputs)
    # An exponent is off by the rounding of its terms, a weight by as much of itself, so is the mean.
    x, codebook, logits, scale, sigma = (t.cpu().double() for t in inputs)
    a = (scale / sigma.square())[:, None]
    terms = (
        logits.abs() + a * (x.abs() @ codebook.abs().T) + 0.5 * a * scale[:, None] * codebook.square().sum(-1)
    )
    rounding = 2.0**-24 * terms.max().item() * codebook.abs().max().item()
    assert_close(got, reference.codebook_softmax_mean, *inputs, floor=4 * rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits(backend, dtype):
    x, codebook, logits, scale, sigma = make(9, 140, 8, device=backend.device)
    got = ops.codebook_softmax_mean(x, codebook, logits.to(dtype), scale, sigma)
    assert torch.equal(got, ops.codebook_softmax_mean(x, codebook, logits.to(dtype).float(), scale, sigma))


def test_a_row_does_not_depend_on_its_batch(backend):
    x, codebook, logits, scale, sigma = make(70, 1100, 8, device=backend.device)
    together = ops.codebook_softmax_mean(x, codebook, logits, scale, sigma)
    for r in (0, 13, 69):
        s = slice(r, r + 1)
        assert torch.equal(
            ops.codebook_softmax_mean(x[s], codebook, logits[s], scale[s], sigma[s])[0], together[r]
        )


def test_excluded_codes_empty_rows_and_nan(backend):
    x, codebook, logits, scale, sigma = make(4, 70, 8, device=backend.device)
    logits[0] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 69] = 3.0
    x[2, 3] = torch.nan
    got = ops.codebook_softmax_mean(x, codebook, logits, scale, sigma)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    torch.testing.assert_close(got[1], codebook[69])
    assert got[2].isnan().all() and got[3].isfinite().all()
    assert ops.codebook_softmax_mean(x[:0], codebook, logits[:0], scale[:0], sigma[:0]).shape == (0, 8)


def total_variation(method, steps, rows=20_000):
    """Of the codes that noises are carried to, from a prior over 64 codes of 8 dimensions."""
    g = torch.Generator().manual_seed(1)
    codebook, logits = torch.randn(64, 8, generator=g), 1.5 * torch.randn(64, generator=g)
    noise = torch.randn(rows, 8, generator=g)
    drawn = ops.nearest_code(ops.codebook_flow(noise, codebook, logits, steps, method), codebook)
    frequency = drawn.bincount(minlength=64) / rows
    return 0.5 * (frequency - logits.softmax(-1)).abs().sum().item()


def test_the_flow_draws_from_the_prior():
    """Entry 38 of the systems: Heun with 10 steps is at the noise of sampling, Euler and one step are not."""
    floor = 0.5 * 64 * (2 / math.pi * (1 / 64) / 20_000) ** 0.5  # expected of as many plain draws, at most
    heun, euler, one = total_variation("heun", 10), total_variation("euler", 10), total_variation("euler", 1)
    assert heun < 1.7 * floor < 0.05
    assert euler > 2 * heun and one > 0.5


def test_the_score_is_the_gradient_of_the_log_density():
    x, codebook, logits, _, _ = make(6, 20, 4)
    t = 0.4
    x = x.double().requires_grad_()
    prior = logits.double().log_softmax(-1)
    distance = (x[:, None] - (1 - t) * codebook.double()).square().sum(-1)
    density = (prior - distance / (2 * t * t)).logsumexp(-1).sum()
    (expected,) = torch.autograd.grad(density, x)
    got = ops.codebook_score(x.detach().float(), codebook, logits, t)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_score_of_dd2_is_the_velocity_of_dd1_with_time_reversed():
    x, codebook, logits, _, _ = make(6, 20, 4)
    t = 0.3  # x_t = (1 - t) noise + t c: E[c | x] from either
    mean = x + (1 - t) * ops.codebook_velocity(x, codebook, logits, t)
    score = ops.codebook_score(x, codebook, logits, 1 - t)
    torch.testing.assert_close((t * mean - x) / (1 - t) ** 2, score, atol=1e-4, rtol=1e-4)


def test_gradient_goes_through_the_reference():
    x, codebook, logits, scale, sigma = (t.double() for t in make(3, 9, 4))
    x.requires_grad_()
    codebook.requires_grad_()
    inputs = (x, codebook, logits, scale, sigma)
    assert torch.autograd.gradcheck(reference.codebook_softmax_mean, inputs)
    ours = ops.codebook_softmax_mean(
        x.float(), codebook.float(), logits.float(), scale.float(), sigma.float()
    )
    torch.testing.assert_close(ours.double(), reference.codebook_softmax_mean(*inputs), atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    assert x.grad is not None and codebook.grad is not None


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    from arimg import _library

    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(f"no emulated kernels: {error}")
    torch.library.opcheck(getattr(torch.ops, namespace).codebook_softmax_mean, tuple(make(5, 40, 8)))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(ops.codebook_softmax_mean, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 9):
        inputs = make(rows, 40, 8)
        assert torch.equal(compiled(*inputs), ops.codebook_softmax_mean(*inputs))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(2, 9)}, ValueError, r"expected logits \[1, 9\] or \[3, 9\], got \[2, 9\]"),
        ({"logits": torch.zeros(9).long()}, TypeError, "expected floating logits, got torch.int64"),
        ({"sigma": 0.0}, ValueError, "expected a finite sigma above 0, got 0.0"),
        ({"scale": torch.zeros(2)}, ValueError, r"expected scale a number or float32 \[3\]"),
        ({"codebook": torch.zeros(9, 5)}, ValueError, r"expected x \[N, 5\], got \[3, 4\]"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    inputs = {"x": torch.zeros(3, 4), "codebook": torch.zeros(9, 4), "logits": torch.zeros(9)}
    with pytest.raises(error, match=text):
        ops.codebook_softmax_mean(**{**inputs, "scale": 1.0, "sigma": 1.0, **change})
    with pytest.raises(ValueError, match="expected the method heun or euler, got 'rk4'"):
        ops.codebook_flow(torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(9), method="rk4")
