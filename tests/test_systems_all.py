"""What every system of the list does: a step of training reaches its weights, and it has a plain method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arimg import models
from arimg.data.images import Images
from arimg.generators.loop import final_tokens
from arimg.systems import System, SystemModel, find, systems
from arimg.systems import tokenizer as tokenizers

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def pictures(size: int) -> Images:
    """Of few colours, so that JPEG files are short; as many classes as the bundled teacher has."""
    colours = np.random.default_rng(0).integers(0, 256, (len(LABELS), 4, 4, 3), dtype=np.uint8)
    pixels = colours.repeat(size // 4, 1).repeat(size // 4, 2)
    classes = tuple(str(i) for i in range(models.load().var.num_classes))
    return Images(pixels, LABELS.numpy(), tuple(str(i) for i in range(len(LABELS))), classes)


@pytest.fixture(params=systems())
def system(request: pytest.FixtureRequest) -> System:
    return find(request.param)


@pytest.fixture
def images(system: System) -> Images:
    return pictures(system.image_size)


@pytest.fixture
def model(system: System, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SystemModel:
    """Untrained, on a tokenizer that was not trained either."""
    monkeypatch.setattr(tokenizers, "_train", lambda task, *_: task.modules["model"])
    torch.manual_seed(0)
    return system.make(system.tokenizer(images, tmp_path), len(images.classes))


def test_a_step_of_training_reaches_every_weight(model: SystemModel, images: Images) -> None:
    examples = model.examples(images.batch(np.arange(len(LABELS))), LABELS)
    loss = model.train().loss(examples, LABELS)
    loss.backward()
    assert loss.dim() == 0 and loss.isfinite()
    missed = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missed == []


def test_every_system_is_measured_beside_a_plain_method(model: SystemModel) -> None:
    ways = model.eval().ways()
    assert len(ways) > 1
    for name, way in ways.items():
        tokens = torch.cat([t.flatten(1) for t in final_tokens(way(LABELS[:1], 3))], 1)
        assert tokens.shape[0] == 1 and tokens.shape[1] >= 64, name
