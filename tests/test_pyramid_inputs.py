"""The pyramid on hard inputs: any shape, stride and address, no finite values, sizes beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from arimg import ops, reference
from test_pyramid import assert_added, assert_encodes, problem, randn
from test_pyramid_resize import MODES, assert_resampled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ANY_CASE = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIDES = st.integers(1, 12)


def strided(x, order, gap, shift):
    """The values of x, its axes laid out in another order, with gaps of `gap`, from address `shift`."""
    shape = [x.shape[i] for i in order]
    shape[-1] += gap
    memory = torch.empty(shift + torch.Size(shape).numel(), dtype=x.dtype, device=x.device)[shift:].view(
        shape
    )
    view = memory[..., : x.shape[order[-1]]].permute([order.index(i) for i in range(x.dim())])
    return view.copy_(x)


LAYOUTS = dict(order=st.permutations(range(4)), gap=st.integers(0, 3), shift=st.integers(0, 3))


@ANY_CASE
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 36), SIDES, SIDES),
    size=st.tuples(SIDES, SIDES),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    **LAYOUTS,
)
def test_resize_of_any_strides(backend, shape, size, mode, dtype, order, gap, shift):
    x = randn(*shape, dtype=dtype, device=backend.device)
    got = ops.resize(strided(x, order, gap, shift), size, mode)
    assert torch.equal(got, ops.resize(x, size, mode))
    assert_resampled(got, x, size, mode)


@ANY_CASE
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), SIDES, SIDES),
    small=st.tuples(SIDES, SIDES),
    up=st.sampled_from(MODES[1:]),
    dtype=st.sampled_from(DTYPES),
    **LAYOUTS,
)
def test_accumulate_of_any_strides(backend, shape, small, up, dtype, order, gap, shift):
    f_hat = randn(*shape, dtype=dtype, device=backend.device)
    h = randn(*shape[:2], *small, dtype=dtype, device=backend.device, seed=1)
    got, dense = strided(f_hat, order, gap, shift), f_hat.clone()
    ops.accumulate_(got, strided(h, order, gap, shift), up=up)
    ops.accumulate_(dense, h, up=up)
    assert torch.equal(got, dense)
    assert_added(got, f_hat, h, None, None, 0.5, up=up)


@ANY_CASE
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), SIDES, SIDES),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
    **LAYOUTS,
)
def test_encode_of_any_shape_and_strides(backend, shape, share, seed, order, gap, shift):
    B, C, H, W = shape
    f, codebook, weights, biases = problem(B, C, 30, H, W, device=backend.device, phis=1, seed=seed)
    scales = [(1, 1), (1 + int(share * (H - 1)), 1 + int((1 - share) * (W - 1))), (H, W)]
    arguments = (codebook, weights, biases, scales, [0, 0, 0])
    got = ops.encode(strided(f, order, gap, shift), *arguments)
    dense = ops.encode(f, *arguments)
    assert torch.equal(got[1], dense[1]) and all(torch.equal(a, b) for a, b in zip(got[0], dense[0]))
    assert assert_encodes(got, f, *arguments) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_vectors_and_what_is_left_agree(backend, dtype):
    """Maps that divide into 16-byte pieces and maps that do not take other ways to the same bits."""
    x = randn(2, 32, 8, 16, dtype=dtype, device=backend.device)
    rows = x.to(memory_format=torch.channels_last)
    for size in ((4, 8), (16, 32), (5, 9)):
        for mode in MODES:
            whole = ops.resize(x, size, mode)
            assert torch.equal(ops.resize(rows, size, mode), whole)
            assert torch.equal(ops.resize(rows[:, :27], size, mode), whole[:, :27])
    f_hat = randn(2, 32, 16, 16, dtype=dtype, device=backend.device, seed=1)
    for up in MODES[1:]:
        dense = f_hat.clone()
        ops.accumulate_(dense, x, up=up)
        part = f_hat[:, :27].clone()
        ops.accumulate_(part, rows[:, :27], up=up)
        assert torch.equal(part, dense[:, :27])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_is_not_finite_keeps_to_itself(backend, value):
    f, codebook, weights, biases = problem(2, 8, 30, 6, 6, device=backend.device, phis=1)
    scales, phi = [(1, 1), (3, 2), (6, 6)], [0, 0, 0]
    bad = f.clone()
    bad[0, 3, 2, 4] = value
    for arguments in (
        (codebook, weights, biases, scales, phi),
        (codebook, None, None, scales, None),
        (None, None, None, scales, None),
    ):
        indices, f_hat = ops.encode(bad, *arguments)
        clean = ops.encode(f, *arguments)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(indices, clean[0]))
        assert torch.equal(f_hat[1], clean[1][1])
        # codes are finite, so f_hat is: only what is searched is not
        assert f_hat.isfinite().all()
        assert all(((i >= 0) & (i < (30 if arguments[0] is not None else 2**8))).all() for i in indices)


def test_nothing_in_gives_nothing(backend):
    f, codebook, _, _ = problem(2, 4, 10, 4, 6, device=backend.device)
    scales = [(2, 3), (4, 6)]
    indices, f_hat = ops.encode(f[:0], None, scales=scales)
    assert [i.shape for i in indices] == [(0, 6), (0, 24)] and f_hat.shape == (0, 4, 4, 6)
    assert ops.features(indices, codebook, scales=scales).shape == (0, 4, 4, 6)
    indices, f_hat = ops.encode_bands([f[:0]] * 2, codebook, scales)
    assert [i.shape for i in indices] == [(0, 6), (0, 24)] and f_hat.shape == (0, 4, 4, 6)
    indices, f_hat = ops.encode_parts(f[:0], [codebook[:, :1], codebook[:, 1:]], scales)
    assert [i.shape for i in indices] == [(0, 6), (0, 24)] and f_hat.shape == (0, 4, 4, 6)
    assert ops.frequency_bands(f[:0], scales).shape == (2, 0, 4, 4, 6)


def test_shapes_beyond_32_bits():
    with FakeTensorMode():
        x = torch.empty(2**15, 32, 64, 64, dtype=torch.bfloat16)  # 2^32 elements
        assert ops.resize(x, (16, 32), "area").shape == (2**15, 32, 16, 32)
        assert ops.resize(x, (96, 128), "bicubic").numel() == 2**20 * 96 * 128
        assert ops.pool_tokens(x, (4, 4), (2, 2)).shape == (2**15, 32, 4, 64)
        codebook = torch.empty(64, 32, dtype=torch.bfloat16)
        indices, f_hat = ops.encode(x, codebook, scales=[(1, 1), (64, 64)])
        assert [i.shape for i in indices] == [(2**15, 1), (2**15, 4096)] and f_hat.shape == x.shape
        assert ops.features(indices, codebook, scales=[(1, 1), (64, 64)]).shape == x.shape
        assert ops.accumulate_(x, x[..., :4, :4].contiguous()) is None
        is_fine = torch.empty(2**15, 32, 32, dtype=torch.bool)
        assert ops.merge_two_levels(x[..., :32, :32].contiguous(), x, is_fine).shape == x.shape
        assert ops.token_shuffle(x.flatten(2), 2, (8, 4)).shape == (2**15, 8, 4 * 4096)
        bands = ops.frequency_bands(x[:, :, :8, :8], [(1, 1), (8, 8)])
        assert bands.shape == (2, 2**15, 32, 8, 8)


MAP, BOOK = torch.zeros(1, 2, 4, 4), torch.zeros(5, 2)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.encode(MAP.int(), BOOK, scales=[(4, 4)]), TypeError, "expected f of float32"),
        (lambda: ops.encode(MAP, BOOK.int(), scales=[(4, 4)]), TypeError, "expected codebook of float32"),
        (lambda: ops.encode(MAP, BOOK.to("meta"), scales=[(4, 4)]), ValueError, "codebook on device cpu"),
        (lambda: ops.encode(MAP, BOOK, scales=[]), ValueError, "expected scales"),
        (lambda: ops.accumulate_(MAP.int(), MAP), TypeError, "expected f_hat of float32"),
        (lambda: ops.accumulate_(MAP, MAP.int()), TypeError, "expected h of float32"),
        (lambda: ops.accumulate_(MAP, MAP, residual=MAP.half()), TypeError, "residual of f_hat's dtype"),
        (lambda: ops.encode_parts(MAP, [BOOK.to("meta")], [(4, 4)]), ValueError, "codebook on device cpu"),
        (lambda: ops.encode_bands([MAP.half(), MAP], BOOK, [(1, 1), (4, 4)]), TypeError, "bands of"),
        (lambda: ops.frequency_bands(MAP.int(), [(4, 4)]), TypeError, "expected x of float32"),
        (lambda: ops.pool_tokens(MAP.int(), (2, 2), (1, 1)), TypeError, "expected x of float32"),
    ],
)
def test_wrong_dtypes_and_devices_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_oracle_takes_the_same_strides():
    x = randn(2, 3, 5, 7)
    view = strided(x, [2, 0, 3, 1], 2, 1)
    assert torch.equal(view, x) and not view.is_contiguous()
    assert torch.equal(reference.resize(view, (3, 9), "bicubic"), reference.resize(x, (3, 9), "bicubic"))
