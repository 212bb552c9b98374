"""Training of 1-D tokenizers: features first, then pixels; what stays as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import system_checks as checks
from arimg.data.images import Images
from arimg.systems.detailflow import details
from arimg.tokenizers import LatentTokenizer
from arimg.train.latent import LatentTask
from arimg.train.tokenizer import TokenizerSettings

SETTINGS = TokenizerSettings(lr=3e-3, vq=0.02, restart_every=20, restart_until=40)


def images() -> Images:
    colours = np.random.default_rng(0).integers(0, 256, (32, 2, 2, 3), dtype=np.uint8)
    pixels = colours.repeat(16, 1).repeat(16, 2)
    return Images(pixels, np.zeros(32, np.int64), tuple(str(i) for i in range(32)), ("all",))


def task(pixels_from: int, settings: TokenizerSettings = SETTINGS) -> LatentTask:
    torch.manual_seed(0)
    made = LatentTokenizer(checks.tokenizer(4), details(4, 16), vocab_size=64, width=48, depth=1)
    return LatentTask(made.train(), images(), settings, pixels_from=pixels_from)


def changed(before: nn.Module, after: nn.Module) -> bool:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def test_it_learns_features_and_then_all_but_the_encoder_of_the_source_from_pixels() -> None:
    t = task(pixels_from=60)
    before = copy.deepcopy(t.latent)
    values = [t.step(torch.arange(16) + 16 * (i % 2), i)["features"] for i in range(60)]
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
    assert changed(before.encoder, t.latent.encoder) and changed(before.decoder, t.latent.decoder)
    assert not changed(before.source, t.latent.source)
    t.noise = 1.0  # codes that the encoder sees are then among what learns
    before = copy.deepcopy(t.latent)
    shown = [t.step(torch.arange(16), i) for i in range(60, 64)]
    assert all("psnr" in values and "features" not in values for values in shown)
    assert not changed(before.source.encoder, t.latent.source.encoder)
    for part in ("encoder", "decoder", "read", "write", "narrow", "widen", "again"):
        assert changed(getattr(before, part), getattr(t.latent, part)), part
    assert changed(before.source.decoder, t.latent.source.decoder)
    assert t.grid(t.latent).shape[0] == 3


def test_prefixes_end_with_a_step_and_noise_comes_before_their_last_one() -> None:
    t = task(0)
    segments = t.latent.layout.segments
    drawn = [t._draw() for _ in range(2000)]
    assert {end for end, _ in drawn} == {end for _, end in segments}
    assert 0.1 < sum(end < 16 for end, _ in drawn) / 2000 < 0.25
    noisy = [(end, group) for end, group in drawn if group is not None]
    assert 0.4 < len(noisy) / 2000 < 0.6
    assert all(segments[group][1] < end for end, group in noisy)


def test_codes_that_are_not_used_move_and_the_others_stay() -> None:
    t = task(0)
    dead = torch.tensor([3, 7, 40])
    before = t.latent.codes.detach().clone()
    moved = t._move(dead, t.shown)
    same = (moved == before).all(1)
    assert (~same).nonzero().flatten().tolist() == dead.tolist()


def test_settings_of_a_decoder_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="expected settings without decoder_only"):
        task(0, TokenizerSettings(decoder_only=True))
