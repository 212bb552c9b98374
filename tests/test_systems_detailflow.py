"""DetailFlow's generator: groups per pass, caches against a recomputation, what sees what."""

import pytest
import torch

from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.systems.detailflow import DetailFlowModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer
from system_checks import same_tokens_emulated

LABELS = torch.tensor([1, 0, 1])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = DetailFlowModel(_single_scale(scale_tokenizer(), 64), 2, depth=2, width=32, heads=2, dropout=0.0)
    torch.nn.init.normal_(made.output.weight, std=0.2)
    return made.eval()


def test_passes_and_cached_logits_are_those_of_the_whole_sequence(model):
    turns = list(generate(model, LABELS, seed=3))
    assert len(turns) == 8 + 7
    tokens = torch.cat([turn.drawn for turn in turns], 1)
    cached = torch.cat([turn.logits for turn in turns], 1)
    with torch.no_grad():
        said = model(LABELS, tokens[:, :-8])
        alone = model(torch.full_like(LABELS, -1), tokens[:, :-8])
    assert torch.allclose(cached, torch.cat((said, alone)), atol=2e-5, rtol=1e-4)
    released = list(generate(model, LABELS, seed=3, cached=False))
    for ours, theirs in zip(turns, released, strict=True):
        assert torch.allclose(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)


def test_a_group_depends_on_the_groups_before_it_alone(model):
    tokens = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(LABELS[:1], tokens[:, :-8])
        changed = tokens.clone()
        changed[:, 19] = (changed[:, 19] + 1) % 64
        after = model(LABELS[:1], changed[:, :-8])
    same = (before == after).all(-1)[0]
    assert same[:24].all() and not same[24:].any()


def test_rows_and_seeds(model):
    tokens = torch.cat(final_tokens(generate(model, LABELS, seed=3)), 1)
    assert torch.equal(torch.cat(final_tokens(generate(model, LABELS, seed=3)), 1), tokens)
    for r in range(3):
        alone = torch.cat(final_tokens(generate(model, LABELS[r : r + 1], seed=3 + r)), 1)
        assert torch.equal(alone[0], tokens[r])
    assert model.pictures(LABELS).shape == (3, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"expected indices \[3, 56\], got \[3, 55\]"):
        model(LABELS, tokens[:, :55])


def test_the_whole_model_draws_the_same_on_emulated_cuda(model):
    same_tokens_emulated(model, [1, 0])
    same_tokens_emulated(model, [1, 0], sampler=Sampler(top_k=1), cached=False)


def test_it_learns_rows_from_their_slots(model):
    torch.manual_seed(0)
    fresh = DetailFlowModel(model.tokenizer, 2, depth=1, width=32, heads=2, dropout=0.0)
    examples = (torch.arange(64) % 8).expand(8, 64)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    for _ in range(30):
        loss = fresh.loss(examples, torch.arange(8) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
