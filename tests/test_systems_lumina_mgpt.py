"""Lumina-mGPT: the grammar of its sequences, caches of two lengths, shapes that are read from tokens."""

import pytest
import torch

from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.nn.conditioning import Text
from arimg.systems.lumina_mgpt import LuminaModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer

LABELS = torch.tensor([1, 0, 1])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LuminaModel(_single_scale(scale_tokenizer(), 64), 2, depth=2, width=32, heads=2, dropout=0.05)
    torch.nn.init.normal_(made.output.weight, std=0.2)
    return made.eval()


def drawn(model, labels=LABELS, **options):
    return torch.cat(final_tokens(generate(model, labels, **options)), 1)


def test_the_shape_is_in_the_tokens(model):
    flat = torch.arange(16)
    for shape in ((2, 8), (4, 4), (8, 2)):
        tokens = flat.view(1, *shape)
        sequence = model.sequence(tokens)
        assert sequence.shape == (1, 3 + shape[0] * (shape[1] + 1))
        assert torch.equal(model.map(sequence[0]), tokens[0])
    with pytest.raises(ValueError, match="got another order"):
        model.map(torch.cat((sequence[0, :2], sequence[0, 2:].flip(0))))
    with pytest.raises(ValueError, match=r"expected sides of 1\.\.8, got 9"):
        model.number(9)


def test_the_grammar_makes_every_picture_valid_and_is_needed(model):
    for size in ((8, 8), (2, 8), (4, 4)):
        for row in drawn(model, size=size):
            assert tuple(model.map(row).shape) == size
    with pytest.raises(ValueError, match="got another order"):
        [model.map(row) for row in drawn(model, constrained=False)]
    assert model.pictures(LABELS[:1]).shape == (1, 3, SIZE, SIZE)


def test_caches_of_two_lengths_give_the_logits_of_a_recomputation(model):
    turns = list(generate(model, LABELS, seed=3, size=(3, 4)))
    tokens = torch.cat([turn.drawn for turn in turns], 1)
    assert tokens.shape == (3, 18)
    cached = torch.cat([turn.logits for turn in turns], 1)
    with torch.no_grad():
        said, alone = (model.predict(c, tokens[:, :-1]) for c in (LABELS, None))
    assert torch.allclose(cached[:3], said, atol=2e-5, rtol=1e-4)
    assert torch.allclose(cached[3:], alone, atol=2e-5, rtol=1e-4)
    lengths = turns[-1].run.session.caches[0].row_lengths
    assert lengths == (4 + 18,) * 3 + (18,) * 3


def test_rows_with_texts_of_their_own_length_are_those_alone(model):
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    text = Text(states, torch.tensor([2, 6], dtype=torch.int32))
    both = drawn(model, text, seed=5, size=(2, 3))
    for row, length in ((0, 2), (1, 6)):
        one = Text(states[row : row + 1, :length], torch.tensor([length], dtype=torch.int32))
        assert torch.equal(drawn(model, one, seed=5 + row, size=(2, 3))[0], both[row])
    assert torch.equal(both, drawn(model, text, seed=5, size=(2, 3)))


def test_it_trains_on_crops_and_without_text(model):
    torch.manual_seed(0)
    fresh = LuminaModel(model.tokenizer, 2, depth=1, width=32, heads=2)
    examples, labels = torch.arange(64).remainder(4).expand(8, 64), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = fresh.loss(examples, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    plain = Sampler()
    assert drawn(fresh.eval(), sampler=plain, size=(2, 2)).shape == (3, 9)
