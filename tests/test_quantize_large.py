"""Nearest codes of long rows and of large codebooks, whose codes the CPU packs a few at a time."""

from __future__ import annotations

import pytest
import torch

from arimg import _library, ops
from test_quantize import DTYPES, METRICS, assert_nearest, make, scores

# rows, codes, dimensions: X-Omni's 2048 dimensions, rows beyond a chunk, partial tiles, panels and vectors
SHAPES = [(5, 70, 2048), (14, 33, 1030), (1, 1, 300), (66, 97, 64), (800, 40, 65), (9, 3000, 128)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows(backend, shape, metric):
    x, codebook = make(*shape, device=backend.device)
    assert assert_nearest(ops.nearest_code(x, codebook, metric), x, codebook, metric) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtypes_of_long_rows(backend, dtype):
    x, codebook = make(13, 50, 515, dtype, backend.device)
    assert torch.equal(ops.nearest_code(x, codebook), ops.nearest_code(x.float(), codebook.float()))


@pytest.mark.parametrize("dim, count", [(2, 262144), (64, 65536)])
def test_large_codebooks(backend, dim, count):
    if backend.name == "emulated":
        pytest.skip("seconds; the split over codes is tested with smaller ones")
    x, codebook = make(3, count, dim, device=backend.device)
    assert assert_nearest(ops.nearest_code(x, codebook), x, codebook, "l2") == 0


@pytest.mark.parametrize("dim", [64, 300, 2048])
def test_a_long_row_does_not_depend_on_the_batch(backend, dim):
    x, codebook = make(30, 40, dim, device=backend.device)
    codebook = torch.cat([codebook, codebook + 1e-7])  # differences in rounding would show
    whole = ops.nearest_code(x, codebook)
    for rows in (slice(0, 1), slice(3, 8), slice(11, 30)):
        assert torch.equal(ops.nearest_code(x[rows], codebook), whole[rows])


def test_threads_that_share_the_codes_change_nothing(backend):
    x, codebook = make(17, 5000, 64, device=backend.device)
    codebook[2500:] = codebook[:2500]  # ties between the parts: the lowest index
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = ops.nearest_code(x, codebook)
    torch.set_num_threads(3)
    shared = ops.nearest_code(x, codebook)
    torch.set_num_threads(before)
    assert torch.equal(shared, alone) and (alone < 2500).all()
    assert_nearest(alone, x, codebook, "l2")


def test_ties_nan_and_allowed_codes_of_long_rows(backend):
    x, codebook = make(30, 90, 128, device=backend.device)
    x[4, 100] = float("nan")
    got = ops.nearest_code(x, codebook.repeat(5, 1))
    assert got[4] == 0 and torch.equal(got, ops.nearest_code(x, codebook))
    codebook[7] = float("nan")
    codebook[8] = float("inf")
    got = ops.nearest_code(x, codebook)
    assert not ((got == 7) | (got == 8)).any()
    allowed = torch.arange(90, device=x.device) % 4 == 3
    ids = allowed.nonzero()[:, 0]
    got = ops.nearest_code(x, codebook, allowed=allowed)
    assert torch.equal(got, ids[ops.nearest_code(x, codebook[ids])])


def test_every_backend_gives_the_same_bits_for_long_rows():
    try:
        _library.load_emulated()
    except OSError as error:
        pytest.skip(str(error))
    x, codebook = make(30, 60, 300)
    codebook = torch.cat([codebook, codebook + 1e-7, codebook - 1e-7])
    before = _library.simd_level()
    for metric in METRICS:
        with _library.emulated_cuda():
            expected = ops.nearest_code(x, codebook, metric)
            values, indices = ops.nearest_codes(x, codebook, 3, metric)
        for level in set(_library.simd_levels()) - {"scalar"}:
            _library.set_simd_level(level)
            got, several = ops.nearest_code(x, codebook, metric), ops.nearest_codes(x, codebook, 3, metric)
            _library.set_simd_level(before)
            assert torch.equal(got, expected), (level, metric)
            assert torch.equal(several[0], values) and torch.equal(several[1], indices), (level, metric)


@pytest.mark.parametrize("k", [1, 4])
def test_k_nearest_of_long_rows(backend, k):
    x, codebook = make(26, 70, 1030, device=backend.device)
    values, indices = ops.nearest_codes(x, codebook, k)
    exact, error = scores(x, codebook, "l2")
    got, best = exact.gather(-1, indices.cpu()), exact.sort(dim=-1).values[:, :k]
    assert (got - best <= 2 * error.max()).all()
    assert torch.equal(indices[:, 0], ops.nearest_code(x, codebook))
    distance = (x.cpu().double()[:, None] - codebook.cpu().double()[indices.cpu()]).square().sum(-1)
    assert torch.allclose(values.cpu().double(), distance, rtol=1e-5)
