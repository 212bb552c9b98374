"""LlamaGen as a system: it trains on tokens of its tokenizer and draws the same with caches as without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import released
import system_checks as checks
from arimg.generators.loop import Sampler
from arimg.guidance import Guidance
from arimg.systems import find
from arimg.systems.llamagen import GridModel

SMALL = {"depth": 2, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0, "class_dropout": 0.0}


def model() -> GridModel:
    return checks.spread(GridModel(checks.tokenizer(), 3, **SMALL))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return checks.tokens_of(checks.turns_of(model()))


def test_a_released_state_dict_gives_the_structure_and_is_loaded() -> None:
    m = model()
    state = released.random_state(released.llamagen(2, 32, 48, vocab=40, classes=3))
    checks.check_loads(m, state, heads=2, dropout=0.0, class_dropout=0.0)


def test_cached_logits_equal_teacher_forced_ones() -> None:
    m = model()
    turns = checks.turns_of(m)
    labels = torch.tensor([*checks.LABELS, -1, -1, -1])
    with torch.no_grad():
        forced = m(labels, checks.tokens_of(turns)[:, :-1].repeat(2, 1))
    assert len(turns) == 16 and checks.close(torch.cat([t.logits for t in turns], 1), forced)


def test_without_a_cache_the_same_is_drawn() -> None:
    m = model()
    checks.check_ways(m)
    sampler = Sampler(Guidance(2.0, until=5))  # then the unconditional rows are no more
    cached, whole = (checks.turns_of(m, sampler=sampler, cached=c) for c in (True, False))
    assert torch.equal(checks.tokens_of(cached), checks.tokens_of(whole))
    assert [len(t.logits) for t in whole] == [6] * 5 + [3] * 11


def test_queries_and_keys_of_the_class_are_zero_and_its_value_counts() -> None:
    m = model()
    rope = m.rope()
    assert (rope.cos[0] == 0).all() and (rope.sin[0] == 0).all() and (rope.cos[1] == 1).all()
    session = checks.turns_of(m)[-1].run.session
    for cache in session.caches:
        k, v = cache.read(0, 1)
        assert (k == 0).all() and (v.abs().amax(-1) > 0.1).all()
        assert (cache.read(1, 2)[0].abs().amax(-1) > 0.1).all()


def test_a_row_depends_on_its_label_and_seed_alone() -> None:
    checks.check_rows_alone(model())


def test_every_backend_draws_the_same_tokens(backend, expected: Tensor) -> None:
    if backend.device == "cpu":
        assert torch.equal(checks.tokens_of(checks.turns_of(model())), expected)


def test_it_learns_what_belongs_to_a_class() -> None:
    torch.manual_seed(0)
    m = GridModel(checks.tokenizer(2, 16), 3, **{**SMALL, "depth": 1, "class_dropout": 0.1})
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    labels = torch.arange(3)
    optimizer = torch.optim.Adam(m.parameters(), 1e-2)
    first = float(m.loss(tokens, labels).detach())
    for _ in range(60):
        loss = m.loss(tokens.repeat(8, 1), labels.repeat(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 2.7 and float(m.eval().loss(tokens, labels).detach()) < 0.1
    assert torch.equal(checks.tokens_of(checks.turns_of(m, [0, 1, 2])), tokens)


def test_pictures_are_those_of_the_tokens() -> None:
    m = model()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = m.encode(pixels)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert torch.equal(m.decode(None, list(tokens.split(1, 1))), m.tokenizer.reconstruct(pixels))
    pictures = m.pictures(torch.tensor([0, 1]), seed=4)
    assert pictures.shape == (2, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.allclose(pictures[1:], m.pictures(torch.tensor([1]), seed=5), atol=1e-5)
    assert not any("tokenizer" in name for name in m.state_dict())  # saved beside the model
    assert find("llamagen").title == "LlamaGen"


def test_the_whole_model_draws_the_same_on_emulated_cuda() -> None:
    checks.same_tokens_emulated(model())
    checks.same_tokens_emulated(model(), sampler=Sampler(top_k=1))
