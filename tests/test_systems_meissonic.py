"""Meissonic: exact counts of hidden tokens, tokens that stay, one range of times in training and sampling."""

from itertools import pairwise

import pytest
import torch

import released
import system_checks as checks
from arimg import _library
from arimg.commit import ByRatio, LinearNoise, Plan
from arimg.generators.loop import EachStep, final_tokens, generate
from arimg.systems.meissonic import TIME, MeissonicModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer

LABELS = torch.tensor([1, 0, 1])


def make(**options):
    torch.manual_seed(0)
    tokenizer = _single_scale(scale_tokenizer(), 64)
    model = MeissonicModel(tokenizer, 2, 8, depth=2, width=64, heads=2, dropout=0.0, **options)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make()


def times_of(model, **options):
    """What the network is told in each pass."""
    told, predict = [], model.predict

    def watched(text, tokens, time, micro=None):
        told.append((time, (tokens == model.mask).sum(1)))
        return predict(text, tokens, time, micro)

    model.predict = watched
    try:
        turns = list(generate(model, LABELS, seed=3, **options))
    finally:
        del model.predict
    return told, turns


def test_each_pass_hides_exactly_what_the_schedule_says(model):
    told, turns = times_of(model)
    hidden = [64 - sum(ByRatio(8).committed(64)[:k]) for k in range(8)]
    assert [int(n[0]) for _, n in told] == hidden
    assert all((n == n[0]).all() for _, n in told)
    for before, after in pairwise(turns):
        assert (after.final | ~before.final).all()
        assert torch.equal(after.drawn[before.final], before.drawn[before.final])
    assert turns[-1].done and turns[-1].final.all() and (turns[-1].drawn < 64).all()


def test_times_of_sampling_are_those_of_training_and_the_released_ones_are_not(model):
    told, _ = times_of(model)
    for time, hidden in told:
        assert torch.allclose(time, TIME * hidden / 64)
    assert told[0][0][0] == TIME
    released, _ = times_of(model, released_timestep=True)
    assert [int(time[0]) for time, _ in released] == list(range(8))


def test_rows_and_seeds(model):
    (tokens,) = final_tokens(generate(model, LABELS, seed=3))
    assert torch.equal(final_tokens(generate(model, LABELS, seed=3))[0], tokens)
    for r in range(3):
        assert torch.equal(final_tokens(generate(model, LABELS[r : r + 1], seed=3 + r))[0][0], tokens[r])
    assert model.pictures(LABELS).shape == (3, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"expected micro \[3, 5\], got \[3, 4\]"):
        next(generate(model, LABELS, micro=torch.zeros(3, 4)))


def test_the_kernels_of_the_gpu_draw_the_same(model):
    turn = next(generate(model, LABELS, seed=3))
    rule = model.commit
    turn.tokens = turn.final = None
    rule.settle(turn)
    tokens, final = turn.drawn, turn.final
    _library.load_emulated()
    turn.tokens = turn.final = None
    with _library.emulated_cuda():
        rule.settle(turn)
    assert torch.equal(turn.drawn, tokens) and torch.equal(turn.final, final)


def test_shapes_at_full_size():
    """1024 px: 64 x 64 tokens of 8192 codes, 42 blocks of 8 heads of 128, 77 tokens of text."""
    tokenizer = checks.tokenizer(64, 8192)
    with torch.device("meta"):
        big = MeissonicModel(tokenizer, 1, 64, 77, compress=True, depth=42, width=1024, heads=8, hidden=4096)
    shapes = released.shapes_of(big)
    llama = released.llamagen(42, 1024, 4096, vocab=8193)
    del llama["cls_embedding.embedding_table.weight"]
    assert {k: v for k, v in shapes.items() if k in llama} == llama
    assert shapes["down.weight"] == (1024, 1024, 2, 2) and shapes["up.weight"] == (4096, 1024)
    assert shapes["conditioner.table"] == (2, 77, 1024) and shapes["numbers.0.weight"] == (1024, 192)
    assert big.layout.length == 4096 and big.rope().cos.shape == (78 + 32 * 32, 64)
    cos = MeissonicModel(checks.tokenizer(4), 1, depth=1, width=128, heads=1).rope().cos[-16:]
    row, column = cos[:, 8:36].view(4, 4, 28), cos[:, 36:].view(4, 4, 28)  # of 16, 56 and 56 channels
    assert (row == row[:, :1]).all() and (column == column[:1]).all() and (row != row[:1]).any()


def test_halved_maps_have_a_quarter_of_the_inputs():
    model = make(compress=True)
    seen, teach = [], model.teach
    model.teach = lambda h: seen.append(h.shape[1]) or teach(h)
    (tokens,) = final_tokens(generate(model, LABELS))
    assert set(seen) == {4 + 1 + 16} and tokens.shape == (3, 64)


def test_confident_order_beats_random_order_where_tokens_are_correlated():
    """Maps of one token throughout: after some training, how uniform the samples are."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        examples = torch.randint(8, (16, 1)).expand(16, 64)
        loss = model.loss(examples, torch.zeros(16, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def agreement(rule):
        plan = Plan(ByRatio(4), rule, noise=LinearNoise(0.5))
        (tokens,) = final_tokens(
            generate(model, torch.zeros(32, dtype=torch.int64), commit=EachStep(lambda s, n: plan), seed=1)
        )
        return (tokens == tokens.mode(1).values[:, None]).double().mean().item()

    assert agreement("gumbel") > agreement("random") + 0.02
