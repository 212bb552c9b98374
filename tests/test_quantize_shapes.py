"""Shapes of more than 2^31 elements under fake tensors: the shape arithmetic of quantize."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arimg import ops

LARGE = 2**31


def rows(d: int) -> int:
    return LARGE // d + 5


@pytest.mark.parametrize(("d", "codes"), [(4, 16_384), (32, 262_144), (2048, 16_384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_search(d, codes, dtype):
    n = rows(d)
    with FakeTensorMode():
        x, codebook = torch.empty(n, d, dtype=dtype), torch.empty(codes, d, dtype=dtype)
        assert x.numel() > LARGE
        index = ops.nearest_code(x, codebook, "cosine")
        assert index.shape == (n,) and index.dtype == torch.int64
        values, indices = ops.nearest_codes(x, codebook, 100)
        assert values.shape == indices.shape == (n, 100) and values.dtype == torch.float32
        assert ops.nearest_code_dual(x, x, codebook, codebook, 0.5).shape == (n,)
        z, index = ops.quantize(x.view(n, 1, d), codebook)
        assert z.shape == (n, 1, d) and z.dtype == dtype and index.shape == (n, 1)
        assert ops.lookup(index, codebook).shape == (n, 1, d)
        allowed = torch.empty(codes, dtype=torch.bool)
        assert ops.nearest_code(x, codebook, allowed=allowed).shape == (n,)


def test_a_codebook_beyond_2_31_elements():
    with FakeTensorMode():
        codebook = torch.empty(rows(8192), 8192, dtype=torch.bfloat16)
        assert codebook.numel() > LARGE
        assert ops.nearest_code(torch.empty(3, 8192, dtype=torch.bfloat16), codebook).shape == (3,)


def test_residual_and_flow():
    n = rows(64)
    with FakeTensorMode():
        x = torch.empty(n, 64)
        indices, z = ops.residual_nearest_code(x, torch.empty(8, 1024, 64))
        assert indices.shape == (n, 8) and z.shape == (n, 64)
        mean = ops.codebook_softmax_mean(x, torch.empty(4096, 64), torch.empty(1, 4096), 1.0, 0.5)
        assert mean.shape == (n, 64)
        counts, sums = ops.code_statistics(x, indices[:, 0], 1024)
        assert counts.shape == (1024,) and sums.shape == (1024, 64)


def test_scalar_codes_and_bits():
    n = rows(6)
    with FakeTensorMode():
        codes, index = ops.fsq(torch.empty(n, 6), [8, 8, 8, 5, 5, 5])
        assert codes.shape == (n, 6) and index.shape == (n,)
        assert ops.fsq_codes(index, [8, 8, 8, 5, 5, 5]).shape == (n, 6)
        n = rows(64)
        z = torch.empty(n, 64, dtype=torch.float16)
        signs, index = ops.sign_codes(z)
        assert signs.shape == (n, 64) and signs.dtype == torch.float16 and index.shape == (n,)
        bits = ops.unpack_bits(index, 64)
        assert bits.shape == (n, 64) and ops.pack_bits(bits).shape == (n,)
        assert ops.unpack_signs(index, 64).shape == (n, 64)
