"""Token-Shuffle: windows in and out, n / s^2 entries in the caches, and what drawing at once loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import released
import system_checks as checks
from arimg.generators.loop import Sampler, generate
from arimg.systems import find
from arimg.systems.token_shuffle import TokenShuffleModel

SMALL = {"depth": 2, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0, "class_dropout": 0.0}


def model(s: int = 2) -> TokenShuffleModel:
    return checks.spread(TokenShuffleModel(checks.tokenizer(), 3, s=s, **SMALL))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return checks.tokens_of(checks.turns_of(model()))


def test_with_identity_mlps_what_goes_in_comes_out() -> None:
    m = model()
    for name in ("narrow", "fuse", "split", "widen"):
        setattr(m, name, nn.Identity())
    tokens = torch.arange(16)[None]
    assert torch.equal(m.unfold(m.embed(tokens)), m.tok_embeddings(tokens))
    assert m.order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("s", [1, 2, 4])
def test_passes_and_cache_entries_are_n_over_s_squared(s: int) -> None:
    m = model(s)
    turns = checks.turns_of(m)
    assert len(turns) == 16 // s**2 and all(t.drawn.shape == (3, s * s) for t in turns)
    session = turns[-1].run.session
    assert session.caches[0].length == 16 // s**2  # the class and all windows but the last
    assert session.caches[0].capacity == 16 // s**2


@pytest.mark.parametrize("s", [1, 2])
def test_cached_logits_equal_teacher_forced_ones(s: int) -> None:
    m = model(s)
    turns = checks.turns_of(m)
    labels = torch.tensor([*checks.LABELS, -1, -1, -1])
    with torch.no_grad():
        forced = m(labels, checks.tokens_of(turns)[:, : -s * s].repeat(2, 1))
    assert checks.close(torch.cat([t.logits for t in turns], 1), forced)


def test_guidance_rises_over_the_first_half() -> None:
    assert [t.guidance for t in checks.turns_of(model())] == [1.0, 1.5, 2.0, 2.0]


def test_a_row_depends_on_its_label_and_seed_alone() -> None:
    checks.check_rows_alone(model())


def test_every_backend_draws_the_same_tokens(backend, expected: Tensor) -> None:
    if backend.device == "cpu":
        assert torch.equal(checks.tokens_of(checks.turns_of(model())), expected)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_a_window_are_drawn_independently(seed: int) -> None:
    """Windows that are all 0 or all 1: drawn at once they agree by chance (1/8), one by one always."""
    agree = {}
    for s in (1, 2):
        tokenizer = checks.tokenizer(2, 4)
        torch.manual_seed(seed)
        m = TokenShuffleModel(tokenizer, 1, s=s, **{**SMALL, "depth": 1})
        optimizer = torch.optim.Adam(m.parameters(), 5e-3)
        for _ in range(60):
            tokens = torch.randint(2, (64, 1)).expand(-1, 4)
            loss = m.loss(tokens, torch.zeros(64, dtype=torch.int64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        labels = torch.zeros(256, dtype=torch.int64)
        drawn = checks.tokens_of(list(generate(m.eval(), labels, sampler=Sampler(), seed=0)))
        agree[s] = float((drawn == drawn[:, :1]).all(1).float().mean())
    assert agree[1] > 0.9 and 0.04 < agree[2] < 0.25


@pytest.mark.parametrize(("side", "steps"), [(64, 1024), (128, 4096)])
def test_shapes_at_full_size(side: int, steps: int) -> None:
    """1024 and 2048 px on 20 blocks of width 3072: the MLPs narrow a token to a quarter of it."""
    with torch.device("meta"):
        big = TokenShuffleModel(checks.tokenizer(side), 1, depth=20, width=3072, heads=24)
    shapes = released.shapes_of(big)
    assert len(big.layout) == steps and big.layout.length == 4 * steps
    assert shapes["narrow.0.weight"] == (768, 3072) and shapes["narrow.2.weight"] == (768, 768)
    assert shapes["widen.0.weight"] == (3072, 768) and shapes["widen.2.weight"] == (3072, 3072)
    for name in ("fuse.0", "fuse.1", "split.0", "split.1"):
        mlp = released.linear(f"{name}.fc1", 3072, 3072) | released.linear(f"{name}.fc2", 3072, 3072)
        assert {k: v for k, v in shapes.items() if k.startswith(f"{name}.fc")} == mlp
    llama = released.llamagen(20, 3072, 8192, vocab=40, classes=1)
    assert {k: v for k, v in shapes.items() if k in llama} == llama


def test_pictures_and_what_does_not_fit() -> None:
    m = model()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = m.encode(pixels)
    session = m.begin(torch.tensor([0, 1]), False)
    assert torch.equal(m.decode(session, list(tokens.split(4, 1))), m.tokenizer.reconstruct(pixels))
    ways = m.ways()
    assert [len(list(way(torch.tensor([0]), 0))) for way in ways.values()] == [4, 16]
    assert find("token-shuffle").title == "Token-Shuffle"
    with pytest.raises(ValueError, match="expected a window whose side divides the 4 tokens of a row"):
        model(3)


def test_the_whole_model_draws_the_same_on_emulated_cuda() -> None:
    checks.same_tokens_emulated(model())
    checks.same_tokens_emulated(model(), sampler=Sampler(top_k=1))
