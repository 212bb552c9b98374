"""1-D tokenizers: which token sees which, sizes and errors of prefixes, self-correction."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.tokenizers.latent import LatentTokenizer
from latent_toys import colours, made, pictures, trained, trained_on_colours


@pytest.fixture(scope="module")
def model() -> LatentTokenizer:
    return trained(0, 0.5)


def error(model: LatentTokenizer, tokens: Tensor, images: Tensor) -> float:
    return float((model.decode(tokens) - model.target(images, tokens.shape[1])).square().mean())


def test_sizes_follow_the_curve() -> None:
    m = made()
    sides = [m.side_of(n) for n in range(1, 17)]
    assert sides == sorted(sides) and sides[0] == 1 and sides[-1] == 4
    assert sides[7] == round((32 - 31 * (8 / 15) ** 1.5) / 8)
    assert m.decode(torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 3, 8, 8)
    assert m.target(pictures(2, 0), 16).shape == (2, 3, 32, 32)
    m.power = None
    assert m.side_of(1) == 4
    with pytest.raises(ValueError, match="expected 1 to 16 tokens, got 17"):
        m.side_of(17)


def test_tokens_see_their_group_and_those_before() -> None:
    m = made()
    features = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = m.latents(features)
        m.queries[9].normal_()  # of the group 8 .. 11
        after = m.latents(features)
    changed = (before - after).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 8 + [True] * 8


def test_a_prefix_decodes_alone_and_rows_are_their_own(model: LatentTokenizer) -> None:
    images = pictures(3, 77)
    tokens = model.encode(images)
    assert tokens.shape == (3, 16) and tokens.unique().numel() > 8
    for r in range(3):
        assert torch.equal(model.encode(images[r : r + 1])[0], tokens[r])


def prefix_errors(model: LatentTokenizer) -> list[float]:
    """Of prefixes, enlarged, to the whole picture."""
    images = pictures(64, 5)
    tokens, errors = model.encode(images), []
    for n in (1, 4, 8, 16):
        full = F.interpolate(model.decode(tokens[:, :n]), (32, 32), mode="bilinear")
        errors.append(float((full - images).square().mean()))
    return errors


def test_longer_prefixes_are_nearer_to_the_picture(model: LatentTokenizer) -> None:
    errors = prefix_errors(model)
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] < 0.3 * errors[0]  # seeds 0, 1, 2: 0.14 to 0.19


def test_a_noisy_group_leaves_what_is_before_and_the_targets_clean(model: LatentTokenizer) -> None:
    images = pictures(64, 6)
    torch.manual_seed(0)
    clean = model.encode(images)
    for group, (start, end) in enumerate(model.layout.segments):
        inputs, targets = model.corrected(images, group)
        assert torch.equal(targets[:, :end], clean[:, :end])
        assert torch.equal(inputs[:, :start], clean[:, :start])
        assert torch.equal(inputs[:, end:], targets[:, end:])
        assert (inputs[:, start:end] != clean[:, start:end]).float().mean() > 0.8


def test_training_with_noisy_groups_makes_noise_harm_less(model: LatentTokenizer) -> None:
    images, plain = pictures(64, 6), trained(0, 0.0)
    errors = {}
    for name, m in (("noisy", model), ("plain", plain)):
        torch.manual_seed(0)
        errors[name] = sum(error(m, m.corrected(images, group).inputs, images) for group in range(6)) / 6
    assert errors["noisy"] < 0.9 * errors["plain"]  # seeds 0, 1, 2: 0.80 to 0.81


def errors_behind_noise(model: LatentTokenizer, images: Tensor) -> tuple[float, float, float]:
    """Of the clean tokens; of noise in a step before clean tokens, and before those that were encoded with it
    in sight, means over the steps.
    """
    torch.manual_seed(0)
    clean = model.encode(images)
    stale, again = [], []
    for group, (_, end) in enumerate(model.layout.segments[:-1]):
        inputs = model.corrected(images, group).inputs
        stale.append(error(model, torch.cat((inputs[:, :end], clean[:, end:]), 1), images))
        again.append(error(model, inputs, images))
    return error(model, clean, images), sum(stale) / len(stale), sum(again) / len(again)


def test_what_is_encoded_behind_noise_corrects_it() -> None:
    images = colours(512, 10**6)
    clean, stale, again = errors_behind_noise(trained_on_colours(0, 0.7), images)
    assert again - clean < 0.7 * (stale - clean)  # seeds 0, 1, 2: 0.44, 0.44, 0.33
    _, plain, _ = errors_behind_noise(trained_on_colours(0, 0.0), images)
    assert again < 0.6 * plain  # seeds 0, 1: 0.36, 0.39
