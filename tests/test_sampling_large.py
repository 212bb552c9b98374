"""Shapes of more than 2^31 elements and large vocabularies under fake tensors: the shape arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arimg import ops

LARGE = 2**31


@pytest.mark.parametrize("vocabulary", [16_384, 131_072, 262_144])
@pytest.mark.parametrize("arguments", [dict(), dict(return_logprob=True, top_p=0.9)], ids=str)
def test_sample(vocabulary, arguments):
    tokens = 3 * LARGE // (4 * vocabulary)
    with FakeTensorMode():
        logits = torch.empty(8, tokens, vocabulary, dtype=torch.bfloat16)
        assert logits.numel() > LARGE
        bias, allowed = torch.empty(vocabulary), torch.empty(4, vocabulary, dtype=torch.bool)
        seeds = torch.empty(4, dtype=torch.int64)
        got = ops.sample(logits, seed=seeds, guidance=2.0, bias=bias, allowed=allowed, **arguments)
        for x in got if isinstance(got, tuple) else (got,):
            assert x.shape == (4, tokens)
        assert ops.sample(logits[:, -1], seed=1).shape == (8,)


def test_sample_bits():
    tokens, d = 64 * 64 * 1024, 64
    with FakeTensorMode():
        logits = torch.empty(6, tokens, d, 2, dtype=torch.bfloat16)
        assert logits.numel() > LARGE
        drawn = ops.sample_bits(logits, seed=1, guidance=2.0, return_logprob=True, bias=torch.empty(d, 2))
        assert drawn.token.shape == drawn.logprob.shape == (3, tokens, d)
        assert drawn.token.dtype == torch.bool and drawn.logprob.dtype == torch.float32
        packed = ops.sample_bits(logits, seed=1, packed=True)
        assert packed.shape == (6, tokens) and packed.dtype == torch.int64
        assert ops.bernoulli_bits(logits[..., 0], seed=1).shape == (6, tokens, d)


def test_keep_most_confident():
    rows, length = 2**15, 2**17
    with FakeTensorMode():
        confidence = torch.empty(rows, length)
        kept = ops.keep_most_confident(
            confidence, torch.empty(rows, dtype=torch.int64), torch.empty(rows, length, dtype=torch.bool)
        )
        assert kept.shape == (rows, length) and kept.dtype == torch.bool
        with pytest.raises(ValueError, match="expected at most 16777216 entries per row, got 16777217"):
            ops.keep_most_confident(torch.empty(1, 2**24 + 1), 3)


def test_a_vocabulary_beyond_the_largest_is_refused():
    with FakeTensorMode():
        with pytest.raises(ValueError, match="expected at most 16777216 logits per row"):
            ops.sample(torch.empty(2**8, 2**24 + 1), seed=0)
        with pytest.raises(ValueError, match="expected at most 8388608 bits per token"):
            ops.sample_bits(torch.empty(1, 2**23 + 1, 2), seed=0)
