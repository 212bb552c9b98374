"""arimg.accelerate on diffusers' aMUSEd: scheduler, transformer, pipeline (where diffusers is installed)."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch

import arimg
from arimg.accelerate import amused, uvit

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

MASK = 9


@pytest.fixture
def runs(monkeypatch):
    """How often a step ran on our code."""
    count, original = [0], amused._step

    def counted(*arguments):
        count[0] += 1
        return original(*arguments)

    monkeypatch.setattr(amused, "_step", counted)
    return count


def scheduler(steps=6, temperature=(2, 0), **options):
    made = diffusers.AmusedScheduler(mask_token_id=MASK, **options)
    made.set_timesteps(steps, temperature)
    return made


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masked_tokens(batch, length, masked, seed=0):
    """Tokens of which this many are masked, in random places."""
    order = torch.rand(batch, length, generator=seeded(seed)).argsort(1)
    return torch.where(order < masked, MASK, order % 5)


@pytest.mark.parametrize("masking_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 3, 12, 25])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_as_many_are_masked_as_in_the_original(masking_schedule, steps, ratio, runs):
    ours = scheduler(steps, masking_schedule=masking_schedule)
    original = copy.deepcopy(ours)
    arimg.accelerate(ours)
    runs[0] = 0
    for length in (2, 7, 256):
        for timestep in original.timesteps:
            for masked in {length, length // 2, 1, 0}:
                tokens = masked_tokens(3, length, masked)
                logits = torch.randn(3, length, 5, generator=seeded(1))
                counts = [
                    (s.step(logits, timestep, tokens, ratio, seeded(2)).prev_sample == MASK).sum(1).tolist()
                    for s in (ours, original)
                ]
                assert counts[0] == counts[1], (length, int(timestep), masked)
    assert runs[0] == steps * 11  # length 2: 2, 1 and 0 masked


def test_given_tokens_stay_and_masked_ones_are_drawn():
    ours = scheduler()
    arimg.accelerate(ours)
    tokens = masked_tokens(4, 64, 40)
    logits = torch.randn(4, 64, 5, generator=seeded(3))
    for timestep in ours.timesteps:
        out = ours.step(logits, timestep, tokens, generator=seeded(4))
        known = tokens != MASK
        for result in (out.prev_sample, out.pred_original_sample):
            assert torch.equal(result[known], tokens[known])
        assert (out.pred_original_sample < 5).all()
        kept = out.prev_sample != MASK
        assert torch.equal(out.prev_sample[kept], out.pred_original_sample[kept])
    assert kept.all()  # the last step masks nothing


def law(step, tokens, logits, timestep, draws):
    """How often each result (tokens, masked or not) came, over many rows of one call."""
    rows = tokens.expand(draws, -1), logits.expand(draws, -1, -1)
    out = step(rows[1], timestep, rows[0], generator=seeded(5))
    return Counter(map(tuple, out.prev_sample.tolist()))


@pytest.mark.parametrize("temperature", [(2, 0), 1, 8, (0, 0)])
def test_results_have_the_law_of_the_originals(temperature):
    """Chi-square of two samples: what was drawn and what is masked again, together."""
    ours = scheduler(4, temperature)
    original = copy.deepcopy(ours)
    arimg.accelerate(ours)
    tokens = torch.tensor([[MASK, 2, MASK, MASK]])
    logits = torch.randn(1, 4, 3, generator=seeded(6))
    draws = 40_000
    for timestep in (3, 2, 0):
        a, b = (law(s.step, tokens, logits, timestep, draws) for s in (ours, original))
        outcomes = [o for o in a | b if a[o] + b[o] >= 10]
        square = sum((a[o] - b[o]) ** 2 / (a[o] + b[o]) for o in outcomes)
        freedom = len(outcomes) - 1
        assert len(outcomes) > 4 and square < freedom + 5 * (2 * freedom) ** 0.5, (timestep, square, freedom)


def test_equal_confidences_mask_as_few_as_the_original():
    """Certain tokens at temperature 0: none is less confident than another."""
    ours = scheduler(4, 0)
    original = copy.deepcopy(ours)
    arimg.accelerate(ours)
    logits = torch.zeros(1, 6, 5).scatter_(2, torch.tensor([[[0], [1], [2], [3], [4], [0]]]), 200.0)
    tokens = torch.full((1, 6), MASK)
    got, want = (s.step(logits, 3, tokens, return_dict=False) for s in (ours, original))
    assert all(torch.equal(a, b) for a, b in zip(got, want)) and (got[0] != MASK).all()


def test_a_seed_repeats_its_results(runs):
    ours = scheduler()
    arimg.accelerate(ours)
    tokens = torch.full((2, 8, 8), MASK)
    logits = torch.randn(2, 5, 8, 8, generator=seeded(7))
    runs[0] = 0

    def results(seed, generator):
        torch.manual_seed(seed)
        given = seeded(seed) if generator else None
        parts = [ours.step(logits, t, tokens, generator=given, return_dict=False) for t in (5, 4, 0)]
        return torch.stack([p for pair in parts for p in pair])

    for generator in (True, False):
        first = results(1, generator)
        assert first.shape == (6, 2, 8, 8)
        assert torch.equal(first, results(1, generator)) and not torch.equal(first, results(2, generator))
    assert not torch.equal(first[1], first[3])  # a later step draws other numbers
    assert not torch.equal(first[5, 0], first[5, 1])  # and so does another picture
    assert runs[0] == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_those_values_in_float32(dtype):
    ours = scheduler()
    arimg.accelerate(ours)
    tokens = masked_tokens(2, 32, 20)
    logits = torch.randn(2, 32, 5, generator=seeded(8)).to(dtype)
    got, want = (
        ours.step(x, 3, tokens, generator=seeded(9), return_dict=False) for x in (logits, logits.float())
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_the_report_the_way_back_and_copies(runs):
    ours = scheduler()
    kind, state, saved = type(ours), dict(vars(ours)), ours.to_json_string()
    tokens, logits = torch.full((1, 16), MASK), torch.randn(1, 16, 5)
    want = ours.step(logits, 4, tokens, generator=seeded(0), return_dict=False)
    report = arimg.accelerate(ours)
    assert [(e.path, e.part, e.note) for e in report.replaced] == [
        ("", "AmusedScheduler", "draw and confidence in one pass")
    ]
    assert isinstance(ours, kind) and dict(vars(ours)) == state and ours.to_json_string() == saved
    for twin in (
        ours,
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        type(ours).from_config(ours.config),
    ):
        twin.set_timesteps(6)
        runs[0] = 0
        out = twin.step(logits, 4, tokens)
        assert runs[0] == 1 and type(out).__name__ == "AmusedSchedulerOutput"
        assert out.prev_sample is out["prev_sample"] and (out.pred_original_sample < 5).all()
    with pytest.raises(ValueError, match="not accelerated yet"):
        arimg.accelerate(ours)
    report.restore()
    runs[0] = 0
    got = ours.step(logits, 4, tokens, generator=seeded(0), return_dict=False)
    assert type(ours) is kind and runs[0] == 0 and all(torch.equal(a, b) for a, b in zip(got, want))


def test_what_does_not_fit_runs_the_original(runs):
    ours = scheduler()
    original = copy.deepcopy(ours)
    arimg.accelerate(ours)
    runs[0] = 0
    tokens, logits = torch.full((1, 16), MASK), torch.randn(1, 16, 5)
    for given in (
        (logits.double(), 4, tokens),
        (logits, 4, tokens, torch.tensor(0.5)),
    ):
        got, want = (s.step(*given, generator=seeded(1), return_dict=False) for s in (ours, original))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    for s in (ours, original):
        with pytest.raises(RuntimeError):
            s.step(logits[:, :3], 4, tokens)
        s.set_timesteps(6)
        s.timesteps = None
        assert (s.step(logits, 0, tokens, return_dict=False)[0] < 5).all()
    assert runs[0] == 0


def test_a_scheduler_that_does_something_else_is_kept():
    class Greedy(diffusers.AmusedScheduler):
        def step(self, model_output, timestep, sample, generator=None):
            out = super().step(model_output, timestep, sample, generator=generator)
            out.prev_sample = out.pred_original_sample
            return out

    report = arimg.accelerate(Greedy(MASK))
    assert not report.replaced and report.kept[0].note.startswith("expected a step that draws tokens")
    report = arimg.accelerate(diffusers.DDIMScheduler())
    assert not report.replaced and "aMUSEd's scheduler" in report.kept[0].note


# --- the transformer -------------------------------------------------------------------------------
def transformer():
    torch.manual_seed(0)
    model = diffusers.UVit2DModel(
        hidden_size=48, cond_embed_dim=32, micro_cond_encode_dim=16, micro_cond_embed_dim=80,
        encoder_hidden_size=32, vocab_size=33, codebook_size=32, in_channels=32, block_out_channels=32,
        num_res_blocks=1, downsample=True, upsample=True, block_num_heads=2, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, sample_size=16,
    )  # fmt: skip
    for name, p in model.named_parameters():
        if "norm" in name:  # weights of 1 and 0 would hide which is which
            p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.eval().requires_grad_(False)


def inputs(dtype=torch.float32, text=0):
    tokens = torch.randint(33, (2, 6, 6), generator=seeded(1))
    states, summary = (torch.randn(2, *s, generator=seeded(2 + text)).to(dtype) for s in ((5, 32), (32,)))
    return tokens, states, summary, torch.full((2, 5), 6.0)


@pytest.fixture
def calls(monkeypatch):
    """How often each part ran on our code, by its name."""
    count = Counter()

    def counted(name, original):
        def call(*arguments):
            count[name] += 1
            return original(*arguments)

        return call

    for name in ("_ada_norm", "_response_norm", "_attention"):
        monkeypatch.setattr(uvit, name, counted(name, getattr(uvit, name)))
    return count


EACH = {"_ada_norm": 6, "_response_norm": 2, "_attention": 8}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_as_near_to_float64_as_the_originals(dtype, calls):
    model = transformer().to(dtype)
    exact = copy.deepcopy(model).double()(*inputs(torch.float64))
    peer = (model(*inputs(dtype)) - exact).abs().max()
    with arimg.accelerate(model) as report:
        assert Counter(e.part for e in report.replaced) == {
            "AdaLayerNormContinuous": 6, "GlobalResponseNorm": 2, "Attention": 8, "Linear": 14 + 8,
        } and not report.kept  # fmt: skip
        for _ in range(2):  # the second time with kept keys and modulations
            calls.clear()
            assert (model(*inputs(dtype)) - exact).abs().max() <= 2 * peer
            assert calls == EACH


def test_what_sees_the_text_alone_is_computed_once(monkeypatch):
    model = transformer()
    arimg.accelerate(model)
    products, linear = [0], torch.nn.functional.linear

    def counted(*arguments):
        products[0] += 1
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)

    def run(*arguments):
        products[0] = 0
        with torch.inference_mode():
            out, count = model(*arguments), products[0]
            assert torch.equal(out, copy.deepcopy(model)(*arguments))  # which has kept nothing
        return count

    given = inputs()
    seen = []
    for change in (
        lambda: None,
        lambda: given[0].fill_(3),  # tokens
        lambda: given[1].mul_(1.01),  # the text, in place
        lambda: model.transformer_layers[1].attn2.to_v.weight.data.mul_(1.5),
        lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True),
        lambda: None,
    ):
        change()
        seen.append(run(*given))
    every, again = seen[:2]
    text = 2 * 2 + 2 * (4 + 1)  # keys and values of two layers; four and their mapper of two blocks
    assert every - again == text
    assert seen[2:] == [again + text, again + 1, every, again]
    with torch.inference_mode():
        model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)
    assert [run(*given), run(*given)] == [every, again]
    mapper, x = model.up_block.attention_blocks[0].kv_mapper, torch.ones(1, 3, 48)
    with torch.inference_mode():
        first = mapper(x)
        assert mapper(x) is first and not torch.allclose(mapper(x.mul_(2)), first)


def test_gradients_are_the_originals(calls):
    model = transformer().requires_grad_(True)
    want = model(*inputs())
    wanted = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    with torch.inference_mode(), arimg.accelerate(model) as report:
        model(*inputs())
        report.restore()
    with arimg.accelerate(model):
        with torch.inference_mode():
            model(*inputs())  # keeps results without a gradient
        calls.clear()
        got = model(*inputs())
        found = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    assert not calls and torch.equal(got, want) and all(map(torch.equal, found, wanted))


def test_one_part_may_be_trained():
    """Attention has a gradient, and what was kept without one is not used."""
    model = transformer()
    weight = model.transformer_layers[1].attn2.to_q.weight.requires_grad_(True)

    def gradient():
        return torch.autograd.grad(model(*inputs()).square().sum(), weight)[0]

    want = gradient()
    with arimg.accelerate(model):
        with torch.inference_mode():
            model(*inputs())
        assert torch.allclose(gradient(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
def test_masks_hooks_processors_and_autocast_run_the_original(calls):
    model = transformer()
    want = model(*inputs())
    layer, hooked = model.transformer_layers[0], []
    with arimg.accelerate(model):
        layer.attn1.set_processor(processors.AttnProcessor())
        layer.norm1.norm.register_forward_hook(lambda *a: hooked.append(0))
        calls.clear()
        assert torch.allclose(model(*inputs()), want, atol=1e-4)
        assert calls == EACH | {"_ada_norm": 5, "_attention": 7} and len(hooked) == 1
        calls.clear()
        layer.attn2(torch.randn(2, 9, 48), torch.randn(2, 9, 48), torch.zeros(2, 9))
        layer.attn2(torch.randn(2, 48, 3, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(*inputs())
        assert not calls


def test_parts_that_compute_something_else_are_kept():
    model = transformer()
    model.transformer_layers[0].attn1.set_processor(processors.AttnProcessor())
    model.transformer_layers[1].attn2.residual_connection = True
    model.up_block.res_blocks[0].channelwise_norm.forward = lambda x: x
    kept = {e.path: e.note for e in arimg.accelerate(model).kept}
    assert kept["transformer_layers.0.attn1"] == "expected what computes the same as Attention, on the CPU"
    assert set(kept) == {"transformer_layers.0.attn1", "transformer_layers.1.attn2"}


@torch.inference_mode()
def test_the_transformers_way_back_and_copies(calls):
    model = transformer()
    want, names, kinds = model(*inputs()), list(model.state_dict()), [type(m) for m in model.modules()]
    report = arimg.accelerate(model)
    assert list(model.state_dict()) == names
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.allclose(twin(*inputs()), want, atol=1e-4) and calls == EACH
    linear = model.transformer_layers[0].attn2.to_k
    assert linear in uvit._kept
    report.restore()
    assert linear not in uvit._kept and [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(*inputs()), want)


# --- the pipeline ----------------------------------------------------------------------------------
def pipeline():
    torch.manual_seed(0)
    vqvae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=4, latent_channels=8, num_vq_embeddings=32,
        lookup_from_codebook=True,
    )  # fmt: skip
    made = diffusers.AmusedPipeline(
        vqvae=vqvae.eval(), tokenizer=None, text_encoder=None, transformer=transformer(),
        scheduler=diffusers.AmusedScheduler(32),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def pictures(pipe, seed=0):
    texts = {"encoder_hidden_states": torch.randn(2, 5, 32, generator=seeded(1)),
             "negative_encoder_hidden_states": torch.zeros(2, 5, 32),
             "prompt_embeds": torch.randn(2, 32, generator=seeded(2)),
             "negative_prompt_embeds": torch.zeros(2, 32)}  # fmt: skip
    return pipe(
        height=16, width=16, num_inference_steps=4, generator=seeded(seed), output_type="pt", **texts
    ).images


def test_a_pipeline_is_accelerated_as_a_whole(runs):
    pipe = pipeline()
    want = pictures(pipe)
    with arimg.accelerate(pipe) as report:
        assert report.model == "AmusedPipeline"
        assert {"scheduler", "vqvae.quantize", "transformer.transformer_layers.0.attn1"} <= {
            e.path for e in report.replaced
        }
        runs[0] = 0
        got = pictures(pipe)
        assert runs[0] == 4 and got.shape == want.shape == (2, 3, 16, 16)
        assert torch.equal(got, pictures(pipe)) and not torch.equal(got, pictures(pipe, 1))
    runs[0] = 0
    assert torch.equal(pictures(pipe), want) and runs[0] == 0
    assert type(pipe.scheduler) is diffusers.AmusedScheduler
