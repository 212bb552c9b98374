"""CTF: clusters, the coarse stage with caches, and tokens within their clusters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import released
import system_checks as checks
from arimg.generators.loop import Sampler
from arimg.guidance import Guidance
from arimg.systems import ctf, find
from arimg.systems.ctf import CtfModel, clusters_of

SMALL = {"depth": 2, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0, "class_dropout": 0.0}


def model() -> CtfModel:
    return checks.spread(CtfModel(checks.tokenizer(), 3, clusters=6, **SMALL))


def fine(m: CtfModel) -> Tensor:
    return checks.turns_of(m)[-1].drawn


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return fine(model())


@pytest.mark.parametrize("seed", range(3))
def test_codes_of_a_cluster_stand_close_and_of_a_random_one_do_not(seed: int) -> None:
    """The error of any other code of the cluster in a code's place: 3.25 times as large in random ones."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.nn.functional.normalize(torch.randn(4096, 8, generator=generator), dim=1)
    found = clusters_of(codes, 128)
    random = found[torch.randperm(4096, generator=generator)]

    def substitution(cluster: Tensor) -> float:
        groups = [codes[cluster == c] for c in range(128)]
        return float(sum((g - g.mean(0)).square().sum() for g in groups if len(g)))

    assert len(found.unique()) > 120
    assert abs(substitution(random) / substitution(found) - 3.25) < 0.1  # three seeds: 3.26 and 3.27


def test_every_token_lies_in_its_cluster() -> None:
    m = model()
    for sampler in (Sampler(), Sampler(Guidance(4.0)), Sampler(temperature=20.0)):
        turns = checks.turns_of(m, sampler=sampler)
        assert len(turns) == 17 and turns[-1].drawn.shape == (3, 16)
        coarse = checks.tokens_of(turns[:-1])
        assert torch.equal(m.cluster[turns[-1].drawn], coarse)
        assert len(coarse.unique()) > 2


def test_cached_logits_equal_teacher_forced_ones() -> None:
    m = model()
    turns = checks.turns_of(m)
    labels = m.labels(torch.tensor([*checks.LABELS, -1, -1, -1]))
    coarse = checks.tokens_of(turns[:-1]).repeat(2, 1)
    with torch.no_grad():
        first = m(labels, coarse[:, :-1])
        second = m.fine(labels, coarse)
    assert checks.close(torch.cat([t.logits for t in turns[:-1]], 1), first)
    assert checks.close(turns[-1].logits, second)


def test_the_fine_stage_sees_what_comes_later_and_the_coarse_one_does_not() -> None:
    m, labels = model(), torch.tensor([0])
    a = torch.zeros(1, 16, dtype=torch.int64)
    b = a.clone()
    b[0, 14] = 3
    with torch.no_grad():
        assert torch.equal(m(labels, a[:, :-1])[:, :15], m(labels, b[:, :-1])[:, :15])
        assert ((m.fine(labels, a) - m.fine(labels, b)).abs().amax(-1) > 1e-4).all()


def test_a_row_depends_on_its_label_and_seed_alone() -> None:
    checks.check_rows_alone(model())


def test_every_backend_draws_the_same_tokens(backend, expected: Tensor) -> None:
    if backend.device == "cpu":
        assert torch.equal(fine(model()), expected)


def test_clusters_shrink_the_head_and_carry_less_than_the_tokens() -> None:
    tokenizer = checks.tokenizer(4, 1024)
    m = CtfModel(tokenizer, 3, clusters=32, **SMALL)
    assert m.output.weight.shape == m.tok_embeddings.weight.shape == (32, 32)
    assert m.fine.output.weight.shape == (1024, 32)
    tokens = torch.randint(1024, (5000,), generator=torch.Generator().manual_seed(0))

    def entropy(x: Tensor) -> float:
        p = x.bincount().float() / len(x)
        return float(-(p * p.clamp(min=1e-9).log()).sum())

    assert entropy(m.cluster[tokens]) < 0.6 * entropy(tokens)


@pytest.mark.parametrize(("depth", "width", "plain", "coarse"), [(12, 768, 111, 87), (36, 1280, 775, 734)])
def test_the_coarse_stage_has_as_many_parameters_as_published(
    depth: int, width: int, plain: int, coarse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 clusters of 16,384 codes: millions of parameters without and with them."""
    zeros = torch.zeros(16384, dtype=torch.int64)
    monkeypatch.setattr(ctf, "clusters_of", lambda codes, clusters: zeros)
    tokenizer = checks.tokenizer(16, 16384)
    with torch.device("meta"):
        m = CtfModel(tokenizer, 1000, 512, depth=depth, width=width, heads=width // 64)
    stage = {k: v for k, v in released.shapes_of(m).items() if not k.startswith(("fine.", "cluster"))}
    hidden = stage["layers.0.feed_forward.w1.weight"][0]
    assert stage == released.llamagen(depth, width, hidden, vocab=512)
    for shapes, millions in ((stage, coarse), (released.llamagen(depth, width, hidden), plain)):
        assert round(sum(math.prod(s) for s in shapes.values()) / 1e6) == millions


def test_it_learns() -> None:
    torch.manual_seed(0)
    fresh = CtfModel(checks.tokenizer(), 2, clusters=6, **SMALL)
    checks.check_learns(fresh, torch.randint(40, (2, 16)), torch.tensor([0, 1]))


def test_loss_pictures_and_what_does_not_fit() -> None:
    m = model()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = m.encode(pixels)
    assert torch.equal(m.decode(None, [m.cluster[tokens], tokens]), m.tokenizer.reconstruct(pixels))
    loss = m.loss(tokens, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in m.parameters())
    assert [len(list(way(torch.tensor([0]), 0))) for way in m.ways().values()] == [17, 16]
    assert find("ctf").title == "CTF"
    with pytest.raises(ValueError, match="expected 2 to 40 clusters, got 41"):
        CtfModel(checks.tokenizer(), 3, clusters=41, **SMALL)


def test_the_whole_model_draws_the_same_on_emulated_cuda() -> None:
    checks.same_tokens_emulated(model())
    checks.same_tokens_emulated(model(), sampler=Sampler(top_k=1))
