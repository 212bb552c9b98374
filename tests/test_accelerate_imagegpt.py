"""arimg.accelerate on transformers' ImageGPT and on the quantizers of its VQVAEs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import arimg
from arimg import ops
from arimg.accelerate import few_rows
from arimg.accelerate import imagegpt as accelerated
from arimg.nn.packed_linear import BITS
from pretend_cuda import CUDA, pretend_cuda
from tiny_transformers import chameleon, emu3, imagegpt, janus, spread, transformers

START, LENGTH = torch.full((3, 1), 60), 40


@pytest.fixture
def runs(monkeypatch):
    """How often a block ran on our code."""
    count, place = [0], accelerated._place

    def counted(*arguments):
        found = place(*arguments)
        count[0] += found is not None
        return found

    monkeypatch.setattr(accelerated, "_place", counted)
    return count


def generate(model, ids=START, **options):
    options = {"do_sample": False, "max_length": LENGTH, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(input_ids=ids, **options)


def scored(model, tokens):
    """Logits of the given tokens [B, T] one at a time through a cache."""
    store = transformers.DynamicCache(config=model.config)
    steps = [model(input_ids=t, cache=store, use_cache=True).logits for t in tokens.split(1, 1)]
    return torch.cat(steps, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False, "n_inner": 72},
     {"reorder_and_upcast_attn": True, "activation_function": "gelu_new"}],
)  # fmt: skip
def test_greedy_tokens_are_equal(runs, options):
    model = imagegpt(**options)
    want = generate(model)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    report = arimg.accelerate(model)
    assert torch.equal(generate(model), want) and runs[0] == 3 * (LENGTH - 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        runs[0] = 0
        assert torch.equal(generate(twin), want) and runs[0] > 0
    with torch.inference_mode():
        assert torch.equal(generate(model), want)
    assert list(model.state_dict()) == names and len(want.unique()) > 4
    report.restore()
    assert [type(m) for m in model.modules()] == kinds


def test_greedy_tokens_are_equal_on_emulated_cuda(runs):
    model = imagegpt()
    want = generate(model)
    with pretend_cuda() as mode:
        moved = copy.deepcopy(model).to(CUDA)
        with arimg.accelerate(moved) as report:
            assert torch.equal(generate(moved, START.to(CUDA)).cpu(), want) and runs[0] == 3 * (LENGTH - 2)
    assert set(mode.kernels) == {"norm_modulate", "append_", "cached_attention"} and not mode.on_host
    assert mode.kernels["cached_attention"] > runs[0]  # one more where the first block was compared
    assert [entry.path for entry in report.kept] == ["lm_head"]


def test_rows_padded_on_the_left(runs):
    model = imagegpt()
    ids, mask = torch.tensor([[0, 0, 60, 5], [60, 7, 9, 11]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    want = generate(model, ids, attention_mask=mask)
    with arimg.accelerate(model):
        assert torch.equal(generate(model, ids, attention_mask=mask), want) and runs[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_as_near_to_float64_as_the_original(runs, dtype):
    model = imagegpt().to(dtype)
    tokens = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    exact = scored(copy.deepcopy(model).double(), tokens)
    peer = (scored(model, tokens) - exact).abs()
    with arimg.accelerate(model):
        ours = (scored(model, tokens) - exact).abs()
    assert runs[0] == 3 * 29 and ours.mean() <= 1.2 * peer.mean() and ours.max() <= 2 * peer.max()


def test_copies_of_the_weights(runs):
    """Turned, in the order of outputs."""
    model = imagegpt()
    tokens = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    want = scored(model, tokens)
    peer = (scored(copy.deepcopy(model).bfloat16(), tokens) - want).abs().mean()
    with arimg.accelerate(model, dtype=torch.bfloat16) as report:
        assert 0 < (scored(model, tokens) - want).abs().mean() < peer and runs[0] > 0
        copied = sum(p.numel() for n, p in model.named_parameters() if ".c_" in n and p.dim() == 2)
        assert report.memory == 2 * (copied + model.lm_head.weight.numel())
    assert not few_rows._copies and torch.equal(scored(model, tokens), want)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_codes_of_the_weights(runs, weights):
    """Of the turned weights: steps have the logits of the rounded ones; memory is counted and given back."""
    model, twin, bits = imagegpt(), imagegpt(), BITS[weights]
    copied = [p for n, p in model.named_parameters() if ".c_" in n and p.dim() == 2]
    codes = [ops.quantize_weight(w.t(), bits) for w in copied]
    for w, c in zip((p for n, p in twin.named_parameters() if ".c_" in n and p.dim() == 2), codes):
        w.copy_(ops.dequantize_weight(c).t())
    codes.append(ops.quantize_weight(model.lm_head.weight, bits))
    twin.lm_head.weight = torch.nn.Parameter(ops.dequantize_weight(codes[-1]), requires_grad=False)
    tokens = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    exact = scored(model, tokens)
    store = transformers.DynamicCache(config=model.config)
    model(input_ids=tokens[:, :1], cache=store, use_cache=True)  # reads the weights themselves
    rest = [twin(input_ids=t, cache=store, use_cache=True).logits for t in tokens[:, 1:].split(1, 1)]
    report = arimg.accelerate(model, weights=weights)
    got = scored(model, tokens)
    assert runs[0] == 3 * 29 and (got[:, 1:] - torch.cat(rest, 1)).abs().max() < 1e-3
    assert (got - exact).abs().max() > 0.01
    assert report.memory == sum(c.codes.nbytes + c.scales.nbytes for c in codes)
    report.restore()
    assert not few_rows._copies and torch.equal(scored(model, tokens), exact)


def test_what_is_not_known_runs_the_original(runs):
    model = imagegpt()
    options = {"output_attentions": True, "return_dict_in_generate": True}
    want = generate(model, **options)
    with arimg.accelerate(model):
        got = generate(model, **options)
        assert all(torch.equal(a, b) for a, b in zip(got.attentions[-1], want.attentions[-1]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(model)
        generate(model, cache_implementation="static")  # the original sees keys there that are not written
        assert runs[0] == 0
        model.requires_grad_(True)
        scored(model, START.expand(3, 4)).sum().backward()
        model.train()
        with torch.no_grad():
            scored(model, START.expand(3, 4))
    assert runs[0] == 0 and model.lm_head.weight.grad is not None


def test_relatives_are_kept_with_a_reason():
    def reason(model):
        report = arimg.accelerate(model)
        return next(entry.note for entry in report.kept)

    assert reason(imagegpt(add_cross_attention=True)).startswith(
        "block 0: expected attn, ln_1, ln_2, mlp, got"
    )
    gpt2 = transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    gpt2 = spread(transformers.GPT2LMHeadModel(gpt2))
    assert reason(gpt2) == "block 0: expected norms with a weight alone"


SHAPES = [(janus, (2, 8, 4, 4)), (chameleon, (2, 8, 4, 4)), (emu3, (1, 2, 4, 4, 4))]


@pytest.mark.parametrize(("build", "shape"), SHAPES)
def test_quantizers_find_the_same_codes(build, shape):
    quantizer = build().model.vqmodel.quantize.requires_grad_(True)
    with torch.no_grad():
        quantizer.embedding.weight.normal_()
    x = torch.randn(shape, requires_grad=True)

    def indices(out):
        return out if isinstance(out, torch.Tensor) else out[2]

    def results():
        out = quantizer(x)
        if isinstance(out, torch.Tensor):
            return (out,)
        return (*out, *torch.autograd.grad(out[0].square().sum() + out[1], (x, quantizer.embedding.weight)))

    want = results()
    with arimg.accelerate(quantizer) as report:
        assert report.replaced[0].note == "nearest codes without a matrix of distances"
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results(), want, strict=True))
        half = indices(quantizer.bfloat16()(x.detach().bfloat16()))
    assert torch.equal(indices(quantizer(x.detach().bfloat16())), half)  # the original's, with its rounding


def test_pictures_are_encoded_and_decoded_alike():
    model = janus()
    with torch.no_grad():
        model.model.vqmodel.quantize.embedding.weight.normal_()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    want = model.model.vqmodel(pixels)
    with arimg.accelerate(model):
        got = model.model.vqmodel(pixels)
    assert torch.allclose(got[0], want[0], atol=1e-4) and torch.allclose(got[1], want[1], atol=1e-5)
