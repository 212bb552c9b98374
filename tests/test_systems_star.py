"""STAR: normalised rotations, text of one's own, the refiner of late scales."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import released
from arimg import models
from arimg.commit import ByRatio, Plan, arccosine
from arimg.generators.loop import ALWAYS, Sampler, final_tokens, generate
from arimg.generators.star_parts import NAMES
from arimg.nn import checkpoint
from arimg.nn.conditioning import Text
from arimg.nn.rope import rope_normalised
from arimg.systems import find
from arimg.systems.star import Star
from arimg.tokenizers import SCALES_256, SCALES_512, VQVAE
from conftest import Backend
from system_checks import close, same_tokens_emulated


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
    # the refiner sees what is final and nothing of the other tokens
    features, summary = model.teacher_forced(labels, maps), model.text(labels).last
    for turn in (turns[3], turns[6], turns[-1]):
        start, end = model.layout.segments[turn.step]
        final, known = torch.zeros(2, end - start, dtype=torch.bool), torch.randint(1024, (2, end - start))
        if turn.number:
            before = turns[turns.index(turn) - 1]
            assert before.final is not None
            final, known = before.final, torch.where(before.final, before.drawn, known)
        told = model.refine(features[:, start:end], known, final, summary, turn.step)
        torch.testing.assert_close(turn.logits[:2], told, atol=2e-4, rtol=1e-4)


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


@pytest.mark.parametrize("seed", range(3))
def test_the_refiner_makes_tokens_agree_that_are_drawn_independently_without_it(seed: int) -> None:
    """Two tokens that are equal in all data: one pass draws them apart half of the time."""
    torch.manual_seed(seed)
    tokenizer = VQVAE(2, 4, 32, (1, 1), ((1, 1), (1, 2)), blocks=1, shared_phi=1, ratio=0.0)
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0]]))
    size = {"depth": 1, "width": 32, "heads": 2, "refiner_depth": 1, "refined_from": 1}
    model = Star(tokenizer, 1, steps=2, random_steps=1, **size).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
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


SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@pytest.mark.parametrize(("sides", "tokens"), [(SCALES_256, 680), (SCALES_512, 2240), (SIDES_1024, 9451)])
def test_names_and_shapes_are_the_released_ones(sides: tuple[int, ...], tokens: int) -> None:
    with torch.device("meta"):
        full = Star(VQVAE(scales=sides), 1, depth=30, width=1920, heads=30, text_width=1024, refined_from=9)
        theirs = {k: torch.empty(v) for k, v in released.star(30, scales=len(sides)).items()}
    state = checkpoint.translated(theirs, NAMES, "STAR", ("class_emb.",), (".zero_k_bias",))
    ours = released.shapes_of(full)
    del ours["text.table"]  # of our classes
    assert ours == {k: tuple(v.shape) for k, v in state.items()} and full.layout.length == tokens


class Plain:
    """The network by the names of its released weights, for one text of states [T, C]."""

    def __init__(self, w: dict[str, Tensor], states: Tensor, sides: tuple[int, ...]) -> None:
        self.w, self.states, rope = w, states, rope_normalised(sides, w["pos_start"].shape[-1] // 2)
        self.turn = torch.complex(rope.cos, rope.sin)

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def attend(self, name: str, q: Tensor, kv: Tensor, seen: Tensor, turn: Tensor | None = None) -> Tensor:
        """Of two heads, for queries and keys that have no biases yet."""
        w = {k.removeprefix(f"{name}."): v for k, v in self.w.items() if k.startswith(f"{name}.")}
        k, v = kv.chunk(2, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(0, 1) for t in (q + w["q_bias"], k, v + w["v_bias"]))
        if turn is not None:
            q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn for t in (q, k))
            q, k = (torch.view_as_real(t).flatten(-2) for t in (q, k))
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
        scores = (q * w["scale_mul_1H11"][0].clamp_max(math.log(100)).exp()) @ k.mT
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.affine(out.transpose(0, 1).flatten(1), f"{name}.proj")

    def run(self, x: Tensor, blocks: str, seen: Tensor, turn: Tensor, cross: bool) -> Tensor:
        for i in range(checkpoint.count(self.w, f"{blocks}.")):
            name = f"{blocks}.{i}"
            qkv = norm(x) @ self.w[f"{name}.attn.mat_qkv.weight"].T
            x = x + self.attend(f"{name}.attn", *qkv.split((32, 64), -1), seen, turn)
            if cross:
                q = norm(x) @ self.w[f"{name}.cross_attn.mat_q.weight"].T
                kv = self.states @ self.w[f"{name}.cross_attn.mat_kv.weight"].T
                x = x + self.attend(f"{name}.cross_attn", q, kv, torch.ones(len(q), len(kv)) > 0)
            hidden = F.gelu(self.affine(norm(x), f"{name}.ffn.fc1"), approximate="tanh")
            x = x + self.affine(hidden, f"{name}.ffn.fc2")
        return x

    def features(self, maps: Tensor, sizes: list[int]) -> Tensor:
        level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        first = self.affine(self.states[-1:], "encoder_proj") + self.w["pos_start"][0]
        x = torch.cat((first, self.affine(maps, "word_embed"))) + self.w["lvl_embed.weight"][level]
        return self.run(x, "blocks", level[:, None] >= level, self.turn, True)

    def refined(self, h: Tensor, codes: Tensor, scale: int, start: int) -> Tensor:
        """Logits of a scale with features h; codes of fixed tokens, zeros for the others."""
        summary = self.affine(self.states[-1:], "encoder_proj2") + self.w["pos_start_last"][0]
        told = self.affine(codes, "word_embed_head") + self.w["lvl_embed_2.weight"][scale]
        x = self.affine(torch.cat([torch.cat((summary, t)) for t in (told, h)], 1), "head_proj")
        turn = torch.cat((self.turn[:1], self.turn[start : start + len(h)]))
        x = self.run(x, "feat_extract_blocks", torch.ones(len(x), len(x)) > 0, turn, False)
        return self.affine(norm(x)[1:], "head_logits2")


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_a_released_state_dict_gives_the_network_of_its_authors() -> None:
    sides, z = (1, 2, 3), 4
    shapes = released.star(2, c=32, heads=2, text=24, vocab=40, z=z, scales=3)
    state = released.random_state(shapes)
    tokenizer = VQVAE(40, z, 32, (1, 1), sides, blocks=1).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    nothing, states = torch.randn(2, 24), torch.randn(1, 5, 24)
    model = Star.from_state_dict(state, tokenizer=tokenizer, nothing=nothing, refined_from=2)
    assert (model.layers[0].attn.heads, len(model.layers), len(model.refiner.blocks)) == (2, 2, 3)
    maps = torch.randn(1, 13, z)
    text = Text(states, torch.tensor([5], dtype=torch.int32))
    with torch.no_grad():
        plain = Plain(state, states[0], sides)
        h = plain.features(maps[0], [1, 4, 9])
        assert close(model(text, maps)[0], plain.affine(norm(h), "head_logits"), 1e-4)
        final, tokens = torch.rand(1, 9) < 0.5, torch.randint(40, (1, 9))
        codes = torch.where(final[..., None], tokenizer.quantize.embedding.weight[tokens], 0.0)[0]
        got = model.refine(model.teacher_forced(text, maps)[:, 5:], tokens, final, states[:, -1], 2)
        assert close(got[0], plain.refined(h[5:], codes, 2, 5), 1e-4)
    drawn = final_tokens(generate(model, text, seed=1))
    assert [t.shape[1] for t in drawn] == [1, 4, 9]
    for wrong, message in (
        ({"nothing": torch.zeros(2, 3)}, r"expected nothing \[T, 24\], got \[2, 3\]"),
        ({"tokenizer": models.load().tokenizer}, "expected a tokenizer of 3 scales, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            Star.from_state_dict(state, **{"tokenizer": tokenizer, "nothing": nothing, **wrong})  # type: ignore[arg-type]


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: Star) -> None:
    same_tokens_emulated(model)
    same_tokens_emulated(model, sampler=Sampler(top_k=1))
