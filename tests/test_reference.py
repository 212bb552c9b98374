"""The oracle itself, against published values, closed forms and loops written from the definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import reference
from arimg.reference.sampling import _philox, token_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_philox_known_answers() -> None:
    """First words of the published test vectors of Philox4x32-10 (Salmon et al.)."""
    cases = [
        ([0] * 4, [0] * 2, 0x6627E8D5),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
    ]
    for counter, key, word in cases:
        got = _philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
        assert got[0].item() == word


def test_uniform_numbers_depend_on_seed_position_and_draw_alone() -> None:
    a = reference.philox_uniform(torch.tensor([7, -3, 2**40]), 5, 100)
    assert a.shape == (3, 100) and a.dtype == torch.float32
    assert torch.equal(reference.philox_uniform(-3, 25, 80), a[1:2, 20:])
    assert not torch.equal(reference.philox_uniform(7, 5, 100, draw=1), a[:1])
    many = reference.philox_uniform(1, 2**33, 100_000)
    assert many.min() > 0 and many.max() < 1
    assert abs(many.mean().item() - 0.5) < 4 / math.sqrt(12 * many.numel())


def test_draws_have_the_right_frequencies() -> None:
    logits = torch.tensor([1.0, 2.0, -torch.inf, 3.0, 0.0])
    n = 40_000
    drawn = reference.sample(logits.expand(1, n, 5), seed=3, temperature=0.8)
    p = (logits / 0.8).softmax(-1)
    error = drawn[0].bincount(minlength=5) / n - p
    assert (error.abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def filtered(logits: Tensor, top_k: int, top_p: float) -> set[int]:
    """Tokens that remain, by a sort in float64: the definition, word by word."""
    kth = logits.double().sort(descending=True).values[top_k - 1] if top_k else -math.inf
    left = [i for i in range(len(logits)) if logits[i] >= kth]
    p = logits.double()[left].softmax(-1).tolist()
    ascending = sorted(zip(p, left), key=lambda pair: (pair[0], -pair[1]))
    kept, total = set(left), 0.0
    for probability, i in ascending[:-1]:
        total += probability
        if total <= 1 - top_p:
            kept.discard(i)
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (7, 1.0), (20, 0.5), (900, 0.96), (1, 0.3)])
def test_filters_follow_the_definition(top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 50, generator=generator()) * 3
    logits[:, 10:14] = logits[:, :4]  # ties
    kept = token_weights(logits, top_k=top_k, top_p=top_p) > 0
    for row, mask in zip(logits, kept):
        assert set(mask.nonzero().flatten().tolist()) == filtered(row, min(top_k, 50), top_p)


def test_sample_edge_cases() -> None:
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[nan, 0, nan], [0, inf, 3], [-inf, -inf, -inf], [nan] * 3, [2, 5, 5]])
    assert reference.sample(rows, seed=0, top_k=1).tolist()[:4] == [1, 1, 0, 0]
    assert reference.sample(rows, seed=0, top_p=1e-9).tolist() == [1, 1, 0, 0, 1]
    assert reference.sample(torch.tensor([0.0, 9.0]), seed=1, top_k=1).shape == ()
    logits = torch.randn(4, 6, 30, generator=generator())
    drawn = reference.sample(logits, seed=11, position=3)
    assert torch.equal(reference.sample(logits[2:3, 4:], seed=13, position=7), drawn[2:3, 4:])
    weights = token_weights(logits[0], min_p=0.2)
    assert torch.equal(
        weights > 0, logits[0].softmax(-1) >= 0.2 * logits[0].softmax(-1).amax(-1, keepdim=True)
    )


def test_guidance_mixes_conditional_and_unconditional_rows() -> None:
    cond, uncond = torch.randn(2, 3, 4, 40, generator=generator())
    mixed = 2.5 * cond - 1.5 * uncond
    got = reference.sample(torch.cat((cond, uncond)), seed=5, guidance=2.5)
    assert torch.equal(got, reference.sample(mixed, seed=5))


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_nearest_code_against_all_pairs(metric: str) -> None:
    x, codes = (torch.randn(n, 6, generator=generator(n)) for n in (50, 30))
    pairs = {
        "l2": -torch.cdist(x.double(), codes.double()),
        "cosine": F.cosine_similarity(x.double()[:, None], codes.double()[None], dim=-1),
        "dot": x.double() @ codes.double().T,
    }
    assert torch.equal(reference.nearest_code(x, codes, metric), pairs[metric].argmax(-1))


def test_nearest_code_ties_and_nan() -> None:
    codes = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 0.1], [math.nan, 0.0]])
    assert reference.nearest_code(x, codes).tolist() == [1, 0]


def test_straight_through_quantization() -> None:
    x = torch.randn(4, 5, 3, generator=generator(), requires_grad=True)
    codes = torch.randn(7, 3, generator=generator(1), requires_grad=True)
    z_q, indices = reference.quantize(x, codes)
    assert torch.equal(z_q, codes[indices])
    z_q.mul(torch.arange(3.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(3.0).expand(4, 5, 3)) and codes.grad is None


def test_bicubic_up_is_the_cubic_kernel() -> None:
    """One dimension by hand: the four nearest samples, weights of a = -0.75, borders repeated."""

    def weight(t: float, a: float = -0.75) -> float:
        t = abs(t)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        return near if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    x = torch.randn(5, dtype=torch.float64, generator=generator())
    expected = []
    for i in range(13):
        at = (i + 0.5) * 5 / 13 - 0.5
        taps = range(math.floor(at) - 1, math.floor(at) + 3)
        expected.append(sum(weight(at - j) * x[min(max(j, 0), 4)].item() for j in taps))
    got = reference.bicubic_up(x.view(1, 1, 1, 5).expand(1, 1, 3, 5), (6, 13))
    assert torch.allclose(got[0, 0], torch.tensor(expected, dtype=torch.float64).expand(6, 13), atol=1e-12)


def test_area_down_is_the_mean_over_cells() -> None:
    x = torch.randn(1, 1, 5, 7, generator=generator())
    got = reference.area_down(x, (2, 3))[0, 0]
    for i in range(2):
        for j in range(3):
            rows = slice(i * 5 // 2, math.ceil((i + 1) * 5 / 2))
            columns = slice(j * 7 // 3, math.ceil((j + 1) * 7 / 3))
            assert math.isclose(got[i, j].item(), x[0, 0, rows, columns].mean().item(), abs_tol=1e-6)


def test_encode_residuals_and_sum() -> None:
    """A codebook of unit vectors and scales of one size: encode is plain residual quantization with phi."""
    f = torch.randn(2, 4, 3, 3, generator=generator(), dtype=torch.float64)
    codes = torch.randn(16, 4, generator=generator(1), dtype=torch.float64)
    weights = torch.randn(2, 4, 4, 3, 3, generator=generator(2), dtype=torch.float64) * 0.1
    biases = torch.randn(2, 4, generator=generator(3), dtype=torch.float64)
    indices, f_hat = reference.encode(f, codes, weights, biases, [(3, 3), (3, 3)], [1, 0], 0.25)
    rest = f
    for k, phi in enumerate((1, 0)):
        rows = rest.permute(0, 2, 3, 1).reshape(-1, 4)
        index = torch.cdist(rows, codes).argmin(-1).view(2, 9)
        assert torch.equal(index, indices[k])
        u = codes[index].transpose(1, 2).reshape(2, 4, 3, 3)
        rest = rest - (0.75 * u + 0.25 * F.conv2d(u, weights[phi], biases[phi], padding=1))
    assert torch.allclose(f_hat, f - rest, atol=1e-12)


def test_interval_attention_against_softmax_over_slices() -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=generator(), dtype=torch.float64)
    start = torch.tensor([[0, 1, 2, 3, 0, 5], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    end = torch.tensor([[6, 3, 2, 4, 0, 6], [1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    got = reference.row_interval_attention(q, k, v, start, end, scale=0.3)
    for b in range(2):
        for i in range(6):
            s, e = int(start[b, i]), int(end[b, i])
            p = (q[b, :, i : i + 1] @ k[b, :, s:e].transpose(1, 2) * 0.3).softmax(-1)
            assert torch.allclose(got[b, :, i], (p @ v[b, :, s:e])[:, 0], atol=1e-12)


def test_empty_interval_has_a_finite_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, generator=generator(i), requires_grad=True) for i in range(3))
    empty = torch.zeros(3, dtype=torch.int32)
    out = reference.row_interval_attention(q, k, v, empty, empty)
    out.sum().backward()
    assert not out.any() and not v.grad.any() and not q.grad.any()


def test_qk_norm_and_cached_attention() -> None:
    qkv = torch.randn(2, 3, 3, 2, 8, generator=generator())
    k_cache, v_cache = torch.full((2, 2, 2, 5, 8), math.nan)
    scale = torch.tensor([2.0, 3.0])
    q = reference.append_qk_norm_(k_cache, v_cache, qkv, 1, scale, True)
    assert torch.allclose(q.norm(dim=-1), scale[None, :, None].expand(2, 2, 3))
    assert torch.allclose(k_cache[:, :, 1:4].norm(dim=-1), torch.ones(2, 2, 3))
    assert torch.equal(v_cache[:, :, 1:4], qkv[:, :, 2].transpose(1, 2))
    assert k_cache[:, :, 0].isnan().all() and k_cache[:, :, 4].isnan().all()
    out = reference.cached_attention(q, k_cache[:, :, 1:], v_cache[:, :, 1:], 3)
    k, v = k_cache[:, :, 1:4], v_cache[:, :, 1:4]
    assert torch.allclose(out, (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v, atol=1e-6)
    assert out.transpose(1, 2).is_contiguous()
