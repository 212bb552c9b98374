"""Visibility of the supported systems against masks written from their definitions, plans, and the module."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from arimg import ops, reference
from arimg.layout import RULES, Layout, Visibility, diagonal_order, pack
from arimg.nn import RowIntervalAttention, sparse_is_faster
from arimg.visibility import KEY_ROWS, row_tiles
from tolerance import assert_close

SCALES = Layout.scales((1, 2, 3, (2, 5)))


def from_levels(level: torch.Tensor, rule: str) -> torch.Tensor:
    """The mask by the definition, given the level of each token of the whole sequence."""
    i = torch.arange(len(level))
    own = i[:, None] == i
    return {
        "level-causal": level[:, None] >= level,
        "level-diagonal": level[:, None] == level,
        "token-causal": i[:, None] >= i,
        "strictly-lower": (level[:, None] > level) | own,
        "full": torch.ones(len(level), len(level), dtype=torch.bool),
    }[rule]


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    seen = SCALES.visibility(rule)
    mask = from_levels(SCALES.level(), rule)
    assert torch.equal(seen.mask(), mask)
    assert seen.pairs == int(mask.sum()) and seen.density == pytest.approx(mask.double().mean().item())
    assert SCALES.visibility(rule) is seen  # made once


@pytest.mark.parametrize("rule", RULES)
def test_a_prefix_is_level_minus_one(rule: str) -> None:
    """A source image or a text before the layout: seen by all (VAREdit's source, TokenFlow's text)."""
    n = 4
    seen = SCALES.visibility(rule, prefix=n)
    level = torch.cat((torch.full((n,), -1), SCALES.level()))
    want = from_levels(level, rule)
    want[n:, :n] = True
    want[:n] = torch.arange(len(level)) < n
    assert torch.equal(seen.mask(), want)


def test_a_causal_text_before_level_causal_scales() -> None:
    n = 4
    seen = SCALES.visibility("level-causal", prefix=n, prefix_rule="token-causal")
    want = from_levels(torch.cat((torch.full((n,), -1), SCALES.level())), "level-causal")
    want[:n] = torch.arange(seen.length) <= torch.arange(n)[:, None]
    assert torch.equal(seen.mask(), want)


def test_sinks_of_a_level_diagonal_refiner() -> None:
    """STAR's refiner: a row sees its own scale and the start token."""
    want = from_levels(SCALES.level(), "level-diagonal")
    want[:, 0] = True
    assert torch.equal(SCALES.visibility("level-diagonal", sinks=1).mask(), want)


def test_groups_of_detailflow() -> None:
    layout = Layout.groups([8] * 3)
    want = torch.arange(24)[:, None] // 8 >= torch.arange(24) // 8
    assert torch.equal(layout.visibility("level-causal").mask(), want)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5), (1, 6), (5, 2)])
def test_diagonals_of_nar(height: int, width: int) -> None:
    layout, order = Layout.diagonals(height, width), diagonal_order(height, width)
    assert order.sort().values.tolist() == list(range(height * width))
    level = order // width + order % width
    assert torch.equal(layout.level(), level)
    assert torch.equal(layout.visibility("level-causal").mask(), level[:, None] >= level)


def test_packed_sequences_of_flextok() -> None:
    """Patches that see each other, then registers that see what came before; several in a row."""
    parts = [Layout.groups([p] + [1] * r).visibility("level-causal") for p, r in ((4, 3), (6, 1), (2, 5))]
    packed = pack(parts)
    want = torch.block_diag(*[p.mask().float() for p in parts]).bool()
    assert torch.equal(packed.mask(), want) and packed.kind == "mask"
    lower = pack([SCALES.visibility("strictly-lower"), Layout.groups([2, 2]).visibility("strictly-lower")])
    blocks = [
        from_levels(SCALES.level(), "strictly-lower"),
        from_levels(torch.tensor([0, 0, 1, 1]), "strictly-lower"),
    ]
    assert torch.equal(lower.mask(), torch.block_diag(*[b.float() for b in blocks]).bool())


def test_cut_to_lengths() -> None:
    seen = SCALES.visibility("level-causal").cut(torch.tensor([24, 3, 0]))
    for b, n in enumerate((24, 3, 0)):
        want = from_levels(SCALES.level(), "level-causal")
        want[n:] = False
        want[:, n:] = False
        assert torch.equal(seen.mask()[b, 0], want)


def test_kinds() -> None:
    assert Layout.raster(3, 3).visibility("level-causal").kind == "causal"
    assert SCALES.visibility("full").kind == "full"
    assert SCALES.visibility("level-causal").kind == "mask"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, dict(prefix=70), dict(sinks=3)])
def test_plans(rule: str, options: dict) -> None:
    layout = Layout.scales([1, 2, 3, 5, (3, 40), 8, (2, 100)])
    seen = layout.visibility(rule, **options)
    tiles, longest, key_rows = seen.plan
    cut = tiles.tolist()
    assert cut[0] == 0 and cut[-1] == seen.length and longest == max(b - a for a, b in pairwise(cut)) <= 192
    mask = seen.mask()
    for t, (low, high) in enumerate(key_rows.tolist()):
        rows = mask[:, t * KEY_ROWS : (t + 1) * KEY_ROWS].any(1).nonzero()[:, 0]
        assert (low, high) == ((rows[0].item(), rows[-1].item() + 1) if len(rows) else (0, 0))
    visited, squares = seen.tiles_visited()
    assert squares == (-(-seen.length // 64)) ** 2 and visited * 64 * 64 >= seen.pairs


def test_tiles_follow_long_levels_and_join_short_ones() -> None:
    start, end = Layout.scales([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]).intervals("level-causal")
    cut = row_tiles(start, end, 192).tolist()
    assert cut[:3] == [0, 147, 316]  # six short levels in one tile, then 13 x 13
    assert {640, 1216, 2240} <= set(cut)
    assert row_tiles(start[:1], end[:1], 64).tolist() == [0, 1]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: SCALES.visibility("diagonal"), "expected a rule of"),
        (lambda: SCALES.visibility("full", prefix_rule="x"), "expected a prefix_rule of"),
        (lambda: SCALES.visibility("full", prefix=-1), "expected prefix and sinks >= 0"),
        (lambda: SCALES.visibility("level-diagonal", prefix=2, prefix_rule="token-causal"), "'full' with"),
        (lambda: Layout.groups([2, 0]), "all of positive size"),
        (lambda: Layout.diagonals(0, 2), "positive size"),
        (lambda: pack([]), "at least one visibility"),
        (lambda: pack([SCALES.visibility("full", sinks=1)]), "without sinks"),
        (lambda: RowIntervalAttention(SCALES, path="fast"), "expected a path of"),
        (lambda: RowIntervalAttention(SCALES)(*[torch.zeros(1, 1, 5, 8)] * 3), r"expected q \[B, H, 24, D\]"),
    ],
)
def test_bad_input_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
def test_module_paths_agree(rule: str, path: str) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, SCALES.length + 3, 16, generator=g)
    k, v = (torch.randn(2, 2, SCALES.length + 3, 16, generator=g) for _ in range(2))
    module = RowIntervalAttention(SCALES, rule, prefix=3, scale=0.3, heads=4, path=path)
    with torch.no_grad():
        module.head_scale.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
    seen = module.visibility()

    def formula(q, k, v):
        return reference.row_interval_attention(
            q, k, v, seen.row_start, seen.row_end, scale=0.3, head_scale=module.head_scale.to(q.dtype),
            sinks=seen.sinks, self_key=seen.self_key,
        )  # fmt: skip

    assert_close(module(q, k, v), formula, q, k, v)
    module(q, k, v).square().sum().backward()
    assert module.head_scale.grad is not None and module.head_scale.grad.abs().min() > 0


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_module_with_padding(path: str) -> None:
    q = torch.randn(3, 1, SCALES.length, 8, generator=torch.Generator().manual_seed(1))
    module = RowIntervalAttention(SCALES, path=path)
    lengths = torch.tensor([24, 5, 1])
    got = module(q, q, q, lengths)
    for b, n in enumerate(lengths.tolist()):
        start, end = SCALES.intervals("level-causal")
        part = q[b : b + 1, :, :n]
        want = ops.row_interval_attention(part, part, part, start[:n], end[:n].clamp(max=n))
        assert (got[b : b + 1, :, :n] - want).abs().max() < 1e-6


def test_the_faster_path_is_said_for_every_rule() -> None:
    for rule in RULES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert isinstance(sparse_is_faster(SCALES.visibility(rule), dtype), bool)
    tiny, long = Layout.scales([2]), Layout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    assert not sparse_is_faster(tiny.visibility("full"))
    assert sparse_is_faster(long.visibility("level-causal"))
    assert not sparse_is_faster(SCALES.visibility("full"), device="cuda")
    assert sparse_is_faster(SCALES.visibility("level-diagonal"), device="cuda")
    assert isinstance(SCALES.visibility("full").to("cpu"), Visibility)
