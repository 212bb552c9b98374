"""VAR as a system: its cache, its running sum, and what a scale may see."""

from typing import cast

import pytest
import torch

import released
from arimg.generators.loop import Sampler
from arimg.generators.var import VarSession
from arimg.systems.var import VarModel
from arimg.tokenizers import VQVAE
from conftest import Backend
from system_checks import (
    LABELS,
    check_draws,
    check_learns,
    check_loads,
    check_rows_alone,
    check_ways,
    close,
    same_tokens_emulated,
    spread,
    tokens_of,
    turns_of,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VarModel:
    torch.manual_seed(0)
    tokenizer = VQVAE(40, 8, 8, (1, 1, 1, 1), [1, 2, 3, 4], blocks=1).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    made: VarModel = spread(VarModel(tokenizer, 3, depth=2, width=32, heads=2))
    return made


def test_a_released_state_dict_gives_the_structure_and_is_loaded(model: VarModel) -> None:
    size = {"c": 32, "heads": 2, "classes": 3, "vocab": 40, "z": 8, "scales": 4}
    shapes = released.var(2, False, True, 30, **size)
    state = released.random_state(shapes | released.var_constants(2, 32, 30))
    check_loads(model, state)


def test_masked_logits_are_the_cached_ones_and_f_hat_is_the_running_one(model: VarModel) -> None:
    turns = turns_of(model)
    indices = list(tokens_of(turns).split(model.layout.sizes, 1))
    forced = model(torch.tensor(LABELS), model.tokenizer.quantize.generator_input(indices))
    assert close(torch.cat([t.logits[:3] for t in turns], 1), forced)
    f_hat = model.tokenizer.quantize.features(indices)
    assert torch.equal(cast(VarSession, turns[-1].run.session).f_hat, f_hat)


def test_without_a_cache_the_same_is_drawn(model: VarModel) -> None:
    check_ways(model)
    session = cast(VarSession, turns_of(model, cached=False)[-1].run.session)
    assert session.caches == [] and [x.shape[1] for x in session.before] == list(model.layout.sizes)


def test_earlier_levels_do_not_see_later_ones_and_with_a_full_mask_they_do(
    model: VarModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, model.layout.length - 1, 8, generator=torch.Generator().manual_seed(1))
    for k, (start, end) in enumerate(model.layout.segments[1:], 1):
        other = x.clone()
        other[:, start - 1 : end - 1] += 1.0
        moved = (model(torch.tensor([0]), x) != model(torch.tensor([0]), other)).any(-1)[0]
        assert not moved[:start].any() and moved[start:].all(), k
    monkeypatch.setattr(model, "rule", "full")
    assert (model(torch.tensor([0]), x) != model(torch.tensor([0]), other)).any(-1).all()


def test_rows_are_independent_and_repeat(model: VarModel) -> None:
    check_rows_alone(model)


def test_the_same_draws_on_every_backend(backend: Backend, model: VarModel) -> None:
    check_draws(turns_of(model, [1]), backend)


def test_it_learns(model: VarModel) -> None:
    torch.manual_seed(0)
    fresh = VarModel(model.tokenizer, 2, depth=1, width=32, heads=2)
    check_learns(fresh, torch.randint(40, (2, 30)), torch.tensor([0, 1]))


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: VarModel) -> None:
    same_tokens_emulated(model)
    same_tokens_emulated(model, sampler=Sampler(top_k=1))
