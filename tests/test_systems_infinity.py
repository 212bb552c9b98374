"""Infinity: bits in a pyramid, two logits per bit, self-correction."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import released
from arimg import models, ops
from arimg.generators.infinity_parts import NAMES, without_chunks
from arimg.generators.loop import Sampler, final_tokens, generate
from arimg.guidance import Guidance
from arimg.nn import checkpoint
from arimg.nn.conditioning import Text
from arimg.nn.rope import rope_scales
from arimg.nn.sign_quantizer import SignQuantizer
from arimg.systems import find
from arimg.systems.infinity import Infinity
from arimg.systems.tokenizer import around
from conftest import Backend
from system_checks import close, same_tokens_emulated

SCALES = ((1, 1), (2, 2), (3, 3), (5, 5), (8, 8))


@pytest.fixture(scope="module")
def model() -> Infinity:
    torch.manual_seed(0)
    model = Infinity(around(SignQuantizer(16, SCALES)), 3, depth=2, width=64, heads=2).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def maps_of(model: Infinity, tokens: list[Tensor]) -> Tensor:
    quantizer = model.quantizer
    f_hat, maps = torch.zeros(len(tokens[0]), quantizer.channels, *quantizer.scales[-1]), []
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


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_flipped_bits_grow_with_each_scale_unless_the_later_ones_see_them(seed: int) -> None:
    """A fifth of all bits is flipped; the mean square distance to the features behind each scale."""
    quantizer, generator = SignQuantizer(16, SCALES), torch.Generator().manual_seed(seed)
    f = torch.randn(8, 16, 8, 8, generator=generator) * 0.3
    clean = quantizer.bits(f)[0]
    flips = [torch.rand(b.shape, generator=generator) < 0.2 for b in clean]

    def errors(bits: list[Tensor]) -> list[float]:
        f_hat, found = torch.zeros_like(f), []
        for k, (kept, flipped) in enumerate(zip(bits, flips)):
            codes = quantizer.code_map(kept ^ flipped, k).contiguous()
            ops.accumulate_(f_hat, codes, up="bilinear")
            found.append(float((f_hat - f).square().mean()))
        return found

    corrected, stale = errors(quantizer.bits(f, flips)[0]), errors(clean)
    # of three seeds: from 0.14 to 0.09 or 0.10 and from 0.14 to 0.19 or 0.20
    assert corrected[0] == stale[0] and all(a < 0.9 * b for a, b in zip(corrected[1:], stale[1:]))
    assert corrected[-1] < 0.8 * corrected[0] and stale[-1] > 1.2 * stale[0]


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


@pytest.mark.parametrize("seed", range(3))
def test_leaking_the_first_scales_lowers_the_error(model: Infinity, seed: int) -> None:
    """NSARM's way in: bits of the first scales are handed out instead of drawn."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.nn.functional.interpolate(torch.randn(2, 16, 2, 2, generator=generator), (8, 8)) * 0.6
    bits, _, _ = model.quantizer.bits(f)

    def error(leaked: int) -> float:
        turns = list(generate(model, torch.tensor([0, 1]), sampler=Sampler(), seed=seed, given=bits[:leaked]))
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


SIDES_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


def test_names_and_shapes_are_the_released_ones() -> None:
    tokenizer = around(SignQuantizer(32, [(s, s) for s in SIDES_1M]))
    with torch.device("meta"):
        theirs = {k: torch.empty(v) for k, v in released.infinity(32, 2048, 16).items()}
        full = Infinity(tokenizer, 1, depth=32, width=2048, heads=16, text_width=2048, tokens=512)
    state = checkpoint.translated(
        without_chunks(theirs), NAMES, "Infinity", ("cfg_uncond",), (".zero_k_bias",)
    )
    ours = released.shapes_of(full)
    assert ours.pop("text.table") == (2, 512, 2048)
    ours["lvl_embed.weight"] = (15, 2048)  # of which 13 scales are used
    assert ours == {k: tuple(v.shape) for k, v in state.items()} and full.layout.length == 10521
    assert ours["head.weight"] == (2 * 32, 2048)  # not 2^32


class Plain:
    """The network by the names of its released weights, for one text of states [T, C]."""

    def __init__(self, w: dict[str, Tensor], states: Tensor, scales: tuple[tuple[int, int], ...]) -> None:
        self.w, rope = w, rope_scales(scales, w["pos_start"].shape[-1] // 2)
        self.turn, self.sizes = torch.complex(rope.cos, rope.sin), [h * w for h, w in scales]
        rms = states.square().mean(-1, keepdim=True)
        self.states = states * (rms + 1e-6).rsqrt() * w["text_norm.weight"]

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """Of queries and keys [H, n, D]."""
        scores = q @ k.mT if seen is None else (q @ k.mT).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def heads(self, *parts: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (2, -1)).transpose(0, 1) for t in parts]

    def cross(self, q: Tensor, states: Tensor, name: str) -> Tensor:
        k, v = (states @ self.w[f"{name}.mat_kv.weight"].T).chunk(2, -1)
        k, v = self.heads(k, v + self.w[f"{name}.v_bias"])
        return self.affine(self.attend(q * q.shape[-1] ** -0.5, k, v), f"{name}.proj")

    def own(self, x: Tensor, name: str, seen: Tensor) -> Tensor:
        q, k, v = (x @ self.w[f"{name}.mat_qkv.weight"].T).chunk(3, -1)
        q, k, v = self.heads(q + self.w[f"{name}.q_bias"], k, v + self.w[f"{name}.v_bias"])
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q = q * self.w[f"{name}.scale_mul_1H11"][0].clamp_max(math.log(100)).exp()
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * self.turn for t in (q, k))
        q, k = (torch.view_as_real(t).flatten(-2) for t in (q, k))
        return self.affine(self.attend(q, k, v, seen), f"{name}.proj")

    def logits(self, maps: Tensor) -> Tensor:
        level = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        pool = self.w["text_proj_for_sos.ca.mat_q"].transpose(0, 1)
        summary = self.cross(pool, self.states, "text_proj_for_sos.ca")
        told = F.gelu(self.affine(self.states, "text_proj_for_ca.0"), approximate="tanh")
        told = self.affine(told, "text_proj_for_ca.2")
        six = self.affine(F.silu(summary), "shared_ada_lin.1").view(6, -1)
        x = torch.cat((summary + self.w["pos_start"][0], self.affine(maps, "word_embed")))
        x = x + self.w["lvl_embed.weight"][level]
        for name in ("block_chunks.0.module.0", "block_chunks.0.module.1", "block_chunks.1.module.0",
                     "block_chunks.1.module.1"):  # fmt: skip
            gate1, gate2, scale1, scale2, shift1, shift2 = self.w[f"{name}.ada_gss"][0, 0] + six
            x = x + gate1 * self.own(norm(x) * (1 + scale1) + shift1, f"{name}.sa", level[:, None] >= level)
            n = norm(x) * self.w[f"{name}.ca_norm.weight"] + self.w[f"{name}.ca_norm.bias"]
            x = x + self.cross(self.heads(self.affine(n, f"{name}.ca.mat_q"))[0], told, f"{name}.ca")
            hidden = self.affine(norm(x) * (1 + scale2) + shift2, f"{name}.ffn.fc1")
            x = x + gate2 * self.affine(F.gelu(hidden, approximate="tanh"), f"{name}.ffn.fc2")
        scale, shift = self.affine(F.silu(summary), "head_nm.ada_lin.1").view(2, -1)
        return self.affine(norm(x) * (1 + scale) + shift, "head").unflatten(-1, (-1, 2))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_a_released_state_dict_gives_the_network_of_its_authors() -> None:
    scales = ((1, 1), (2, 2), (3, 3))
    shapes = released.infinity(4, 32, 2, text=24, pool=2, tokens=6, bits=4, chunks=2)
    state = released.random_state(shapes, 0.4)
    for name in [n for n in state if n.endswith("zero_k_bias")]:
        state[name].zero_()
    tokenizer = around(SignQuantizer(4, scales))
    saved = {k: v.transpose(1, 2) if k.endswith("scale_mul_1H11") else v for k, v in state.items()}
    model = Infinity.from_state_dict(saved, tokenizer=tokenizer)  # scales as flash attention takes them
    assert (len(model.layers), model.heads, model.pool.mat_q.shape[1], model.text.tokens) == (4, 2, 2, 6)
    states, maps = torch.randn(2, 5, 24), torch.randn(2, 13, 4)
    text = Text(states, torch.tensor([5, 3], dtype=torch.int32))
    with torch.no_grad():
        got = model(text, maps)
        for row, length in ((0, 5), (1, 3)):
            expected = Plain(state, states[row, :length], scales).logits(maps[row])
            assert close(got[row], expected, 1e-4)
    # without a text: as many states of "nothing" as the text beside them has
    turns = list(generate(model, text, seed=1))
    nothing = Plain(state, state["cfg_uncond"][:3], scales)
    given = torch.cat([t.drawn for t in turns], 1)
    forced = nothing.logits(maps_of(model, [t.drawn for t in turns])[1])
    assert given.shape == (2, 14, 4) and close(torch.cat([t.logits[3] for t in turns]), forced, 1e-3)
    with pytest.raises(ValueError, match="expected the state dict of a Infinity, got one without 'cfg_unc"):
        Infinity.from_state_dict({k: v for k, v in state.items() if k != "cfg_uncond"}, tokenizer=tokenizer)


def test_what_does_not_fit_is_refused(model: Infinity) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer with a SignQuantizer, got one with a Scale"):
        Infinity(models.load().tokenizer, 2)
    with pytest.raises(ValueError, match=r"expected states \[B, T, 64\]"):
        next(generate(model, Text(torch.zeros(1, 2, 3), torch.tensor([2]))))
    with pytest.raises(ValueError, match=r"expected lengths of 1\.\.2"):
        next(generate(model, Text(torch.zeros(1, 2, 64), torch.tensor([3]))))
    with pytest.raises(ValueError, match=r"expected maps \[B, 102, 16\]"):
        model(torch.tensor([0]), torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="expected 1 to 62 channels, got 63"):
        SignQuantizer(63, SCALES)
    assert find("infinity").name == "infinity" and Guidance(3.0).scale(0, 5) == 3.0


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: Infinity) -> None:
    same_tokens_emulated(model)
    first = torch.rand(3, 5, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    given = [first[:, :1], first[:, 1:]]  # from the host
    same_tokens_emulated(model, sampler=Sampler(temperature=0.2), given=given)
