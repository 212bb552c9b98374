"""Token shuffle, sequences of two levels and frequency bands against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from arimg import _library, ops, reference
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VAR_SCALES = [(n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s, grid, C", [(1, (3, 4), 5), (2, (4, 6), 3), (3, (3, 9), 1), (4, (8, 4), 7)])
def test_token_shuffle(dtype, s, grid, C):
    x = randn(2, grid[0] * grid[1], C, dtype=dtype)
    y = ops.token_shuffle(x, s, grid)
    assert torch.equal(y, reference.token_shuffle(x, s, grid)) and y.dtype == dtype
    assert torch.equal(ops.token_unshuffle(y, s, grid), x)
    assert torch.equal(reference.token_unshuffle(y, s, grid), x)
    assert torch.equal(y[0, 0, :C], x[0, 0]) and torch.equal(y[-1, -1, -C:], x[-1, -1])


def test_token_shuffle_of_views_and_its_gradient():
    x = randn(2, 3, 24).transpose(1, 2).requires_grad_()
    y = ops.token_shuffle(x, 2, (4, 6))
    assert torch.equal(y, ops.token_shuffle(x.contiguous(), 2, (4, 6)))
    grad = randn(*y.shape, seed=1)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], ops.token_unshuffle(grad, 2, (4, 6)))
    assert ops.token_shuffle(x[:0], 2, (4, 6)).shape == (0, 6, 12)


def two_levels(B=5, h=3, w=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(1000, (B, h, w), generator=g)
    fine = torch.randint(1000, 2000, (B, 2 * h, 2 * w), generator=g)
    share = torch.linspace(0, 1, B).view(B, 1, 1)  # from all coarse to all fine
    return coarse, fine, torch.rand(B, h, w, generator=g) < share


def test_two_levels_there_and_back():
    coarse, fine, is_fine = two_levels()
    packed = ops.pack_two_levels(coarse, fine, is_fine)
    for got, expected in zip(packed, reference.pack_two_levels(coarse, fine, is_fine)):
        assert torch.equal(got, expected)
    lengths = packed[2]
    assert lengths[0].tolist() == [12, 0] and lengths[-1].tolist() == [0, 48]
    assert (lengths[:, 0] + lengths[:, 1] // 4 == 12).all()
    codes, mask = ops.unpack_two_levels(*packed, (3, 4))
    merged = ops.merge_two_levels(coarse[:, None], fine[:, None], is_fine)[:, 0]
    assert torch.equal(codes, merged)
    assert torch.equal(mask, is_fine.repeat_interleave(2, 1).repeat_interleave(2, 2))
    alone = ops.pack_two_levels(coarse[2:3], fine[2:3], is_fine[2:3])
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone, packed))


def test_unpack_takes_any_order_and_leaves_gaps():
    codes, positions, lengths = ops.pack_two_levels(*two_levels())
    order = torch.cat([torch.arange(5).flip(0), torch.arange(5, 48)])  # within the coarse part of row 1
    assert lengths[1, 0] >= 5
    a = ops.unpack_two_levels(codes[1:2, order], positions[1:2, order], lengths[1:2], (3, 4))
    b = ops.unpack_two_levels(codes[1:2], positions[1:2], lengths[1:2], (3, 4))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    # a fine code over a coarse one, and pixels that have neither
    codes, positions = torch.tensor([[7, 8, 9, 5]]), torch.tensor([[0, 5, 15, 3]])
    arguments = (codes, positions, torch.tensor([[1, 2]]), (2, 2))
    out, is_fine = ops.unpack_two_levels(*arguments)
    assert out.tolist() == [[[7, 7, -1, -1], [7, 8, -1, -1], [-1] * 4, [-1, -1, -1, 9]]]
    assert is_fine.sum() == 2
    expected = reference.unpack_two_levels(*arguments)
    assert torch.equal(out, expected[0]) and torch.equal(is_fine, expected[1])


MERGES = [(5, 6, 3, 4), (2, 3, 2, 8), (1, 1, 1, 1), (1, 2, 3, 16), (1, 1, 2, 600)]
MERGED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def merge_case(case, dtype=torch.float32, device="cpu"):
    B, C, h, w = case
    is_fine = torch.rand(B, h, w, generator=torch.Generator().manual_seed(2)) < 0.5
    maps = randn(B, C, h, w) * 100, randn(B, C, 2 * h, 2 * w, seed=1) * 100
    if dtype == torch.uint8:
        maps = maps[0].abs(), maps[1].abs()
    return *(m.to(dtype).to(device) for m in maps), is_fine.to(device)


@pytest.mark.parametrize("dtype", MERGED)
@pytest.mark.parametrize("case", MERGES)
def test_merge_two_levels(backend, case, dtype):
    coarse, fine, is_fine = merge_case(case, dtype, backend.device)
    got = ops.merge_two_levels(coarse, fine, is_fine)
    assert got.dtype == dtype and torch.equal(got, reference.merge_two_levels(coarse, fine, is_fine))
    alone = ops.merge_two_levels(coarse[-1:], fine[-1:], is_fine[-1:])
    assert torch.equal(alone, got[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MERGES)
def test_merge_passes_its_gradient(backend, case, dtype):
    coarse, fine, is_fine = merge_case(case, dtype, backend.device)
    coarse.requires_grad_()
    fine.requires_grad_()
    got = ops.merge_two_levels(coarse, fine, is_fine)
    grad = randn(*got.shape, dtype=dtype, seed=3).to(backend.device)
    to_coarse, to_fine = torch.autograd.grad(got, (coarse, fine), grad)
    mask = is_fine.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert torch.equal(to_fine, grad * mask)
    # Four terms, one rounding to the dtype and three in float32.
    exact = F.avg_pool2d(grad.double(), 2) * 4 * ~is_fine[:, None]
    size = F.avg_pool2d(grad.double().abs(), 2) * 4
    unit = torch.finfo(dtype).eps / 2 + 3 * 2.0**-24
    assert to_coarse.dtype == dtype and ((to_coarse.double() - exact).abs() <= unit * size).all()


def test_merge_can_be_differentiated_twice(backend):
    coarse, fine, is_fine = merge_case((2, 3, 2, 4), device=backend.device)
    coarse, fine = coarse.requires_grad_(), fine.requires_grad_()
    got = ops.merge_two_levels(coarse, fine, is_fine).pow(3).sum()
    first = torch.autograd.grad(got, (coarse, fine), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (coarse, fine))
    mask = is_fine.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert torch.allclose(second[0], 24 * coarse * ~is_fine[:, None])
    assert torch.allclose(second[1], 6 * fine * mask)


def test_merge_of_views_of_other_values_and_of_nothing(backend):
    coarse, fine, is_fine = merge_case((2, 3, 4, 4), device=backend.device)
    expected = ops.merge_two_levels(coarse, fine, is_fine)
    last = ops.merge_two_levels(*(t.to(memory_format=torch.channels_last) for t in (coarse, fine)), is_fine)
    assert torch.equal(last, expected)
    swapped = ops.merge_two_levels(*(t.transpose(2, 3) for t in (coarse, fine)), is_fine.transpose(1, 2))
    assert torch.equal(swapped, expected.transpose(2, 3))
    # an address that is no multiple of 16 bytes
    shifted = torch.empty(fine.numel() + 1, device=fine.device)[1:].view_as(fine).copy_(fine)
    assert torch.equal(ops.merge_two_levels(coarse, shifted, is_fine), expected)
    # a value that is not taken does not matter, not even NaN
    coarse = coarse.masked_fill(is_fine[:, None], float("nan"))
    mask = is_fine.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert torch.equal(ops.merge_two_levels(coarse, fine.masked_fill(~mask, float("inf")), is_fine), expected)
    assert ops.merge_two_levels(coarse[:0], fine[:0], is_fine[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    coarse, fine, is_fine = merge_case((2, 3, 2, 4))
    torch.library.opcheck(packet.merge_two_levels, (coarse, fine, is_fine))
    torch.library.opcheck(packet.merge_two_levels_backward, (fine, is_fine))


# --- frequency bands ----------------------------------------------------------------------------------------


def test_no_band_is_empty_where_the_published_rule_leaves_four():
    masks = ops.band_masks((16, 16), VAR_SCALES)
    counts = masks.sum((1, 2))
    assert counts.tolist() == [1, 4, 4, 4, 8, 16, 20, 40, 64, 95] and counts.sum() == 256
    frequency = torch.fft.fftfreq(16) * 16
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    tokens = torch.tensor([h * w for h, w in VAR_SCALES]).double()
    edge = (tokens.cumsum(0) / tokens.sum() * radius.max()).tolist()
    edge[-1] += 1e-6
    published = [((radius <= e) & (radius > s)).sum().item() for s, e in zip([-1.0, *edge], edge)]
    assert published == [1, 0, 0, 0, 0, 8, 12, 40, 88, 107]


@pytest.mark.parametrize("grid", [(16, 16), (5, 8), (7, 7), (12, 6)])
@pytest.mark.parametrize("bands", [1, 3, 9])
def test_bands_part_the_frequencies_by_radius(grid, bands):
    masks = ops.band_masks(grid, VAR_SCALES[:bands])
    assert (masks.sum(0) == 1).all() and masks.flatten(1).any(1).all() and masks[0, 0, 0]
    y, x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
    radius = y[:, None].square() + x.square()
    ends = [(radius[m].min().item(), radius[m].max().item()) for m in masks]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(16, 16), (5, 8), (7, 7), (1, 12)])
def test_frequency_bands(grid, dtype):
    scales = VAR_SCALES[:5]
    x = randn(2, 3, *grid, dtype=dtype).requires_grad_()
    got = ops.frequency_bands(x, scales)
    assert got.dtype == dtype
    # Four products of at most 16 terms with an orthonormal basis.
    floor = 4 * 16 * 2.0**-24 * x.abs().max().item()
    assert_close(got, lambda x: reference.frequency_bands(x, scales), x, floor=floor)
    unit = torch.finfo(dtype).eps
    total = got.float().sum(0)
    assert ((total - x.float()).abs() <= 8 * unit * (1 + x.float().abs().max())).all()
    grad = randn(*got.shape, dtype=dtype, seed=1)
    (back,) = torch.autograd.grad(got, x, grad)
    exact = torch.zeros(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    reference.frequency_bands(exact, scales).backward(grad.double())
    assert ((back.double() - exact.grad).abs() <= 8 * unit * (1 + exact.grad.abs().max())).all()


def test_a_wave_is_in_the_band_of_its_frequency():
    t = torch.arange(16) * (2 * torch.pi / 16)
    x = torch.cos(3 * t)[:, None] * torch.sin(5 * t)
    energy = ops.frequency_bands(x[None, None], VAR_SCALES).square().sum((1, 2, 3, 4))
    band = ops.band_masks((16, 16), VAR_SCALES)[:, 3, 5].nonzero().item()
    assert energy[band] > 0.9999 * energy.sum()


def test_encode_bands(backend):
    """NFIG: R_k = R_(k-1) + band_k - up(codes_k), and nothing of a later band before its scale."""
    scales = [(1, 1), (2, 2), (4, 4), (8, 8)]
    f, codebook = randn(2, 6, 8, 8).to(backend.device), randn(40, 6, seed=1).to(backend.device)
    bands = ops.frequency_bands(f, scales)
    indices, f_hat = ops.encode_bands(bands, codebook, scales)
    rest = torch.zeros(2, 6, 8, 8, dtype=torch.float64)
    total, codes = torch.zeros_like(rest), codebook.cpu().double()
    for (h, w), index, band in zip(scales, indices, bands.cpu().double()):
        rest = rest + band
        rows = F.interpolate(rest, size=(h, w), mode="area").permute(0, 2, 3, 1).reshape(-1, 6)
        distance, chosen = torch.cdist(rows, codes), index.cpu().reshape(-1)
        assert (distance.gather(1, chosen[:, None])[:, 0] - distance.min(1).values <= 1e-5).all()
        h_map = codes[index.cpu()].transpose(1, 2).reshape(2, 6, h, w)
        u = F.interpolate(h_map, size=(8, 8), mode="bicubic")
        rest, total = rest - u, total + u
    assert torch.allclose(f_hat.cpu().double(), total, atol=1e-5)
    assert torch.allclose(ops.features(indices, codebook, scales=scales), f_hat, atol=1e-5)
    everything = [f, *[torch.zeros_like(f)] * 3]
    plain = ops.encode(f, codebook, scales=scales)[0]
    assert all(torch.equal(a, b) for a, b in zip(ops.encode_bands(everything, codebook, scales)[0], plain))


@pytest.mark.filterwarnings("error::UserWarning")
def test_compiles_without_graph_breaks_and_without_warnings():
    coarse, fine, is_fine = two_levels()

    def step(x, y):
        packed = ops.pack_two_levels(coarse, fine, is_fine)
        bands = ops.frequency_bands(x, VAR_SCALES)
        tokens = ops.token_shuffle(x.flatten(2).transpose(1, 2), 2, (16, 16))
        merged = ops.merge_two_levels(y, x.repeat(1, 1, 2, 2), x[:, 0] > 0)
        return (
            ops.unpack_two_levels(*packed, (3, 4))[0],
            bands,
            ops.token_unshuffle(tokens, 2, (16, 16)),
            merged,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (2, 3):
        x, y = randn(B, 3, 16, 16).requires_grad_(), randn(B, 3, 16, 16, seed=1).requires_grad_()
        got, expected = compiled(x, y), step(x, y)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
        gradients = [torch.autograd.grad(r[1].sum() + r[3].square().sum(), (x, y)) for r in (got, expected)]
        assert all(torch.allclose(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.token_shuffle(torch.zeros(1, 12, 2), 2, (3, 4)), ValueError, "expected a window that"),
        (lambda: ops.token_shuffle(torch.zeros(12, 2), 1, (3, 4)), ValueError, r"expected x \[B, 12, C\]"),
        (
            lambda: ops.token_unshuffle(torch.zeros(1, 4, 6), 2, (4, 4)),
            ValueError,
            r"expected x \[B, 4, 4 C\], got \[1, 4, 6\]",
        ),
        (
            lambda: ops.merge_two_levels(
                torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 2)
            ),
            TypeError,
            "expected is_fine of bool, got torch.float32",
        ),
        (
            lambda: ops.merge_two_levels(
                torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4).half(), torch.zeros(1, 2, 2) > 0
            ),
            TypeError,
            "expected fine of coarse's dtype torch.float32, got torch.float16",
        ),
        (
            lambda: ops.merge_two_levels(
                torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 3), torch.zeros(1, 2, 2) > 0
            ),
            ValueError,
            r"expected coarse \[B, C, h, w\] and fine \[B, C, 2h, 2w\], got",
        ),
        (
            lambda: ops.merge_two_levels(
                torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4, device="meta"), torch.zeros(1, 2, 2) > 0
            ),
            ValueError,
            "expected fine on coarse's device cpu, got meta",
        ),
        (
            lambda: ops.pack_two_levels(*two_levels()[:2], torch.zeros(1, 2, 2, dtype=torch.bool)),
            ValueError,
            r"expected is_fine \[5, 3, 4\], got \[1, 2, 2\]",
        ),
        (
            lambda: ops.unpack_two_levels(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), (1, 1)),
            TypeError,
            "expected codes of int64",
        ),
        (lambda: ops.band_masks((2, 2), VAR_SCALES), ValueError, "expected at most 3 bands on a grid"),
        (lambda: ops.frequency_bands(torch.zeros(2, 2), VAR_SCALES), ValueError, "expected x"),
        (lambda: ops.frequency_bands(torch.zeros(1, 1, 4, 4), []), ValueError, "expected at least one scale"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
