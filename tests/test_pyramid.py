"""Resampling, accumulate and the multi-scale encode against torch, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg import _library, ops, reference
from test_quantize import scores
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VAR_SCALES = [(n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
VAR_PHI = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(device)


# --- accumulate ---------------------------------------------------------------------------------------------

ACCUMULATES = [
    (1, 1, (1, 1), (1, 1)),
    (2, 3, (1, 1), (2, 3)),
    (1, 5, (3, 2), (5, 19)),
    (2, 32, (1, 1), (16, 16)),
    (2, 32, (10, 10), (16, 16)),
    (1, 32, (16, 16), (16, 16)),
    (1, 20, (4, 6), (9, 6)),
    (1, 40, (4, 4), (7, 13)),
]


def filters(channels, count=None, dtype=torch.float32, device="cpu"):
    shape = (channels, channels, 3, 3)
    weight = randn(*(shape if count is None else (count, *shape)), seed=7) * (9 * channels) ** -0.5
    bias = randn(*((channels,) if count is None else (count, channels)), seed=8) * 0.1
    return weight.to(dtype).to(device), bias.to(dtype).to(device)


def assert_added(got, f_hat, h, weight, bias, ratio, residual=None, up="bicubic"):
    # One chain of 9 C roundings, each of a partial sum that is about as large as h.
    floor = (9 * h.shape[1]) ** 0.5 * 2.0**-24 * h.abs().max().item()
    assert_close(got, added, f_hat, h, weight, bias, ratio, residual, up, floor=floor)


def wide(t):
    return t if t is None or t.dtype == torch.float64 else t.float()


def added(f_hat, h, weight, bias, ratio, residual=None, up="bicubic"):
    """What accumulate_ makes of f_hat (or of residual), out of place."""
    dtype = f_hat.dtype
    f_hat, h, weight, bias = (wide(t) for t in (f_hat, h, weight, bias))
    size = f_hat.shape[-2:]
    u = v = h if h.shape[-2:] == size else F.interpolate(h, size=size, mode=up)
    if weight is not None:
        u = (1 - ratio) * v + ratio * F.conv2d(v, weight, bias, padding=1)
    return (f_hat + u if residual is None else residual.to(u.dtype) - u).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ACCUMULATES)
def test_accumulate(backend, case, dtype):
    B, C, small, size = case
    f_hat = randn(B, C, *size, dtype=dtype, device=backend.device)
    residual = randn(B, C, *size, dtype=dtype, device=backend.device, seed=1)
    h = randn(B, C, *small, dtype=dtype, device=backend.device, seed=2)
    weight, bias = filters(C, dtype=dtype, device=backend.device)
    got, rest = f_hat.clone(), residual.clone()
    ops.accumulate_(got, h, weight, bias, 0.5, rest)
    assert_added(got, f_hat, h, weight, bias, 0.5)
    assert_added(rest, f_hat, h, weight, bias, 0.5, residual)
    alone = f_hat.clone()
    ops.accumulate_(alone, h, weight, bias, 0.5)
    assert torch.equal(alone, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ACCUMULATES)
def test_accumulate_bilinear_and_without_phi(backend, case, dtype):
    B, C, small, size = case
    f_hat = randn(B, C, *size, dtype=dtype, device=backend.device)
    residual = randn(B, C, *size, dtype=dtype, device=backend.device, seed=1)
    h = randn(B, C, *small, dtype=dtype, device=backend.device, seed=2)
    for phi in ((None, None), filters(C, dtype=dtype, device=backend.device)):
        for up in ("bilinear", "bicubic"):
            got, rest = f_hat.clone(), residual.clone()
            ops.accumulate_(got, h, *phi, 0.5, rest, up=up)
            assert_added(got, f_hat, h, *phi, 0.5, up=up)
            assert_added(rest, f_hat, h, *phi, 0.5, residual, up=up)


def test_accumulate_with_other_ratios_dtypes_and_layouts(backend):
    C, device = 6, backend.device
    f_hat = randn(2, C, 5, 7, device=device)
    codes = randn(2, 12, C, device=device, seed=2)  # as looked up: rows of channels
    h = codes.transpose(1, 2).reshape(2, C, 3, 4)
    weight, bias = filters(C, device=device)
    for ratio in (0.0, 0.3, 1.0):
        got = f_hat.clone()
        ops.accumulate_(got, h, weight, bias, ratio)
        assert_added(got, f_hat, h, weight, bias, ratio)
        view = f_hat.clone()
        ops.accumulate_(view, codes.view(2, 3, 4, C).permute(0, 3, 1, 2), weight, bias, ratio)
        assert torch.equal(view, got)
    mixed = f_hat.bfloat16()
    ops.accumulate_(mixed, h, weight, bias)
    assert_added(mixed, f_hat.bfloat16(), h, weight, bias, 0.5)

    strided = randn(2, 5, 7, C, device=device).permute(0, 3, 1, 2)
    residual, dense = strided.clone(memory_format=torch.preserve_format), strided.contiguous()
    rest = residual.contiguous()
    ops.accumulate_(strided, h.transpose(2, 3), weight, bias, 0.5, residual)
    ops.accumulate_(dense, h.transpose(2, 3).contiguous(), weight, bias, 0.5, rest)
    assert torch.equal(strided, dense) and torch.equal(residual, rest)
    ops.accumulate_(f_hat[:0], h[:0], weight, bias)


def test_accumulate_of_one_image_does_not_depend_on_the_batch(backend):
    f_hat, h = randn(3, 32, 16, 16, device=backend.device), randn(3, 32, 5, 5, device=backend.device)
    weight, bias = filters(32, device=backend.device)
    whole = f_hat.clone()
    ops.accumulate_(whole, h, weight, bias)
    for b in range(3):
        alone = f_hat[b : b + 1].clone()
        ops.accumulate_(alone, h[b : b + 1], weight, bias)
        assert torch.equal(alone, whole[b : b + 1])


def test_accumulate_keeps_a_nan_near_where_it_is(backend):
    f_hat, h = torch.zeros(2, 3, 16, 16, device=backend.device), randn(2, 3, 16, 16, device=backend.device)
    h[0, 1, 8, 8] = float("nan")
    weight, bias = filters(3, device=backend.device)
    ops.accumulate_(f_hat, h, weight, bias)
    assert f_hat[0, :, 7:10, 7:10].isnan().all() and f_hat.isnan().sum() == 27


def test_accumulate_is_differentiable_through_the_reference():
    h = randn(1, 4, 2, 2).requires_grad_()
    weight, bias = filters(4)
    f_hat = torch.zeros(1, 4, 4, 4)
    ops.accumulate_(f_hat, h, weight, bias)
    f_hat.sum().backward()
    assert h.grad is not None and h.grad.abs().sum() > 0


# --- encode -------------------------------------------------------------------------------------------------


def problem(B, C, K, H, W, dtype=torch.float32, device="cpu", phis=4, seed=0):
    f = randn(B, C, H, W, dtype=dtype, device=device, seed=seed)
    codebook = randn(K, C, dtype=dtype, device=device, seed=seed + 1)
    return f, codebook, *filters(C, phis, dtype, device)


def assert_encodes(
    result, f, codebook, weights, biases, scales, phi, ratio=0.5, up="bicubic", residual=True, metric="l2"
) -> int:
    """Replays the indices in float64: at each scale the code must be the nearest to the residual that the
    codes chosen so far leave (or tie with it within rounding; counted), and f_hat must be their sum."""
    indices, f_hat = result
    f, codebook, weights, biases = (
        None if t is None else t.detach().cpu().double() for t in (f, codebook, weights, biases)
    )
    B, C = f.shape[:2]
    rest, total, flips = f.clone(), torch.zeros_like(f), 0
    for i, ((h, w), index) in enumerate(zip(scales, indices)):
        index = index.cpu()
        assert index.shape == (B, h * w) and index.dtype == torch.int64
        rows = F.interpolate(rest, size=(h, w), mode="area").permute(0, 2, 3, 1).reshape(-1, C)
        # The residual of a float32 run carries the rounding of the scales before it: up to some units in the
        # last place of the largest values that were added.
        carried = 32 * 2.0**-24 * (f.abs().max() + total.abs().max())
        chosen = index.reshape(-1)
        if codebook is None:
            codes = signs(chosen, C)
            wrong = (rows > 0) != (codes > 0)
            assert (rows[wrong].abs() <= carried).all()
            flips += int(wrong.any(1).sum())
            codes = codes / C**0.5
        else:
            exact, error = scores(rows, codebook, metric)
            error = error + carried * codebook.abs().sum(-1)
            at = torch.arange(len(chosen))
            best = exact.argmin(-1)
            assert (exact[at, chosen] - exact[at, best] <= error[at, chosen] + error[at, best]).all()
            flips += int((chosen != best).sum())
            codes = codebook[chosen]
        if residual or i == len(scales) - 1:
            h_map = codes.view(B, h * w, C).transpose(1, 2).reshape(B, C, h, w)
            pair = (None, None) if weights is None else (weights[phi[i]], biases[phi[i]])
            u = added(torch.zeros_like(f), h_map, *pair, ratio, up=up)
            total, rest = total + u, rest - u if residual else rest
    # one rounding to f_hat's dtype, and some in float32
    unit = torch.finfo(f_hat.dtype).eps / 2 + 64 * 2.0**-24
    assert ((f_hat.cpu().double() - total).abs() <= unit * (1 + total.abs().max())).all()
    return flips


def signs(index, channels):
    """int64 [N] -> +-1 [N, channels], bit by bit from the definition."""
    bits = [[(i >> c) & 1 for c in range(channels)] for i in index.tolist()]
    return torch.tensor(bits, dtype=torch.float64).reshape(-1, channels) * 2 - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode(backend, dtype):
    arguments = problem(2, 8, 60, 6, 7, dtype, backend.device, phis=2)
    scales, phi = [(1, 1), (2, 3), (4, 4), (6, 7)], [0, 1, 1, 0]
    assert assert_encodes(ops.encode(*arguments, scales, phi), *arguments, scales, phi) == 0


def test_encode_of_var(backend):
    arguments = problem(1, 32, 500, 16, 16, device=backend.device)
    got = ops.encode(*arguments, VAR_SCALES, VAR_PHI)
    assert assert_encodes(got, *arguments, VAR_SCALES, VAR_PHI) <= 2
    expected = reference.encode(*(t.cpu() for t in arguments), VAR_SCALES, VAR_PHI)
    same = [torch.equal(a.cpu(), b) for a, b in zip(got[0], expected[0])]
    assert sum(same) >= 9, same


# Variants of the encode as data: whether there is a codebook and phi, and the options.
VARIANTS = {
    "VAR": (True, True, {}),
    "no phi": (True, False, {}),
    "cosine": (True, True, dict(metric="cosine")),
    "Infinity": (False, False, dict(up="bilinear")),
    "signs with phi": (False, True, {}),
    "FlexVAR": (True, False, dict(residual=False, metric="cosine")),
}


def variant(name, f, codebook, weights, biases, phi):
    has_codebook, has_phi, options = VARIANTS[name]
    filters = (weights, biases) if has_phi else (None, None)
    return (f, codebook if has_codebook else None, *filters), phi if has_phi else None, options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_encode(backend, name, dtype):
    scales = [(1, 1), (2, 3), (4, 4), (6, 7)]
    tensors = problem(2, 18, 60, 6, 7, dtype, backend.device, phis=2)
    arguments, phi, options = variant(name, *tensors, [0, 1, 1, 0])
    got = ops.encode(*arguments, scales, phi, **options)
    assert assert_encodes(got, *arguments, scales, phi, **options) <= 1
    alone = ops.encode(arguments[0][1:], *arguments[1:], scales, phi, **options)
    assert all(torch.equal(a, b[1:]) for a, b in zip(alone[0], got[0]))
    assert torch.equal(alone[1], got[1][1:])
    expected = reference.encode(*(None if t is None else t.cpu() for t in arguments), scales, phi, **options)
    assert [torch.equal(a.cpu(), b) for a, b in zip(got[0], expected[0])].count(False) <= 1


@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_what_encode_leaves(backend, name):
    """f_hat of all indices bit for bit, and of the first scales what the reference says."""
    scales = [(1, 1), (2, 3), (4, 4), (6, 7)]
    tensors = problem(2, 18, 60, 6, 7, device=backend.device, phis=2)
    (f, *rest), phi, options = variant(name, *tensors, [0, 1, 1, 0])
    indices, f_hat = ops.encode(f, *rest, scales, phi, **options)
    options = {k: v for k, v in options.items() if k != "metric"} | dict(channels=18)
    assert torch.equal(ops.features(indices, *rest, scales, phi, **options), f_hat)
    for count in (1, 3):
        got = ops.features(indices[:count], *rest, scales, phi, **options)

        def formula(*tensors, count=count):
            found = reference.features([i.cpu() for i in indices[:count]], *tensors, scales, phi, **options)
            return found

        assert_close(got, formula, *rest, floor=32 * 2.0**-24 * (1 + f_hat.abs().max().item()))
        alone = ops.features([i[1:] for i in indices[:count]], *rest, scales, phi, **options)
        assert torch.equal(alone, got[1:])


def test_features_train_the_codebook_through_the_reference():
    f, codebook, weights, biases = problem(2, 6, 20, 4, 4, phis=1)
    scales, phi = [(1, 1), (4, 4)], [0, 0]
    indices, f_hat = ops.encode(f, codebook, weights, biases, scales, phi)
    codebook.requires_grad_()
    again = ops.features(indices, codebook, weights, biases, scales, phi)
    assert torch.allclose(again, f_hat, atol=1e-5)
    again.sum().backward()
    used = torch.cat(indices, 1).unique()
    assert codebook.grad[used].abs().sum() > 0 and codebook.grad.abs().sum(1).count_nonzero() == len(used)


def test_signs_of_many_channels(backend):
    """64 bits fill the index to its sign; more channels than a vector or a warp has lanes."""
    for channels in (1, 5, 33, 64):
        f = randn(2, channels, 3, 4, device=backend.device)
        f[0, 0, 0, 0], f[0, 0, 0, 1], f[0, 0, 0, 2] = 0.0, float("nan"), -0.0  # not positive
        (index,), f_hat = ops.encode(f, None, scales=[(3, 4)], up="bilinear")
        expected = f.permute(0, 2, 3, 1).reshape(-1, channels) > 0
        assert torch.equal(signs(index.reshape(-1), channels) > 0, expected.cpu())
        assert torch.equal(f_hat > 0, f > 0) and torch.allclose(f_hat.norm(dim=1), torch.ones(2, 3, 4))


def test_encode_with_two_codebooks_that_share_an_index(backend):
    """TokenFlow: nearest by |s - e_s|^2 + w |p - e_p|^2 over normalised halves."""
    widths, scales, weight = (12, 5), [(1, 1), (2, 2), (5, 4)], 0.5
    f = randn(2, sum(widths), 5, 4, device=backend.device)
    books = [randn(50, n, device=backend.device, seed=n) for n in widths]
    indices, f_hat = ops.encode_parts(f, books, scales, weights=(1.0, weight))
    rest, total = f.cpu().double(), torch.zeros_like(f, device="cpu", dtype=torch.float64)
    books = [F.normalize(b.cpu().double(), dim=-1) for b in books]
    for (h, w), index in zip(scales, indices):
        small = F.interpolate(rest, size=(h, w), mode="area").permute(0, 2, 3, 1).reshape(-1, sum(widths))
        s, p = (F.normalize(part, dim=-1) for part in small.split(widths, 1))
        distance = torch.cdist(s, books[0]).square() + weight * torch.cdist(p, books[1]).square()
        chosen = index.reshape(-1).cpu()
        assert (distance.gather(1, chosen[:, None])[:, 0] - distance.min(1).values <= 1e-5).all()
        codes = torch.cat([b[chosen] for b in books], 1).view(2, h, w, -1).permute(0, 3, 1, 2)
        u = F.interpolate(codes, size=(5, 4), mode="bicubic")
        rest, total = rest - u, total + u
    assert torch.allclose(f_hat.cpu().double(), total, atol=1e-5)
    plain = ops.encode_parts(
        f, [torch.cat([b.float().to(f.device) for b in books], 1)], scales, normalize=False
    )
    same = ops.encode(f, torch.cat([b.float().to(f.device) for b in books], 1), scales=scales)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], same[0])) and torch.equal(plain[1], same[1])


def test_encode_of_one_image_does_not_depend_on_the_batch(backend):
    f, *rest = problem(3, 16, 80, 8, 8, device=backend.device, phis=1)
    scales, phi = [(1, 1), (3, 3), (8, 8)], [0, 0, 0]
    indices, f_hat = ops.encode(f, *rest, scales, phi)
    for b in range(3):
        alone, sum_alone = ops.encode(f[b : b + 1], *rest, scales, phi)
        assert torch.equal(sum_alone, f_hat[b : b + 1])
        assert all(torch.equal(a, i[b : b + 1]) for a, i in zip(alone, indices))


def test_encode_equals_its_steps(backend):
    f, codebook, weights, biases = problem(2, 16, 80, 8, 8, device=backend.device, phis=2)
    scales, phi = [(1, 1), (3, 3), (8, 8)], [0, 1, 0]
    indices, f_hat = ops.encode(f, codebook, weights, biases, scales, phi)
    residual, total = f.clone(), torch.zeros_like(f)
    for (h, w), k, index in zip(scales, phi, indices):
        rows = ops.area_down(residual, (h, w)).permute(0, 2, 3, 1).reshape(-1, 16)
        assert torch.equal(ops.nearest_code(rows, codebook).reshape(2, -1), index)
        codes = ops.lookup(index, codebook).transpose(1, 2).reshape(2, 16, h, w)
        ops.accumulate_(total, codes, weights[k], biases[k], 0.5, residual)
    assert torch.equal(total, f_hat)


def test_encode_of_nothing_and_of_mixed_dtypes(backend):
    f, codebook, weights, biases = problem(2, 8, 30, 4, 4, device=backend.device, phis=1)
    scales, phi = [(2, 2), (4, 4)], [0, 0]
    indices, f_hat = ops.encode(f[:0], codebook, weights, biases, scales, phi)
    assert [i.shape for i in indices] == [(0, 4), (0, 16)] and f_hat.shape == (0, 8, 4, 4)
    mixed = (f.bfloat16(), codebook, weights.half(), biases.half())
    assert_encodes(ops.encode(*mixed, scales, phi), *mixed, scales, phi)
    requires = f.clone().requires_grad_()
    assert torch.equal(
        ops.encode(requires, codebook, weights, biases, scales, phi)[0][1],
        ops.encode(f, codebook, weights, biases, scales, phi)[0][1],
    )


def test_threads_do_not_change_a_bit():
    arguments = problem(3, 32, 300, 16, 16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.encode(*arguments, VAR_SCALES, VAR_PHI))
    torch.set_num_threads(before)
    for indices, f_hat in results[1:]:
        assert torch.equal(f_hat, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(indices, results[0][0]))


# --- the framework's view -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    packet = getattr(torch.ops, namespace)
    f, codebook, weights, biases = problem(2, 4, 10, 5, 6, phis=2)
    small = randn(2, 4, 2, 2)
    torch.library.opcheck(packet.accumulate_, (f, small, weights[0], biases[0], 0.5, None, 2))
    torch.library.opcheck(packet.accumulate_, (f, small, None, None, 0.5, f.clone(), 1))
    scales, phi = [1, 1, 5, 6], [0, 1]
    torch.library.opcheck(packet.encode, (f, codebook, weights, biases, scales, phi, 0.5, 2, True, 0, 0.5))
    torch.library.opcheck(packet.encode, (f, None, None, None, scales, [], 0.5, 1, False, 0, 0.5))
    flat = torch.zeros(2 * 31, dtype=torch.int64)
    arguments = (scales, phi, 0.5, 2, 0.5, 2, 4, 5, 6)
    torch.library.opcheck(packet.features, (flat, codebook, weights, biases, *arguments))


def test_compiles_without_graph_breaks():
    _, codebook, weights, biases = problem(2, 8, 20, 6, 6, phis=2)
    scales, phi = [(2, 2), (6, 6)], [0, 1]

    def step(f):
        indices, f_hat = ops.encode(f, codebook, weights, biases, scales, phi)
        total = torch.zeros_like(f)
        ops.accumulate_(total, ops.area_down(f, (3, 3)), weights[0], biases[0])
        return indices, f_hat, total + ops.bicubic_up(f, (6, 6))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (1, 3):
        f = randn(B, 8, 6, 6)
        (a, b, c), (x, y, z) = compiled(f), step(f)
        assert torch.equal(b, y) and torch.equal(c, z) and all(torch.equal(i, j) for i, j in zip(a, x))


def accumulate(**change):
    C = 2
    arguments = dict(
        f_hat=torch.zeros(1, C, 4, 4),
        h=torch.zeros(1, C, 2, 2),
        weight=torch.zeros(C, C, 3, 3),
        bias=torch.zeros(C),
        residual=None,
    )
    ops.accumulate_(**(arguments | change))


def encode(**change):
    arguments = dict(
        f=torch.zeros(1, 2, 4, 4),
        codebook=torch.zeros(5, 2),
        weights=torch.zeros(1, 2, 2, 3, 3),
        biases=torch.zeros(1, 2),
        scales=[(1, 1), (4, 4)],
        phi=[0, 0],
    )
    ops.encode(**(arguments | change))


def features(**change):
    arguments = dict(indices=[torch.zeros(1, 1).long()], codebook=torch.zeros(5, 2), scales=[(1, 1), (4, 4)])
    ops.features(**(arguments | change))


def parts(**change):
    codebooks = [torch.zeros(5, 2), torch.zeros(5, 1)]
    ops.encode_parts(**(dict(f=torch.zeros(1, 3, 4, 4), codebooks=codebooks, scales=[(4, 4)]) | change))


def bands(**change):
    maps = [torch.zeros(1, 2, 4, 4)] * 2
    ops.encode_bands(**(dict(bands=maps, codebook=torch.zeros(5, 2), scales=[(1, 1), (4, 4)]) | change))


@pytest.mark.parametrize(
    "function, change, error, text",
    [
        (accumulate, dict(f_hat=torch.zeros(2, 4, 4)), ValueError, r"expected f_hat \[B, C, H, W\]"),
        (
            accumulate,
            dict(h=torch.zeros(1, 3, 2, 2)),
            ValueError,
            r"expected h \[1, 2, h, w\], got \[1, 3, 2, 2\]",
        ),
        (accumulate, dict(h=torch.zeros(1, 2, 2, 2, device="meta")), ValueError, "expected h on device cpu"),
        (accumulate, dict(weight=torch.zeros(2, 2, 1, 1)), ValueError, r"expected weight \[2, 2, 3, 3\]"),
        (accumulate, dict(bias=torch.zeros(2).half()), TypeError, "expected bias of weight's dtype"),
        (
            accumulate,
            dict(residual=torch.zeros(1, 2, 4, 5)),
            ValueError,
            "expected residual of f_hat's shape",
        ),
        (encode, dict(f=torch.zeros(1, 2, 4)), ValueError, r"expected f \[B, C, H, W\]"),
        (encode, dict(codebook=torch.zeros(5, 3)), ValueError, r"expected codebook \[K, 2\]"),
        (encode, dict(weights=torch.zeros(2, 2, 3, 3)), ValueError, "expected weights"),
        (encode, dict(scales=[(1, 1), (3, 4)]), ValueError, r"expected scales \(h, w\) within \(4, 4\)"),
        (encode, dict(phi=[0, 1]), ValueError, r"expected a phi of 0..0 for each of 2 scales, got \[0, 1\]"),
        (encode, dict(phi=None), ValueError, "expected a phi of 0..0 for each of 2 scales, got None"),
        (encode, dict(weights=None, biases=None), ValueError, "expected no phi without weights"),
        (encode, dict(weights=None), ValueError, "expected both weights and biases, or neither"),
        (encode, dict(up="area"), ValueError, "expected up to be one of bilinear, bicubic, got 'area'"),
        (encode, dict(metric="l1"), ValueError, "expected metric to be one of l2, cosine, dot, got 'l1'"),
        (
            encode,
            dict(f=torch.zeros(1, 65, 4, 4), codebook=None),
            ValueError,
            "expected at most 64 channels for signs, got 65",
        ),
        (accumulate, dict(bias=None), ValueError, "expected both weight and bias, or neither"),
        (accumulate, dict(up="nearest"), ValueError, "expected up to be one of bilinear, bicubic"),
        (features, dict(indices=[]), ValueError, "expected indices of 1 to 2 scales, got 0"),
        (
            features,
            dict(indices=[torch.zeros(1, 2).long()]),
            ValueError,
            r"expected indices \[1, 1\] at scale 0, got \[1, 2\]",
        ),
        (
            features,
            dict(indices=[torch.zeros(1, 1)]),
            TypeError,
            "expected indices of int64, got torch.float32",
        ),
        (features, dict(codebook=None), ValueError, "expected channels where there is no codebook"),
        (features, dict(codebook=torch.zeros(2)), ValueError, r"expected codebook \[K, 2\]"),
        (parts, dict(f=torch.zeros(1, 4, 4, 4)), ValueError, r"expected f \[B, 3, H, W\], got"),
        (parts, dict(weights=[1.0]), ValueError, "expected 2 weights that are not negative"),
        (
            bands,
            dict(bands=[torch.zeros(1, 2, 4, 4)]),
            ValueError,
            "expected a band for each of 2 scales, got 1",
        ),
        (
            bands,
            dict(bands=[torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 3)]),
            ValueError,
            r"expected bands of one shape \[B, C, H, W\], got \[1, 2, 4, 3\]",
        ),
    ],
)
def test_bad_input_is_refused(function, change, error, text):
    with pytest.raises(error, match=text):
        function(**change)
