"""TokenFlow: two codebooks under one index, drafts of a scale that take each other's place in the cache."""

import pytest
import torch
import torch.nn.functional as F

import released
from arimg import models, ops, reference
from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.nn.conditioning import Text
from arimg.nn.dual_quantizer import DualQuantizer
from arimg.systems import find
from arimg.systems.tokenflow import TOP_K, TokenFlow
from arimg.systems.tokenizer import around
from arimg.tokenizers import VQVAE
from conftest import Backend
from system_checks import same_tokens_emulated

SCALES = ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))


def quantizer(weight: float = 1.0) -> DualQuantizer:
    torch.manual_seed(0)
    return DualQuantizer(256, 8, 8, SCALES, weight)


@pytest.fixture(scope="module")
def model() -> TokenFlow:
    model = TokenFlow(around(quantizer()), 3, depth=2, width=64, heads=2).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_the_weight_trades_the_errors_of_both_parts(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, book_a, book_b = (
        F.normalize(torch.randn(n, d, generator=generator), dim=1).to(backend.device)
        for n, d in ((70, 32), (70, 8), (200, 32), (200, 8))
    )
    errors = []
    for weight in (0.0, 1.0, 1e6):
        index = ops.nearest_code_dual(a, b, book_a, book_b, weight)
        total = torch.cdist(a, book_a).square() + weight * torch.cdist(b, book_b).square()
        worse = total.gather(1, index[:, None])[:, 0] - total.amin(1)
        assert (worse <= 1e-5 * (1 + weight)).all()
        errors.append((float((a - book_a[index]).square().sum()), float((b - book_b[index]).square().sum())))
    assert errors[0][0] < errors[1][0] < errors[2][0] and errors[0][1] > errors[1][1] > errors[2][1]


def test_training_and_encoding_find_the_same_tokens() -> None:
    q = quantizer()
    f = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    out, indices = q(f), q.encode(f)
    same = torch.cat([(a == b).flatten() for a, b in zip(out.indices, indices)])
    assert same.float().mean() > 0.98  # but for rounding near a tie
    whole = q.features(out.indices)
    torch.testing.assert_close(whole, out.f_hat.detach(), atol=1e-4, rtol=1e-4)
    f.requires_grad_()
    q(f).f_hat.sum().backward()
    assert torch.equal(f.grad, torch.ones_like(f))


def test_the_cache_changes_nothing(model: TokenFlow) -> None:
    """The released sampler runs without one."""
    labels = torch.tensor([0, 2])
    turns = list(generate(model, labels, seed=3))
    plain = list(generate(model, labels, seed=3, cached=False))
    assert len(turns) == 15 and [t.done for t in turns] == [False, False, True] * 5
    for a, b in zip(turns, plain):
        torch.testing.assert_close(a.logits, b.logits, atol=2e-4, rtol=1e-4)
        assert torch.equal(a.drawn, b.drawn)
    session = turns[-1].run.session
    assert [cache.length for cache in session.caches] == [4 + 103] * 2  # type: ignore[attr-defined]


def test_one_draft_is_teacher_forcing(model: TokenFlow) -> None:
    from arimg.generators.loop import ALWAYS

    labels = torch.tensor([1, 2])
    turns = list(generate(model, labels, seed=3, commit=ALWAYS))
    maps = model.quantizer.generator_input([t.drawn for t in turns])
    logits = torch.cat([t.logits[:2] for t in turns], 1)
    torch.testing.assert_close(logits, model(labels, maps), atol=2e-4, rtol=1e-4)


def test_the_last_draft_is_the_most_probable_and_sees_the_one_before(model: TokenFlow) -> None:
    turns = list(generate(model, torch.tensor([0]), seed=5))
    for turn in turns:
        cond, uncond = turn.logits.chunk(2)
        assert turn.guidance is not None
        mixed = turn.guidance * cond + (1 - turn.guidance) * uncond
        rank = (mixed > mixed.gather(2, turn.drawn[..., None])).sum(-1)
        assert (rank < TOP_K[turn.number]).all()
    first, second = turns[-3:-1]
    assert (first.logits - second.logits).abs().max() > 1e-2


def test_a_row_does_not_depend_on_the_others(model: TokenFlow) -> None:
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 5])
    from arimg.generators.loop import Sampler

    both = final_tokens(generate(model, Text(states, lengths), seed=torch.tensor([4, 9]), sampler=Sampler()))
    text = Text(states[1:], lengths[1:])
    alone = final_tokens(generate(model, text, seed=torch.tensor([9]), sampler=Sampler()))
    assert all(torch.equal(b[1:], a) for b, a in zip(both, alone))


def test_the_same_seed_draws_the_same_tokens_on_every_backend(backend: Backend) -> None:
    logits = torch.randn(4, 25, 256, generator=torch.Generator().manual_seed(0)) * 2
    seeds = torch.tensor([5, 6])
    for top_k in TOP_K:
        settings = {"guidance": 7.5, "top_k": min(top_k, 256), "top_p": 0.8, "position": 11}
        drawn = ops.sample(logits.to(backend.device), seed=seeds.to(backend.device), **settings)
        assert torch.equal(drawn.cpu(), reference.sample(logits, seed=seeds, **settings))


@pytest.mark.parametrize(
    ("sides", "tokens"),
    [
        ((1, 2, 4, 6, 8, 10, 12, 14, 16), 817),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27), 2227),
    ],
)
def test_shapes_at_full_size(sides: tuple[int, ...], tokens: int) -> None:
    """A Llama-2 7B over 32,768 codes of 32 + 8 channels, at 256 and 384 px."""
    with torch.device("meta"):
        full = DualQuantizer(32768, 32, 8, [(s, s) for s in sides])
        tokenizer = VQVAE(8, 40, 8, (1, 1), sides, blocks=1)
        tokenizer.quantize = full  # type: ignore[assignment]
        big = TokenFlow(tokenizer, 1, depth=32, width=4096, heads=32, tokens=77)
    shapes = released.shapes_of(big)
    assert big.layout.length == tokens and shapes["pos_embed"] == (1, tokens, 4096)
    assert shapes["word_embed.weight"] == (4096, 40) and shapes["lvl_embed.weight"] == (len(sides), 4096)
    assert shapes["head.weight"] == (32768, 4096) and shapes["text.table"] == (2, 77, 4096)
    assert shapes["blocks.31.attn.mat_qkv.weight"] == (12288, 4096)
    assert not any("cross" in name for name in shapes)


def test_it_trains_and_refuses_what_does_not_fit() -> None:
    tokenizer = around(quantizer())
    model = TokenFlow(tokenizer, 2, depth=1, width=32, heads=2).train()
    tokens = torch.randint(0, 256, (2, 103), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        loss = model.loss(tokens, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="expected a tokenizer with a DualQuantizer, got one with a Scale"):
        TokenFlow(models.load().tokenizer, 2)
    with pytest.raises(ValueError, match="expected 1 draft or more, got 0"):
        TokenFlow(tokenizer, 2, drafts=0)
    with pytest.raises(ValueError, match="expected channels for both parts, got 0 and 8"):
        DualQuantizer(8, 0, 8, SCALES)
    ragged = Text(torch.zeros(2, 3, 32), torch.tensor([3, 2]))
    with pytest.raises(ValueError, match=r"expected a prefix of one length"):
        next(generate(model, ragged))
    assert find("tokenflow").name == "tokenflow"


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: TokenFlow) -> None:
    same_tokens_emulated(model)
    same_tokens_emulated(model, sampler=Sampler(top_k=1))
