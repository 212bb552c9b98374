"""Infinity: bits in a pyramid, two logits per bit, self-correction."""

import pytest
import torch
from torch import Tensor

from arimg import models, ops
from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.guidance import Guidance
from arimg.nn.conditioning import Text
from arimg.nn.sign_quantizer import SignQuantizer
from arimg.systems import find
from arimg.systems.infinity import Infinity
from arimg.systems.tokenizer import around
from conftest import Backend

SCALES = ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))


@pytest.fixture(scope="module")
def model() -> Infinity:
    torch.manual_seed(0)
    model = Infinity(around(SignQuantizer(16, SCALES)), 3, depth=2, width=64, heads=2).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def maps_of(model: Infinity, tokens: list[Tensor]) -> Tensor:
    f_hat, maps = torch.zeros(len(tokens[0]), 16, 8, 8), []
    for k, bits in enumerate(tokens[:-1]):
        ops.accumulate_(f_hat, model.quantizer.code_map(bits, k).contiguous(), up="bilinear")
        maps.append(model.quantizer.next_map(f_hat, k + 1))
    return torch.cat(maps, 1)


def test_bits_round_trip_and_agree_with_the_one_call_encode() -> None:
    quantizer = SignQuantizer(16, SCALES)
    f = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    bits, maps, f_hat = quantizer.bits(f)
    indices = quantizer.encode(f)
    assert all(torch.equal(ops.pack_bits(b, msb_first=False), i) for b, i in zip(bits, indices))
    torch.testing.assert_close(quantizer.features(indices), f_hat, atol=1e-5, rtol=0)
    assert [m.shape[1] for m in maps] == [4, 9, 25, 64]
    # a finer pyramid is nearer to the features, and flips of a scale are corrected by later ones
    flips = [torch.zeros_like(b) for b in bits]
    flips[2] = torch.rand(bits[2].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    corrected = (quantizer.bits(f, flips)[2] - f).square().mean()
    kept = [b ^ x for b, x in zip(bits, flips)]
    uncorrected = quantizer.features([ops.pack_bits(b, msb_first=False) for b in kept])
    assert corrected < 0.7 * (uncorrected - f).square().mean()


def test_the_loop_gives_the_logits_of_teacher_forcing_with_and_without_a_cache(model: Infinity) -> None:
    turns = list(generate(model, torch.tensor([0, 2]), seed=3))
    tokens = [t.drawn for t in turns]
    assert tokens[-1].shape == (2, 64, 16) and tokens[-1].dtype == torch.bool
    logits = torch.cat([t.logits[:2] for t in turns], 1)
    forced = model(torch.tensor([0, 2]), maps_of(model, tokens))
    torch.testing.assert_close(logits, forced, atol=2e-4, rtol=1e-4)
    again = list(generate(model, torch.tensor([0, 2]), seed=3, cached=False))
    assert all(torch.equal(a.drawn, b.drawn) for a, b in zip(turns, again))


def test_a_row_does_not_depend_on_the_others(model: Infinity) -> None:
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    text = Text(states, torch.tensor([5, 3]))
    both = final_tokens(generate(model, text, seed=torch.tensor([4, 9])))
    longer = states.clone()
    longer[1, 3:] = 7.0  # behind the end of the text
    alone = final_tokens(generate(model, Text(longer[1:], torch.tensor([3])), seed=torch.tensor([9])))
    assert all(torch.equal(b[1:], a) for b, a in zip(both, alone))
    other = final_tokens(generate(model, Text(states[1:] * -1, torch.tensor([3])), seed=torch.tensor([9])))
    assert not all(torch.equal(a, b) for a, b in zip(alone, other))


def test_the_same_seed_draws_the_same_bits_on_every_backend(backend: Backend) -> None:
    logits = torch.randn(4, 9, 16, 2, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([5, 6])
    drawn = ops.sample_bits(
        logits.to(backend.device), seed=seeds.to(backend.device), guidance=3.0, temperature=0.5, top_p=0.97
    )
    mixed = 3.0 * logits[:2] - 2.0 * logits[2:]
    likely = mixed.diff(dim=-1)[..., 0].abs() > 4  # p >= 0.97 after the temperature: nothing to draw
    assert likely.any()
    assert torch.equal(drawn.cpu()[likely], (mixed.argmax(-1) == 1)[likely])
    from arimg import reference

    same = reference.sample_bits(logits, seed=seeds, guidance=3.0, temperature=0.5, top_p=0.97)
    assert torch.equal(drawn.cpu(), same)


def test_leaking_the_first_scales_lowers_the_error(model: Infinity) -> None:
    """NSARM's way in: bits of the first scales are handed out instead of drawn."""
    generator = torch.Generator().manual_seed(0)
    f = torch.nn.functional.interpolate(torch.randn(2, 16, 2, 2, generator=generator), (8, 8)) * 0.6
    bits, _, _ = model.quantizer.bits(f)

    def error(leaked: int) -> float:
        turns = list(generate(model, torch.tensor([0, 1]), sampler=Sampler(), seed=0, given=bits[:leaked]))
        f_hat = turns[-1].run.session.f_hat  # type: ignore[attr-defined]
        return float((f_hat - f).square().mean())

    assert error(5) < 0.5 * error(4) and error(4) < 0.9 * error(0)


def test_it_trains_with_flipped_bits() -> None:
    torch.manual_seed(1)
    model = Infinity(around(SignQuantizer(16, SCALES)), 2, depth=1, width=32, heads=2).train()
    f = torch.randn(2, 16, 8, 8) * 0.3
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = model.loss(f, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.8 and sum(losses[-5:]) / 5 < 0.8 * losses[0]
    assert all(p.grad is not None for p in model.parameters())  # the tokenizer's are not among them


def test_full_size_shapes_and_the_head_of_two_logits_per_bit() -> None:
    tokenizer = around(SignQuantizer(16, SCALES))
    with torch.device("meta"):
        model = Infinity(tokenizer, 1, depth=32, width=2048, heads=16, text_width=2048)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["head.weight"] == (2 * 16, 2048)  # not 2^16
    assert shapes["text.project.weight"] == (2048, 2048)
    assert shapes["blocks.31.cross.to_kv.weight"] == (4096, 2048)
    assert shapes["blocks.31.attn.scale_mul_1H11"] == (1, 16, 1, 1)
    assert shapes["word_embed.weight"] == (2048, 16)


def test_what_does_not_fit_is_refused(model: Infinity) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer with a SignQuantizer, got one with a Scale"):
        Infinity(models.load().tokenizer, 2)
    with pytest.raises(ValueError, match=r"expected states \[B, T, 64\]"):
        next(generate(model, Text(torch.zeros(1, 2, 3), torch.tensor([2]))))
    with pytest.raises(ValueError, match=r"expected lengths of 1\.\.2"):
        next(generate(model, Text(torch.zeros(1, 2, 64), torch.tensor([3]))))
    with pytest.raises(ValueError, match=r"expected maps \[B, 102, 16\]"):
        model(torch.tensor([0]), torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="expected 1 to 16 channels, got 40"):
        SignQuantizer(40, SCALES)
    assert find("infinity").name == "infinity" and Guidance(3.0).scale(0, 5) == 3.0
