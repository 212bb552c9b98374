"""Layouts: lengths, segments, and visibility against masks written from the definition."""

import pytest
import torch

from arimg.cache import KVCache
from arimg.layout import Layout
from arimg.tokenizers import SCALES_256, SCALES_512


@pytest.mark.parametrize(
    ("scales", "length"), [(SCALES_256, 680), (SCALES_512, 2240), (((1, 2), (3, 4)), 14)]
)
def test_lengths_and_segments(scales: tuple, length: int) -> None:
    layout = Layout.scales(scales)
    assert layout.length == length and len(layout) == len(scales)
    assert layout.segments[0][0] == 0 and layout.segments[-1][1] == length
    assert [e - s for s, e in layout.segments] == [h * w for h, w in layout.shapes]
    assert layout.level().bincount().tolist() == list(layout.sizes)


@pytest.mark.parametrize("rule", ["level-causal", "level-diagonal", "token-causal", "full"])
def test_intervals_are_the_mask_of_the_rule(rule: str) -> None:
    layout = Layout.scales((1, 2, 3, (2, 5)))
    level, i = layout.level(), torch.arange(layout.length)
    masks = {
        "level-causal": level[:, None] >= level,
        "level-diagonal": level[:, None] == level,
        "token-causal": i[:, None] >= i,
        "full": torch.ones(layout.length, layout.length, dtype=torch.bool),
    }
    row_start, row_end = layout.intervals(rule)
    assert row_start.dtype == row_end.dtype == torch.int32
    assert torch.equal((i >= row_start[:, None]) & (i < row_end[:, None]), masks[rule])


def test_bad_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a rule of .* got 'diagonal'"):
        Layout.scales((1, 2)).intervals("diagonal")
    for scales in ((), (0, 1), ((2, -1),)):
        with pytest.raises(ValueError, match="positive size"):
            Layout.scales(scales)


def test_cache_appends_truncates_and_refuses_overflow() -> None:
    cache = KVCache(2, 3, 8, 4)
    qkv = torch.randn(2, 5, 3, 3, 4)
    q = cache.append(qkv)
    assert (cache.length, cache.capacity, cache.nbytes) == (5, 8, 2 * 2 * 3 * 8 * 4 * 4)
    assert torch.equal(q, qkv[:, :, 0].transpose(1, 2))
    cache.truncate(2)
    cache.append(qkv[:, 2:])
    assert torch.equal(cache.k[:, :, :5], qkv[:, :, 1].transpose(1, 2))
    assert torch.equal(cache.v[:, :, :5], qkv[:, :, 2].transpose(1, 2))
    with pytest.raises(ValueError, match="expected at most 3 more tokens in a cache of 8, got 5"):
        cache.append(qkv)
    with pytest.raises(ValueError, match=r"expected a length of 0\.\.5, got 6"):
        cache.truncate(6)
