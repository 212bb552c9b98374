"""Speculative systems on the network of LlamaGen: fewer passes, tokens that belong to the seed of a row."""

import pytest
import torch

import system_checks as checks
from arimg.generators.loop import ALWAYS, final_tokens, generate
from arimg.generators.speculative import BiasedGrouped, Draft, Grouped, Jacobi
from arimg.systems import llamagen
from arimg.systems.speculative import SMALL, SYSTEMS, DraftedModel, SpeculativeModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer
from pretend_cuda import CUDA, pretend_cuda

FOUND = {system.name: system for system in SYSTEMS}
LABELS = torch.tensor([1, 0])


@pytest.fixture(scope="module")
def tokenizer():
    return _single_scale(scale_tokenizer(), 256)


@pytest.fixture(scope="module", params=FOUND)
def model(request, tokenizer):
    torch.manual_seed(0)
    model = FOUND[request.param].make(tokenizer, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    examples = torch.arange(64).remainder(4).mul(3).expand(8, 64)
    for _ in range(6):
        optimizer.zero_grad()
        model.loss(examples, torch.arange(8) % 2).backward()
        optimizer.step()
    return model.eval()


def test_a_trained_network_takes_fewer_passes_by_its_own_rule(model):
    ways = model.ways()
    turns = {name: list(way(LABELS[:1], 3)) for name, way in ways.items()}
    *rules, plain = turns
    assert plain == "token by token" and len(turns[plain]) == 64
    for name in rules:
        (tokens,) = final_tokens(iter(turns[name]))
        assert tokens.shape == (1, 64) and len(turns[name]) < 60, name


def test_tokens_belong_to_the_seed_of_the_row_and_become_pictures(model):
    (both,) = final_tokens(generate(model, LABELS, seed=7))
    (again,) = final_tokens(generate(model, LABELS, seed=7))
    (second,) = final_tokens(generate(model, LABELS[1:], seed=8))
    assert torch.equal(both, again) and torch.equal(both[1:], second)
    pictures = model.pictures(LABELS, seed=7)
    assert pictures.shape == (2, 3, SIZE, SIZE)
    plain = torch.cat(final_tokens(generate(model, LABELS, commit=ALWAYS, seed=7)), 1)
    assert plain.shape == both.shape


RULES = {
    "fresh": Jacobi(3),
    "coupled": Jacobi(3, "couple"),
    "shared noise": Jacobi(3, "gumbel"),
    "grouped": BiasedGrouped(3),
    "grouped by codes": BiasedGrouped(3, embedding=torch.linspace(0, 1, 40)[:, None], max_distance=0.3),
    "grouped, exact": Grouped(3, torch.arange(40) // 4),
}


TINY = {"depth": 1, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0}


def network():
    return checks.spread(SpeculativeModel(checks.tokenizer(), 2, RULES, **TINY))


def drawn(name):
    (tokens,) = final_tokens(generate(network(), LABELS, commit=RULES[name], seed=7))
    return tokens


@pytest.fixture(scope="module")
def expected():
    return {name: drawn(name) for name in RULES}


@pytest.mark.parametrize("name", RULES)
def test_every_backend_drafts_and_checks_the_same(backend, expected, name):
    if backend.device == "cpu":
        assert torch.equal(drawn(name), expected[name]) and expected[name].shape == (2, 16)


@pytest.mark.parametrize("name", RULES)
def test_the_whole_model_draws_the_same_on_emulated_cuda(name):
    checks.same_tokens_emulated(network(), [1, 0], commit=RULES[name])


def test_a_draft_model_drafts_the_same_on_emulated_cuda():
    drafted = checks.spread(DraftedModel(checks.tokenizer(), 2, **SMALL))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in drafted.small.named_parameters():
            p.copy_(drafted.get_parameter(name) * (1 + 0.05 * torch.randn(p.shape, generator=noise)))
    kept = torch.stack([turn.length for turn in checks.turns_of(drafted, [1, 0])])
    assert {1, 5} <= set(kept.flatten().tolist())  # drafts are refused, and all of them kept
    checks.same_tokens_emulated(drafted, [1, 0])
    with pretend_cuda(), pytest.raises(ValueError, match="expected a draft model on cuda:0, got one on cpu"):
        next(generate(network().to(CUDA), LABELS, commit=Draft(drafted.small, 2)))


def test_the_network_is_that_of_llamagen(tokenizer):
    ours = {k: v.shape for k, v in llamagen.make(tokenizer, 2).state_dict().items()}
    for name in FOUND:
        theirs = {k: v.shape for k, v in FOUND[name].make(tokenizer, 2).state_dict().items()}
        assert {k: v for k, v in theirs.items() if not k.startswith("small.")} == ours
    assert theirs["small.tok_embeddings.weight"] == (256, SMALL["width"])
