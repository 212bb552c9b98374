"""STAR: normalised rotations, text of one's own, the refiner of late scales."""

import pytest
import torch
from torch import Tensor

from arimg import models
from arimg.commit import ByRatio, Plan, arccosine
from arimg.generators.loop import ALWAYS, Sampler, final_tokens, generate
from arimg.nn.conditioning import Text
from arimg.nn.rope import rope_normalised
from arimg.systems import find
from arimg.systems.star import Star
from arimg.tokenizers import VQVAE
from conftest import Backend


def small(classes: int = 3, tokenizer: VQVAE | None = None, **options: int) -> Star:
    torch.manual_seed(0)
    size = {"depth": 2, "width": 64, "heads": 2, "refiner_depth": 1, "steps": 4, "random_steps": 1, **options}
    model = Star(tokenizer or models.load().tokenizer, classes, **size).eval()
    for head in (model.head, model.refiner.head):
        torch.nn.init.normal_(head.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> Star:
    return small()


def maps_of(model: Star, tokens: list[Tensor]) -> Tensor:
    return model.tokenizer.quantize.generator_input(tokens)


def test_the_loop_gives_the_logits_of_teacher_forcing_with_and_without_a_cache(model: Star) -> None:
    labels = torch.tensor([0, 2])
    turns = list(generate(model, labels, seed=3))
    assert [t.number for t in turns] == [0, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    tokens = [t.drawn for t in turns if t.done]
    maps = maps_of(model, tokens)
    forced = model(labels, maps)
    drawn = torch.cat([t.logits[:2] for t in turns[:3]], 1)
    torch.testing.assert_close(drawn, forced[:, :14], atol=2e-4, rtol=1e-4)
    plain = list(generate(model, labels, seed=3, commit=ALWAYS, refined=False))
    forced = model(labels, maps_of(model, [t.drawn for t in plain]))
    torch.testing.assert_close(torch.cat([t.logits[:2] for t in plain], 1), forced, atol=2e-4, rtol=1e-4)
    again = final_tokens(generate(model, labels, seed=3, cached=False))
    assert all(torch.equal(a, b) for a, b in zip(tokens, again))
    # the refiner of one scale, with its sink, is that of all scales side by side
    for turn in (turns[3], turns[6], turns[-1]):
        before = turns[turns.index(turn) - 1]
        final = torch.zeros(2, model.layout.length, dtype=torch.bool)
        known = torch.cat(tokens, 1)
        if turn.number:
            assert before.final is not None
            start, end = model.layout.segments[turn.step]
            final[:, start:end], known[:, start:end] = before.final, before.drawn
        told = model.refine_all(model.teacher_forced(labels, maps), known, final)
        start, end = model.layout.segments[turn.step]
        torch.testing.assert_close(turn.logits[:2], told[:, start:end], atol=2e-4, rtol=1e-4)


def test_every_row_sees_its_own_text(model: Star) -> None:
    """The trap of the released code, where all rows get the text of the first."""
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 3])
    both = list(generate(model, Text(states, lengths), seed=torch.tensor([4, 9])))
    alone = list(generate(model, Text(states[1:], lengths[1:]), seed=torch.tensor([9])))
    for b, a in zip(both, alone):
        torch.testing.assert_close(b.logits[[1, 3]], a.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(b.drawn[1:], a.drawn)
    swapped = list(generate(model, Text(states[[1, 1]], lengths[[1, 1]]), seed=torch.tensor([4, 9])))
    assert (swapped[0].logits[0] - both[0].logits[0]).abs().max() > 0.1
    assert torch.equal(swapped[0].logits[1], both[0].logits[1])


def test_corners_have_the_same_relative_phase_in_every_scale() -> None:
    scales = (2, 3, 5, 8, 21)  # the last is none of the model's
    rope = rope_normalised(scales, 32)
    start = 0
    phases = []
    for side in scales:
        first, last = start, start + side * side - 1
        phases.append(
            rope.cos[first] * rope.cos[last] + rope.sin[first] * rope.sin[last]
        )  # cos of the difference
        start += side * side
    for phase in phases[1:]:
        torch.testing.assert_close(phase, phases[0], atol=1e-5, rtol=0)


def test_the_refiner_makes_tokens_agree_that_are_drawn_independently_without_it() -> None:
    """Two tokens that are equal in all data: one pass draws them apart half of the time."""
    torch.manual_seed(0)
    tokenizer = VQVAE(2, 4, 32, (1, 1), ((1, 1), (1, 2)), blocks=1, shared_phi=1, ratio=0.0)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0]]))
    size = {"depth": 1, "width": 32, "heads": 2, "refiner_depth": 1, "refined_from": 1}
    model = Star(tokenizer, 1, steps=2, random_steps=1, **size).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(250):
        pair = torch.randint(0, 2, (64, 1)).expand(-1, 2)
        examples = torch.cat((torch.zeros(64, 1, dtype=torch.int64), pair), 1)
        loss = model.loss(examples, torch.zeros(64, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def violated(**options: object) -> float:
        drawn = generate(model, torch.zeros(300, dtype=torch.int64), sampler=Sampler(), **options)  # type: ignore[arg-type]
        pairs = final_tokens(drawn)[1]
        assert 60 < int(pairs[:, 0].sum()) < 240  # both values occur
        return float((pairs[:, 0] != pairs[:, 1]).float().mean())

    assert violated() < 0.05
    assert 0.35 < violated(commit=ALWAYS, refined=False) < 0.65


def test_the_same_seed_fixes_the_same_tokens_on_every_backend(backend: Backend, model: Star) -> None:
    generator = torch.Generator().manual_seed(0)
    from arimg import ops, reference

    logits, seeds = torch.randn(2, 25, 64, generator=generator) * 2, torch.tensor([5, 6])
    plan, device = Plan(ByRatio(4, arccosine), random_steps=1), backend.device
    final = torch.zeros(2, 25, dtype=torch.bool)
    for step in range(4):
        settings = {"position": 14 + 25 * step, "top_k": 30, "top_p": 0.8, "return_logprob": True}
        drawn = ops.sample(logits.to(device), seed=seeds.to(device), **settings)
        expected = reference.sample(logits, seed=seeds, **settings)
        assert torch.equal(drawn.token.cpu(), expected.token)
        new = plan.commit(step, drawn.logprob, final.to(device), seeds.to(device), 14)
        assert int(new.sum()) == 2 * plan.committed(25)[step] and not (new.cpu() & final).any()
        final = final | new.cpu()
    assert final.all()


def test_it_trains_and_the_refiner_leaves_the_backbone_alone() -> None:
    model = small(2).train()
    model.class_dropout = 0.0
    tokens = torch.randint(0, 1024, (2, 103), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model.loss(tokens, torch.tensor([0, 1])).backward()
    with_refiner = model.blocks[0].get_parameter("ffn.fc1.weight").grad
    assert with_refiner is not None and all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    logits = model(torch.tensor([0, 1]), maps_of(model, list(tokens.split(model.layout.sizes, 1))))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    alone = model.blocks[0].get_parameter("ffn.fc1.weight").grad
    torch.testing.assert_close(with_refiner, alone)


def test_what_does_not_fit_is_refused(model: Star) -> None:
    with pytest.raises(ValueError, match=r"expected refined_from of 1\.\.5, got 7"):
        small(refined_from=7)
    with pytest.raises(ValueError, match="expected a width that 3 heads divide"):
        small(heads=3)
    with pytest.raises(ValueError, match="expected a condition of 2 rows, got 1"):
        model(torch.tensor([0]), torch.zeros(2, 102, 16))
    assert find("star").name == "star"
    tokenizer = models.load().tokenizer
    with torch.device("meta"):
        full = Star(tokenizer, 1, depth=30, width=1920, heads=30, text_width=768)
    shapes = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert shapes["text.project.weight"] == (1920, 768) and shapes["lvl_embed.weight"] == (5, 1920)
    assert shapes["refiner.join.weight"] == (1920, 3840) and "blocks.0.ada_lin.1.weight" not in shapes
    assert "refiner.blocks.2.attn.mat_qkv.weight" in shapes and "pos_embed" not in shapes
