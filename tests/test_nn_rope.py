"""Tables of rotary embeddings against complex numbers, written out from each system's formula."""

from __future__ import annotations

import cmath

import pytest
import torch

from arimg.nn.rope import rope_1d, rope_2d, rope_axes, rope_lumina, rope_normalised, rope_scales
from arimg.reference.kv_cache import Rope, rotate

SCALES = (1, (2, 3), 4, (6, 5))


def angles(positions, d, theta=1e4):
    return [[p * theta ** (-2 * j / d) for j in range(d // 2)] for p in positions]


def beside(first, second):
    return [a + b for a, b in zip(first, second)]


def raster(h, w):
    return [(y, x) for y in range(h) for x in range(w)]


def expect(rope: Rope, want: list[list[float]], dim: int) -> None:
    """The tables turn a vector as multiplication by e^(i angle) does."""
    assert rope.cos.shape == rope.sin.shape == (len(want), dim // 2) and rope.cos.dtype == torch.float32
    x = torch.randn(dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.arange(len(want))
    got = rotate(x.expand(1, 1, len(want), dim), rope, rows[None])[0, 0]
    for row, turn in zip(got, want):
        for j, angle in enumerate(turn):
            at = (2 * j, 2 * j + 1) if rope.interleaved else (j, j + dim // 2)
            z = complex(x[at[0]], x[at[1]]) * cmath.exp(1j * angle)
            # cos and sin are off by half a unit of float32 each
            assert abs(complex(row[at[0]], row[at[1]]) - z) < 2.0**-24 * 2 * abs(z)


@pytest.mark.parametrize("interleaved", [True, False])
def test_1d(interleaved):
    expect(rope_1d(9, 12, interleaved=interleaved), angles(range(9), 12), 12)
    stretched = rope_1d(9, 12, 500.0, scale=4, interleaved=interleaved)
    expect(stretched, angles([i / 4 for i in range(9)], 12, 500.0), 12)


def test_2d_raster():
    grid = raster(3, 4)
    want = beside(angles([y for y, _ in grid], 8), angles([x for _, x in grid], 8))
    expect(rope_2d(3, 4, 16), want, 16)


def test_the_prefix_of_a_raster_loses_its_queries_and_keys():
    table, bare = rope_2d(3, 4, 16, prefix=5), rope_2d(3, 4, 16)
    x = torch.randn(1, 2, 17, 16)
    turned = rotate(x, table, torch.arange(17)[None])
    assert (turned[:, :, :5] == 0).all()
    assert torch.equal(turned[:, :, 5:], rotate(x[:, :, 5:], bare, torch.arange(12)[None]))


def test_scales_of_infinity():
    rows, columns = [], []
    for h, w in ((1, 1), (2, 3), (4, 4), (6, 5)):
        # Python rounds halves to even, too
        rows += [round(y * 6 / h) + 6 for y, _ in raster(h, w)]
        columns += [round(x * 5 / w) + 5 for _, x in raster(h, w)]
    expect(rope_scales(SCALES, 16, offset=(6, 5)), beside(angles(rows, 8), angles(columns, 8)), 16)
    last = rope_scales(SCALES, 16)
    assert torch.equal(last.cos[-30:], rope_2d(6, 5, 16).cos)


def test_normalised_scales_of_star():
    rows, columns = [], []
    for h, w in ((1, 1), (2, 3), (4, 4), (6, 5)):
        rows += [y / max(h - 1, 1) * 64 for y, _ in raster(h, w)]
        columns += [x / max(w - 1, 1) * 64 for _, x in raster(h, w)]
    expect(rope_normalised(SCALES, 16), beside(angles(columns, 8), angles(rows, 8)), 16)


def test_corners_of_normalised_scales_are_equally_far_apart():
    table = rope_normalised((2, 5, 7), 16)
    ends = [(0, 3), (4, 28), (29, 77)]
    q, k = torch.randn(2, 16)
    scores = [
        rotate(q.view(1, 1, 1, -1), table, torch.tensor([[a]])).flatten()
        @ rotate(k.view(1, 1, 1, -1), table, torch.tensor([[b]])).flatten()
        for a, b in ends
    ]
    assert all(torch.equal(s, scores[0]) for s in scores)


def test_axes_of_lumina_and_meissonic():
    where = [(i, 0, 0) for i in range(4)] + [(4, y, x) for y, x in raster(2, 3)]
    want = beside(beside(angles([a for a, _, _ in where], 8), angles([b for _, b, _ in where], 4)),
                  angles([c for _, _, c in where], 4))  # fmt: skip
    expect(rope_lumina(4, 2, 3, (8, 4, 4)), want, 16)
    expect(rope_axes(torch.tensor(where), (8, 4, 4)), want, 16)
    assert rope_axes(torch.zeros(2, 3), (16, 56, 56)).cos.shape == (2, 64)


def test_bad_axes_are_refused():
    with pytest.raises(ValueError, match=r"expected coordinates \[P, 2\], got \[3, 1\]"):
        rope_axes(torch.zeros(3, 1), (4, 4))
    with pytest.raises(ValueError, match="expected even numbers of channels, got"):
        rope_axes(torch.zeros(3, 2), (3, 5))
