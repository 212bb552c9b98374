"""Row-interval and cached attention against plain torch."""

from __future__ import annotations

import pytest
import torch

from arimg import _library, ops, reference
from arimg.layout import RULES, Layout
from tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PYRAMID = Layout.scales([1, 2, 3, 4, 5, 6, 8])  # 155 tokens


def make(B, H, L, D, dtype=torch.float32, device="cpu", seed=0, keys=None):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, L, D, generator=g).to(dtype)
    k, v = (torch.randn(B, H, keys or L, D, generator=g).to(dtype) for _ in range(2))
    return q.to(device), k.to(device), v.to(device)


def masked_softmax(q, k, v, start, end, scale=None):
    """The formula, without the reference's own attention call."""
    start, end = start.cpu()[..., None], end.cpu()[..., None]
    column = torch.arange(k.shape[2])
    seen = (column >= start) & (column < end)
    seen = seen[:, None] if seen.dim() == 3 else seen
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights.to(v.dtype) @ v


def moved(intervals, device):
    return [t.to(device) for t in intervals]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(backend, rule, dtype):
    q, k, v = make(1, 2, PYRAMID.length, 64, dtype, backend.device)
    intervals = moved(PYRAMID.intervals(rule), backend.device)
    assert_close(ops.row_interval_attention(q, k, v, *intervals), masked_softmax, q, k, v, *intervals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", ["level-causal", "strictly-lower", "token-causal"])
def test_a_plan_changes_nothing_but_the_tiles(backend, rule, dtype):
    layout = Layout.scales([1, 2, 3, 4, 5, (3, 40), (2, 50)])
    q, k, v = make(1, 2, layout.length, 64, dtype, backend.device)
    seen = layout.visibility(rule, device=backend.device)

    def attend(plan):
        return ops.row_interval_attention(
            q, k, v, seen.row_start, seen.row_end, self_key=seen.self_key, plan=plan
        )

    planned, free = attend(seen.plan), attend(None)
    if backend.name != "emulated" and backend.device == "cpu":
        assert torch.equal(planned, free)
    else:
        assert_close(
            planned,
            lambda *t: reference.row_interval_attention(*t, self_key=seen.self_key),
            *(q, k, v, seen.row_start, seen.row_end),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 24, 32, 40, 64, 80, 96, 128, 200, 256])
def test_head_dims(backend, D, dtype):
    q, k, v = make(1, 1, 70, D, dtype, backend.device)
    layout = Layout.scales([3, (5, 2), (3, 17)])
    intervals = moved(layout.intervals("level-causal"), backend.device)
    assert_close(ops.row_interval_attention(q, k, v, *intervals), masked_softmax, q, k, v, *intervals)


def random_intervals(B, L, seed=1):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-5, L + 6, (B, L), generator=g, dtype=torch.int32) for _ in range(2))
    return torch.minimum(a, b), torch.where(a == b, a, torch.maximum(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [1, 2, 5, 64, 65, 131, 200])
def test_intervals_of_each_batch_entry_empty_and_beyond_the_ends(backend, L, dtype):
    q, k, v = make(2, 2, L, 64, dtype, backend.device)
    start, end = random_intervals(2, L)
    end[0, L // 2] = start[0, L // 2]
    start[1, 0], end[1, 0] = 7, 3
    got = ops.row_interval_attention(q, k, v, start.to(backend.device), end.to(backend.device))
    assert_close(got, masked_softmax, q, k, v, start, end)
    empty = (end.clamp(0, L) <= start.clamp(0, L))[:, None].expand(2, 2, L).to(backend.device)
    assert (got[empty] == 0).all()


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    q, k, v = make(3, 2, 100, 64, device=backend.device)
    start, end = moved(random_intervals(3, 100), backend.device)
    whole = ops.row_interval_attention(q, k, v, start, end)
    for b in range(3):
        s = slice(b, b + 1)
        assert torch.equal(ops.row_interval_attention(q[s], k[s], v[s], start[b], end[b]), whole[s])
    for h in range(2):
        s = slice(h, h + 1)
        alone = ops.row_interval_attention(q[:, s], k[:, s], v[:, s], start, end)
        assert torch.equal(alone, whole[:, s])


def test_a_later_level_leaves_earlier_ones_bit_identical(backend):
    start, end = moved(PYRAMID.intervals("level-causal"), backend.device)
    q, k, v = make(1, 2, PYRAMID.length, 64, device=backend.device)
    before = ops.row_interval_attention(q, k, v, start, end)
    first, last = PYRAMID.segments[-2]
    for t in (q, k, v):
        t[:, :, first:last] += 1
    after = ops.row_interval_attention(q, k, v, start, end)
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first:], after[:, :, first:])


def test_what_a_row_does_not_see_does_not_change_its_bits(backend):
    # The same rows with other neighbours: cut from the sequence, the rest of the intervals widened.
    q, k, v = make(1, 1, 150, 64, device=backend.device)
    start, end = random_intervals(1, 150, seed=3)
    whole = ops.row_interval_attention(q, k, v, *moved((start[0], end[0]), backend.device))
    start[:, ::2], end[:, ::2] = 0, 150
    other = ops.row_interval_attention(q, k, v, *moved((start[0], end[0]), backend.device))
    if backend.name != "emulated" and backend.device == "cpu":  # CPU kernels promise it; see docs
        assert torch.equal(whole[:, :, 1::2], other[:, :, 1::2])
    else:
        assert_close(other, masked_softmax, q, k, v, start[0], end[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads):
    before = torch.get_num_threads()
    q, k, v = make(1, 3, 400, 64)
    start, end = Layout.scales([(1, 30), (2, 35), (3, 100)]).intervals("level-causal")
    torch.set_num_threads(1)
    one = ops.row_interval_attention(q, k, v, start, end)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.row_interval_attention(q, k, v, start, end), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_unaligned_views(backend, dtype):
    B, L, H, D = 2, 70, 2, 64
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(B, L, 3, H, D + 1, generator=g).to(dtype).to(backend.device)
    start, end = moved(random_intervals(B, L), backend.device)
    for cut in (slice(0, D), slice(1, D + 1)):
        q, k, v = qkv[..., cut].permute(2, 0, 3, 1, 4).unbind(0)
        got = ops.row_interval_attention(q, k, v, start, end)
        want = ops.row_interval_attention(q.contiguous(), k.contiguous(), v.contiguous(), start, end)
        assert torch.equal(got, want)
    transposed = q.transpose(2, 3).contiguous().transpose(2, 3)  # channels not contiguous
    assert torch.equal(ops.row_interval_attention(transposed, k, v, start, end), want)


@pytest.mark.parametrize("scale", [None, 1.0, 0.03, -0.5])
def test_scale(backend, scale):
    q, k, v = make(1, 1, 33, 64, device=backend.device)
    intervals = moved(Layout.scales([(3, 11)]).intervals("token-causal"), backend.device)
    got = ops.row_interval_attention(q, k, v, *intervals, scale=scale)
    assert_close(got, lambda *t: masked_softmax(*t, scale=scale), q, k, v, *intervals)


def test_large_scores_do_not_overflow(backend):
    q, k, v = make(1, 1, 80, 64, device=backend.device)
    intervals = moved(Layout.scales([(8, 10)]).intervals("token-causal"), backend.device)
    got = ops.row_interval_attention(q * 300, k, v, *intervals)
    assert got.isfinite().all()
    # Scores of some thousand carry the rounding of their own sum, whose order differs, into the exponent.
    assert_close(got, masked_softmax, q * 300, k, v, *intervals, k=4)


def test_nan_stays_in_its_rows(backend):
    q, k, v = make(1, 2, 40, 64, device=backend.device)
    intervals = moved(Layout.scales([(4, 10)]).intervals("full"), backend.device)
    q[0, 1, 7, 3] = float("nan")
    out = ops.row_interval_attention(q, k, v, *intervals)
    assert out[0, 1, 7].isnan().all()
    assert out.isnan().sum() == 64


def test_empty_sizes(backend):
    for shape in ((0, 2, 5, 64), (2, 0, 5, 64), (2, 2, 0, 64)):
        q = torch.zeros(shape, device=backend.device)
        interval = torch.zeros(shape[2], dtype=torch.int32, device=backend.device)
        assert ops.row_interval_attention(q, q, q, interval, interval).shape == shape


def _packet(namespace):
    if namespace == "arimg_emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            pytest.skip(str(error))
    return getattr(torch.ops, namespace)


@pytest.mark.parametrize("namespace", ["arimg", "arimg_emulated"])
def test_opcheck(namespace):
    packet = _packet(namespace)
    q, k, v = make(1, 2, 14, 16)
    start, end = Layout.scales([1, 2, 3]).intervals("level-causal")
    seen = Layout.scales([1, 2, 3]).visibility("level-causal")
    rule, factor = (start, end), torch.tensor([0.5, 2.0])
    tail = (seen.plan.row_tiles, seen.plan.tile_rows, factor, 1, True, 0.25, True)
    torch.library.opcheck(packet.row_interval_attention, (q, k, v, *rule, *tail))
    torch.library.opcheck(
        packet.row_interval_attention, (q, k, v, *rule, None, 0, None, 0, False, 0.25, False)
    )
    out, lse = packet.row_interval_attention(q, k, v, *rule, *tail)
    torch.library.opcheck(
        packet.row_interval_attention_backward,
        (q, q, k, v, out.transpose(1, 2), lse, *rule, seen.plan.key_rows, factor, 1, True, 0.25),
    )


def _good():
    q = torch.zeros(2, 3, 5, 16)
    interval = torch.zeros(5, dtype=torch.int32)
    return dict(q=q, k=q, v=q, row_start=interval, row_end=interval)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(q=torch.zeros(3, 5, 16)), ValueError, r"expected q \[B, H, L, D\], got \[3, 5, 16\]"),
        (dict(q=torch.zeros(2, 3, 5, 16).double()), TypeError, "expected q of float32"),
        (dict(q=torch.zeros(2, 3, 5, 12)), ValueError, "multiple of 8 up to 256, got 12"),
        (dict(q=torch.zeros(2, 3, 5, 264)), ValueError, "multiple of 8 up to 256, got 264"),
        (dict(k=torch.zeros(2, 2, 5, 16)), ValueError, r"expected k \[2, a divisor of 3, keys, 16\]"),
        (dict(v=torch.zeros(2, 3, 5, 16).half()), TypeError, "expected v of q's dtype"),
        (dict(v=torch.zeros(2, 3, 5, 16, device="meta")), ValueError, "expected v on q's device"),
        (dict(row_start=torch.zeros(5)), TypeError, "expected row_start of int32, got torch.float32"),
        (dict(row_end=torch.zeros(4, dtype=torch.int32)), ValueError, r"expected row_end \[5\] or \[2, 5\]"),
        (dict(row_end=torch.zeros(2, 5, dtype=torch.int32)), ValueError, "row_end of row_start's shape"),
        (dict(row_end=None), TypeError, "expected row_end to be a tensor, got NoneType"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        ops.row_interval_attention(**(_good() | change))
