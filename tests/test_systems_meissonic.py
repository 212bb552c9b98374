"""Meissonic: exact counts of hidden tokens, tokens that stay, one range of times in training and sampling."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import released
import system_checks as checks
from arimg.commit import ByRatio, LinearNoise, Plan
from arimg.generators.loop import EachStep, Sampler, final_tokens, generate
from arimg.generators.meissonic_parts import COMPRESS, NAMES, as_matrices, waves
from arimg.nn import checkpoint
from arimg.nn.conditioning import Text
from arimg.systems.meissonic import TIME, MeissonicModel
from arimg.systems.tokenizer import SIZE, _single_scale, scale_tokenizer

LABELS = torch.tensor([1, 0, 1])


def make(seed=0, **options):
    torch.manual_seed(seed)
    tokenizer = _single_scale(scale_tokenizer(), 64)
    model = MeissonicModel(tokenizer, 2, 8, joint=1, single=1, width=64, heads=2, **options)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make()


def times_of(model, **options):
    """What the network is told in each pass."""
    told, predict = [], model.predict

    def watched(said, tokens, time):
        told.append((time, (tokens == model.mask).sum(1)))
        return predict(said, tokens, time)

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


def test_what_no_pass_changes_is_computed_once(model, monkeypatch):
    calls, rope = [], model.rope
    monkeypatch.setattr(model, "rope", lambda: calls.append("rope") or rope())
    names = ("conditioner.project", "numbers", "summary", "time")
    for name in names:
        part = model.get_submodule(name)
        monkeypatch.setattr(part, "forward", lambda x, n=name, f=part.forward: calls.append(n) or f(x))
    micro = torch.tensor([[64.0, 64, 0, 0, 6]]).expand(3, -1)
    (tokens,) = final_tokens(generate(model, LABELS, seed=3, micro=micro))
    assert sorted(calls) == sorted(["rope", "conditioner.project", "numbers", "summary"] + 8 * ["time"])
    assert torch.equal(final_tokens(generate(model, LABELS, seed=3))[0], tokens)  # its default
    other = final_tokens(generate(model, LABELS, seed=3, micro=micro * 3))[0]
    assert not torch.equal(other, tokens)


def test_halved_maps_have_a_quarter_of_the_inputs():
    model = make(compress=True)
    seen, mix = [], model.mix
    model.mix = lambda words, h, *more: seen.append((words.shape[1], h.shape[1])) or mix(words, h, *more)
    (tokens,) = final_tokens(generate(model, LABELS))
    assert set(seen) == {(4, 16)} and tokens.shape == (3, 64)


def test_names_and_shapes_are_the_released_ones():
    """1024 px: 64 x 64 tokens, 14 joint and 28 single blocks of 8 heads of 128, 77 tokens of text."""
    tokenizer = checks.tokenizer(64, 8192)
    size = {"joint": 14, "single": 28, "width": 1024, "heads": 8, "text_width": 1024}
    with torch.device("meta"):
        theirs = {k: torch.empty(v) for k, v in released.meissonic(14, 28, 1024, 128).items()}
        full = MeissonicModel(tokenizer, 1, 64, 77, compress=True, **size)
    ours = released.shapes_of(full)
    state = checkpoint.translated(as_matrices(theirs), {**NAMES, **COMPRESS}, "Meissonic")
    assert ours.pop("conditioner.table") == (2, 78, 1024)
    assert ours.pop("tok_embeddings.weight") == (8193, 1024)  # of 8256, most of which stand for nothing
    assert state.pop("tok_embeddings.weight").shape == (8256, 1024)
    assert ours == {k: tuple(v.shape) for k, v in state.items()} and full.layout.length == 4096
    assert full.rope().cos.shape == (77 + 32 * 32, 64)
    cos = MeissonicModel(checks.tokenizer(4), 1, width=128, heads=1).rope().cos
    row, column = (t.view(4, 4, 28) for t in (cos[4:, 8:36], cos[4:, 36:]))  # of 16, 56 and 56 channels
    assert (row == row[:, :1]).all() and (column == column[:1]).all() and (row != row[:1]).any()
    assert (cos[:4] == 1).all() and (cos[:, :8] == 1).all()


class Plain:
    """The network by the names of its released weights, of two heads, for one picture."""

    def __init__(self, w, rope):
        self.w, self.turn = w, torch.complex(rope.cos, rope.sin)

    def affine(self, x, name):
        weight = self.w[f"{name}.weight"].flatten(1)
        return x @ weight.T + self.w.get(f"{name}.bias", torch.zeros(()))

    def rms(self, x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.w[f"{name}.weight"]

    def vector(self, x, name):
        return self.affine(F.silu(self.affine(x, f"{name}.linear_1")), f"{name}.linear_2")

    def heads(self, x, name, to, norms):
        q, k, v = (self.affine(x, f"{name}.attn.{t}").unflatten(-1, (2, -1)).transpose(0, 1) for t in to)
        return [self.rms(q, f"{name}.attn.{norms}_q"), self.rms(k, f"{name}.attn.{norms}_k"), v]

    def attend(self, q, k, v):
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * self.turn for t in (q, k))
        q, k = (torch.view_as_real(t).flatten(-2) for t in (q, k))
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return out.transpose(0, 1).flatten(1)

    def joint(self, words, h, vector, name):
        parts, m = [], []
        for x, suffix, to, norms in (
            (words, "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added"),
            (h, "", ("to_q", "to_k", "to_v"), "norm"),
        ):
            m.append(self.affine(F.silu(vector), f"{name}.norm1{suffix}.linear").chunk(6))
            parts.append(self.heads(norm(x) * (1 + m[-1][1]) + m[-1][0], name, to, norms))
        seen = self.attend(*(torch.cat(both, 1) for both in zip(*parts))).split((len(words), len(h)))
        out = []
        for x, y, (_, _, gate, shift, scale, gate2), suffix, proj in zip(
            (words, h), seen, m, ("_context", ""), ("to_add_out", "to_out.0")
        ):
            x = x + gate * self.affine(y, f"{name}.attn.{proj}")
            hidden = self.affine(norm(x) * (1 + scale) + shift, f"{name}.ff{suffix}.net.0.proj")
            hidden = F.gelu(hidden, approximate="tanh")
            out.append(x + gate2 * self.affine(hidden, f"{name}.ff{suffix}.net.2"))
        return out

    def single(self, h, vector, name):
        shift, scale, gate = self.affine(F.silu(vector), f"{name}.norm.linear").chunk(3)
        n = norm(h) * (1 + scale) + shift
        seen = self.attend(*self.heads(n, name, ("to_q", "to_k", "to_v"), "norm"))
        hidden = F.gelu(self.affine(n, f"{name}.proj_mlp"), approximate="tanh")
        return h + gate * self.affine(torch.cat((seen, hidden), -1), f"{name}.proj_out")

    def logits(self, states, tokens, time, micro, side):
        w = self.w
        told = self.vector(torch.cat((states[-1], waves(micro[None])[0])), "cond_embed")
        vector = self.vector(waves(time.view(1, 1) * 1000)[0], "time_text_embed.timestep_embedder")
        vector = vector + self.vector(told, "time_text_embed.text_embedder")
        words = self.rms(self.affine(states[:-1], "context_embedder"), "encoder_proj_layer_norm")
        h = self.affine(self.rms(w["embed.embeddings.weight"][tokens], "embed.layer_norm"), "embed.conv")
        h = self.rms(h, "down_block.downsample.norm").T.unflatten(1, (side, side))
        h = F.conv2d(h[None], w["down_block.downsample.conv.weight"], stride=2)[0].flatten(1).T
        h = self.affine(self.rms(h, "project_to_hidden_norm"), "project_to_hidden")
        for i in range(2):
            words, h = self.joint(words, h, vector, f"transformer_blocks.{i}")
        both = torch.cat((words, h))
        for i in range(3):
            both = self.single(both, vector, f"single_transformer_blocks.{i}")
        h = self.affine(self.rms(both[len(words) :], "project_from_hidden_norm"), "project_from_hidden")
        h = self.rms(h, "up_block.upsample.norm").T.unflatten(1, (side // 2, side // 2))
        h = F.conv_transpose2d(h[None], w["up_block.upsample.conv.weight"], stride=2)[0].flatten(1).T
        h = self.rms(self.affine(h, "mlm_layer.conv1"), "mlm_layer.layer_norm")
        return self.affine(h, "mlm_layer.conv2")


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_a_released_state_dict_gives_the_network_of_its_authors():
    shapes = released.meissonic(2, 3, 32, 16, text=24, rows=50, vocab=40)
    state = released.random_state(shapes, 0.25)
    tokenizer, nothing = checks.tokenizer(4), torch.randn(6, 24)
    options = {"tokenizer": tokenizer, "nothing": nothing, "heads": 2}
    model = MeissonicModel.from_state_dict(state, **options)
    assert (len(model.joint), len(model.single), model.compress, model.mask) == (2, 3, True, 40)
    states, time, micro = torch.randn(2, 6, 24), torch.tensor([500.0, 30.0]), torch.rand(2, 5) * 100
    tokens = torch.randint(41, (2, 16))
    text = Text(states, torch.tensor([6, 6], dtype=torch.int32))
    with torch.no_grad():
        got = model.predict(model.told(text, micro), tokens, time)
        plain = Plain(state, model.rope())
        rows = torch.where(tokens == 40, 49, tokens)  # the mask is the last row
        for b in range(2):
            expected = plain.logits(states[b], rows[b], time[b], micro[b], 4)
            assert checks.close(got[b], expected, 1e-3)
    (drawn,) = final_tokens(generate(model, text, seed=1))
    assert drawn.shape == (2, 16) and drawn.max() < 40
    with pytest.raises(ValueError, match=r"expected texts of 6, got \[5, 6, 6, 6\]"):
        model.begin(Text(states, torch.tensor([5, 6], dtype=torch.int32)), True)
    with pytest.raises(ValueError, match=r"expected nothing \[T \+ 1, 24\], got \[6, 3\]"):
        MeissonicModel.from_state_dict(state, **{**options, "nothing": torch.zeros(6, 3)})


@pytest.mark.parametrize("seed", range(3))
def test_confident_order_beats_random_order_where_tokens_are_correlated(seed):
    """Maps of one token throughout: after some training, how uniform the samples are, in three sets."""
    model = make(seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        examples = torch.randint(8, (16, 1)).expand(16, 64)
        loss = model.loss(examples, torch.zeros(16, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def agreement(rule, first):
        commit = EachStep(lambda s, n: Plan(ByRatio(4), rule, noise=LinearNoise(0.5)))
        labels = torch.zeros(64, dtype=torch.int64)
        (tokens,) = final_tokens(generate(model, labels, commit=commit, seed=first))
        return (tokens == tokens.mode(1).values[:, None]).double().mean().item()

    random, confident = ([agreement(r, first) for first in (0, 100, 200)] for r in ("random", "gumbel"))
    checks.check_apart(random, confident)


@pytest.mark.parametrize("compress", [False, True])
def test_the_whole_model_draws_the_same_on_emulated_cuda(compress):
    checks.same_tokens_emulated(make(compress=compress), [1, 0])
    checks.same_tokens_emulated(
        make(compress=compress), [1, 0], sampler=Sampler(top_k=1), micro=torch.rand(2, 5) * 64
    )
