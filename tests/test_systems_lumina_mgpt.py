"""Lumina-mGPT: the grammar of its sequences, caches of two lengths, shapes that are read from tokens, weights
of Chameleon.
"""

import pytest
import torch

import system_checks as checks
from arimg.generators.chameleon_parts import NAMES
from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.guidance import Guidance
from arimg.nn import checkpoint
from arimg.nn.conditioning import Text
from arimg.systems.lumina_mgpt import LuminaModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer
from system_checks import check_draws, turns_of

LABELS = torch.tensor([1, 0, 1])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LuminaModel(_single_scale(scale_tokenizer(), 64), 2, depth=2, width=32, heads=2, dropout=0.05)
    torch.nn.init.normal_(made.output.weight, std=0.2)
    with torch.no_grad():
        for layer in made.layers:
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                norm.weight.normal_(mean=2.0)
                norm.bias.normal_()
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


def test_conditions_in_passes_of_their_own_draw_the_same(model):
    both, alone = (list(generate(model, LABELS, seed=3, size=(3, 4), apart=apart)) for apart in (False, True))
    for a, b in zip(both, alone, strict=True):
        assert torch.allclose(a.logits, b.logits, atol=2e-5, rtol=1e-4) and torch.equal(a.drawn, b.drawn)
    session = alone[-1].run.session
    assert session.caches[0].row_lengths == (4 + 18,) * 3 and session.alone.caches[0].row_lengths == (18,) * 3
    assert len(list(generate(model, LABELS, sampler=Sampler(), size=(1, 1), apart=True))) == 5
    ways = model.ways()
    first, last = (torch.cat(final_tokens(way(LABELS, 7)), 1) for way in ways.values())
    assert len(ways) == 2 and torch.equal(first, last)


def test_queries_and_keys_are_normalised_so_that_their_size_does_not_matter(model):
    tokens, attention = torch.arange(12).view(1, 12), model.layers[0].attention
    weight, bias = attention.wqkv.weight.data[:64], attention.q_norm.bias.data  # of queries and keys, 32 each
    kept, logits = weight.clone(), []
    with torch.no_grad():
        for factor, shift in ((100, 0), (1000, 0), (100, 1)):
            weight.copy_(kept * factor)
            bias += shift
            logits.append(model.predict(LABELS[:1], tokens))
    weight.copy_(kept)
    bias -= 1
    assert torch.allclose(logits[1], logits[0], atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 0.01


def chameleon(**sizes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
    config = transformers.ChameleonConfig(vq_config=vq, vocabulary_map={"<image>": 4}, **sizes)
    return transformers.ChameleonForConditionalGeneration(config)


def test_weights_of_chameleon_give_its_logits():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 200}
    theirs = chameleon(**sizes, num_attention_heads=4, num_key_value_heads=2).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=1.5 * p.shape[-1] ** -0.5) if p.dim() > 1 else p.normal_(mean=1.0, std=0.3)
            if "_norm.weight" in name:
                p += 1.0
    rows = torch.randperm(200)[: 64 + 3 + 8]
    tokenizer = _single_scale(scale_tokenizer(), 64)
    ours = LuminaModel.from_state_dict(theirs.state_dict(), tokenizer=tokenizer, rows=rows, heads=4)
    assert (ours.heads, ours.kv_heads, ours.depth, ours.hidden) == (4, 2, 2, 96)
    caption, sequence = torch.randint(200, (2, 5)), torch.randint(75, (2, 9))
    said = theirs.model.embed_tokens(caption)
    with torch.no_grad():
        read = torch.cat((caption, rows[torch.cat((torch.full((2, 1), ours.start), sequence), 1)]), 1)
        expected = theirs.lm_head(theirs.model(input_ids=read).last_hidden_state)[:, 5:, rows]
        got = ours.predict(Text(said, torch.tensor([5, 5], dtype=torch.int32)), sequence)
    assert expected.std() > 0.5 and torch.allclose(got, expected, atol=1e-3, rtol=1e-4)


def test_the_shapes_of_the_published_size_are_those_of_chameleon():
    with torch.device("meta"):
        theirs = chameleon().state_dict()
    released = checkpoint.translated(theirs, NAMES, "Chameleon", ("model.vqmodel.",))
    tokenizer = _single_scale(scale_tokenizer(), 64)
    with torch.device("meta"):
        full = LuminaModel(tokenizer, 1, depth=32, width=4096, heads=32, hidden=11008)
    ours = {k: tuple(v.shape) for k, v in full.state_dict().items() if not k.startswith("conditioner.")}
    vocabulary = {"tok_embeddings.weight": (65536, 4096), "output.weight": (65536, 4096)}
    assert ours | vocabulary == {k: tuple(v.shape) for k, v in released.items()}
    assert ours["layers.31.attention.k_norm.bias"] == (32, 128) and len(ours) == 3 + 32 * 11
    with pytest.raises(ValueError, match=r"expected the state dict of a Chameleon, got one without 'lm_head"):
        checkpoint.translated({k: v for k, v in theirs.items() if k != "lm_head.weight"}, NAMES, "Chameleon")
    with pytest.raises(ValueError, match=r"expected the state dict of a Chameleon, got one with 'model.vqm"):
        checkpoint.translated(theirs, NAMES, "Chameleon")


def test_the_same_draws_on_every_backend(backend, model):
    """<h>, <w>, tokens among those of a picture, <eol>, <end>."""
    check_draws(turns_of(model, [1], size=(2, 2)), backend)


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


def test_the_whole_model_draws_the_same_on_emulated_cuda():
    small = LuminaModel(checks.tokenizer(4), 2, depth=1, width=32, heads=2)
    checks.same_tokens_emulated(checks.spread(small), [1, 0])
    checks.same_tokens_emulated(small, [1, 0], sampler=Sampler(Guidance(4.0), top_k=1), apart=True)
