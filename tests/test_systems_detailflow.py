"""DetailFlow: groups per pass, caches against a recomputation, noise in training, pictures of prefixes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import latent_toys as toys
import released
import system_checks as checks
from arimg.cli import main
from arimg.data.images import Images
from arimg.generators.loop import Sampler, Session, final_tokens, generate
from arimg.layout import Layout
from arimg.systems import find, registry
from arimg.systems import tokenizer as tokenizers
from arimg.systems.detailflow import DetailFlowModel, details
from arimg.tokenizers import LatentTokenizer
from conftest import Backend

SMALL = {"depth": 2, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0, "class_dropout": 0.0}


def model() -> DetailFlowModel:
    return checks.spread(DetailFlowModel(toys.made().eval(), 3, **SMALL))


def test_names_and_shapes_are_the_released_ones() -> None:
    tokenizer = LatentTokenizer(toys.Averages(), details(8, 128), vocab_size=8192)
    with torch.device("meta"):
        m = DetailFlowModel(tokenizer, 1000, depth=24, width=1024, heads=16)
    assert released.shapes_of(m) == released.detailflow(24, 1024, 2816)
    assert len(m.layout) == 23 and tokenizer.codes.shape == (8192, 8)


def test_a_released_state_dict_gives_the_structure_and_is_loaded() -> None:
    shapes = released.detailflow(2, 32, 48, vocab=64, classes=3, group=4)
    options = {"heads": 2, "dropout": 0.0, "class_dropout": 0.0}
    checks.check_loads(model(), released.random_state(shapes), **options)


def test_other_tokenizers_are_refused() -> None:
    tokenizer = toys.made()
    for sizes in ([1] * 16, [4] * 4, [1, 1, 1, 4, 4], [1, 1, 1, 1, 4, 4, 2]):
        tokenizer.layout = Layout.groups(sizes)
        with pytest.raises(ValueError, match=r"expected a tokenizer of n single tokens and groups of n, got"):
            DetailFlowModel(tokenizer, 3, **SMALL)
    with pytest.raises(ValueError, match=r"expected indices \[1, 12\], got \[1, 11\]"):
        model()(torch.tensor([0]), torch.zeros(1, 11, dtype=torch.int64))


def test_cached_logits_equal_teacher_forced_ones_and_those_without_caches() -> None:
    m = model()
    turns = checks.turns_of(m)
    assert [t.drawn.shape[1] for t in turns] == [1, 1, 1, 1, 4, 4, 4]
    labels = torch.tensor([*checks.LABELS, -1, -1, -1])
    with torch.no_grad():
        forced = m(labels, checks.tokens_of(turns)[:, :-4].repeat(2, 1))
    assert checks.close(torch.cat([t.logits for t in turns], 1), forced)
    checks.check_ways(m)


def test_a_group_depends_on_the_groups_before_it_and_single_tokens_on_those_before() -> None:
    m = model()
    tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))

    def same(place: int) -> list[bool]:
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        with torch.no_grad():
            before, after = (m(torch.tensor([0]), t) for t in (tokens, changed))
        return [bool((a == b).all()) for a, b in zip(before[0], after[0], strict=True)]

    assert same(2) == [True] * 3 + [False] * 13
    assert same(5) == [True] * 8 + [False] * 8
    assert same(11) == [True] * 12 + [False] * 4


def test_rows_alone_draw_the_same() -> None:
    together = checks.check_rows_alone(model())
    assert together.shape == (3, 16)


def test_the_kernels_draw_what_the_oracle_does(backend: Backend) -> None:
    checks.check_draws(checks.turns_of(model(), [1]), backend)


def test_the_whole_model_on_the_kernels_of_the_gpu() -> None:
    checks.same_tokens_emulated(model())


def features(n: int) -> Tensor:
    return toys.Averages().features(toys.pictures(n, 5))


def test_noise_comes_to_some_rows_of_training_and_stays_out_of_the_targets() -> None:
    m, f = model(), features(200)
    clean = m.tokenizer.encode_features(f)
    assert all(torch.equal(part, clean) for part in m.taught(f))
    torch.manual_seed(0)
    shares, starts = [], set()
    for _ in range(20):
        inputs, targets = m.train().taught(f)
        differs = inputs != targets
        start, end = next(s for s in m.layout.segments if differs[:, s[0] : s[1]].any())
        assert not differs[:, :start].any() and not differs[:, end:].any()
        assert torch.equal(targets[:, :end], clean[:, :end])
        untouched = (inputs == clean).all(1) & (targets == clean).all(1)
        shares.append(1 - float(untouched.float().mean()))
        starts.add(start)
    assert 0.25 < sum(shares) / 20 < 0.35
    assert len(starts) > 3 and 12 not in starts


def test_it_learns() -> None:
    torch.manual_seed(0)
    m = DetailFlowModel(toys.made().eval(), 2, **SMALL)
    f = features(2).repeat(8, 1, 1, 1)
    checks.check_learns(m, f, torch.arange(16) % 2)


def taught(tokenizer: LatentTokenizer, pictures: Tensor, labels: Tensor, noise: float) -> DetailFlowModel:
    """A generator that knows these pictures by heart."""
    torch.manual_seed(0)
    m = DetailFlowModel(tokenizer, len(labels.unique()), noise=noise, **SMALL).train()
    optimizer, f = torch.optim.Adam(m.parameters(), 3e-3), tokenizer.source.features(pictures)
    for _ in range(200):
        loss = m.loss(f, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return m.eval()


def test_a_generator_that_saw_noise_corrects_wrong_tokens() -> None:
    """Wrong tokens of a step are given; the generator goes on, always with the most probable."""
    tokenizer = toys.trained_on_colours(0, 0.7)
    images, labels = toys.colours(8, 3).repeat(16, 1, 1, 1), torch.arange(8).repeat(16)
    corrects, plain = (taught(tokenizer, images, labels, noise) for noise in (0.5, 0.0))

    def error(m: DetailFlowModel, given: list[Tensor]) -> float:
        turns = generate(m, labels, sampler=Sampler(top_k=1), given=given)
        tokens = torch.cat(final_tokens(turns), 1)
        return float((tokenizer.decode(tokens) - images).square().mean())

    assert error(corrects, []) == pytest.approx(error(plain, []), rel=0.1)
    torch.manual_seed(1)
    for group in range(3):
        wrong = tokenizer.corrected(images, group).inputs.split(tokenizer.layout.sizes, 1)
        given = [step.contiguous() for step in wrong[: group + 1]]
        assert error(corrects, given) < 0.6 * error(plain, given)  # seed 0: 0.14, 0.40, 0.30


@pytest.fixture(scope="module")
def trained() -> LatentTokenizer:
    return toys.trained(0, 0.5)


def test_pictures_of_longer_prefixes_are_nearer_to_the_whole(trained: LatentTokenizer) -> None:
    m = DetailFlowModel(trained, 2, **SMALL)
    images = toys.pictures(64, 5)
    tokens = [part.contiguous() for part in trained.encode(images).split(m.layout.sizes, 1)]
    session: Session = mock.Mock()
    whole = m.decode(session, tokens)
    ends = [1, 2, 4, 5, 7]  # 1, 2, 4, 8, 16 tokens: 3 of 4 x 4 pixels would cut the edges of these pictures
    errors = [float((m.preview(session, tokens[:n]) - whole).square().mean()) for n in ends]
    assert all(a > b for a, b in pairwise(errors)), errors
    assert errors[-1] == 0.0 and errors[-2] < 0.2 * errors[0]


def test_previews_are_prefixes_of_the_picture(trained: LatentTokenizer) -> None:
    m = checks.spread(DetailFlowModel(trained, 2, **SMALL))
    labels = torch.tensor([0, 1])
    shown = m.previews(labels, seed=4)
    assert shown.shape == (2, 5, 3, 32, 32)  # after 1, 2, 4, 8 and 16 tokens
    assert torch.equal(shown[:, -1], m.pictures(labels, seed=4))
    tokens = checks.tokens_of(checks.turns_of(m, [0, 1], seed=4))
    small = trained.decode(tokens[:, :8])
    assert small.shape[-1] < 32
    assert torch.equal(shown[:, 3], F.interpolate(small, (32, 32), mode="bilinear"))


def test_a_run_is_read_again_and_shows_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, grid = find("detailflow"), tmp_path / "grid.png"
    monkeypatch.setattr(tokenizers, "_train", lambda task, *_: task.modules["model"])
    images = Images(np.zeros((1, 64, 64, 3), np.uint8), np.zeros(1, np.int64), ("a",), ("red", "blue"))
    m = system.make(system.tokenizer(images, tmp_path), 2)
    registry.save(registry.Trained(system, m, images.classes), tmp_path)
    loaded = registry.load(tmp_path).model
    assert torch.equal(loaded.pictures(torch.tensor([0])), m.eval().pictures(torch.tensor([0])))
    arguments = ["systems", "sample", "detailflow", "--run", str(tmp_path), "--n", "1", "-o", str(grid)]
    assert main([*arguments, "--previews"]) == 0
    assert Image.open(grid).size == (7 * 66 + 2, 2 * 66 + 2)  # 1, 2, 4, ... 64 tokens of two pictures


def test_positions_are_group_and_place_in_it_and_the_class_has_none() -> None:
    rope = model().rope()
    assert not rope.cos[0].any() and not rope.sin[0].any()
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    for group, place in ((0, 0), (0, 3), (2, 1)):
        angle = torch.cat((group * frequencies, place * frequencies))
        torch.testing.assert_close(rope.cos[1 + 4 * group + place], angle.cos())
        torch.testing.assert_close(rope.sin[1 + 4 * group + place], angle.sin())
