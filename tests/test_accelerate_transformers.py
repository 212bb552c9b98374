"""arimg.accelerate on models of the package transformers: the same tokens from an unchanged `generate`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import arimg
from arimg import ops
from arimg.accelerate import decode_step, few_rows, llama_layer
from arimg.accelerate.swap import is_swapped
from arimg.nn.packed_linear import BITS
from pretend_cuda import CUDA, pretend_cuda
from tiny_transformers import TEXT, chameleon, emu3, janus, spread, transformers

MODELS = {
    "chameleon": chameleon,
    "chameleon-swin": lambda: chameleon(swin_norm=True),
    "emu3": emu3,
    "biases": lambda: chameleon(attention_bias=True, mlp_bias=True),
}
PADDED = torch.tensor([[0, 0, 1, 7, 8, 9], [1, 10, 11, 12, 13, 14]])
PROMPT = torch.tensor([[1, 7, 8, 3], [1, 9, 11, 3]])
LAYERS, NEW = TEXT["num_hidden_layers"], 20


@pytest.fixture
def runs(monkeypatch):
    """How often a layer ran on our code."""
    count = [0]
    place = llama_layer._place

    def counted(*arguments, **named):
        found = place(*arguments, **named)
        count[0] += found is not None
        return found

    monkeypatch.setattr(llama_layer, "_place", counted)
    return count


def generate(model, ids=PADDED, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **options)


def picture(model, ids=PROMPT, **options):
    options = {"do_sample": False, "guidance_scale": 3.0, **options}
    return model.generate(
        ids, attention_mask=(ids != 0).long(), generation_mode="image", **options
    )  # fmt: skip


def scored(model, tokens, chunk=1, store=None):
    """Logits of the given tokens [B, T], `chunk` at a time through a cache, after a prompt of 6."""
    ids = torch.cat((PADDED.to(tokens.device), tokens), 1)
    seen, store = (ids != 0).long(), store or transformers.DynamicCache(config=model.config)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    out, at = [], 0
    while at < ids.shape[1]:
        end = at + (6 if at == 0 else chunk)
        step = {"attention_mask": seen[:, :end], "position_ids": places[:, at:end]}
        logits = model(input_ids=ids[:, at:end], **step, cache=store, use_cache=True).logits
        out.append(logits[:, -min(chunk, end - at) :])
        at = end
    return torch.cat(out, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_equal(runs, name, implementation):
    """Two rows of different lengths, padded on the left, through growing and static caches."""
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    for options in ({}, {"cache_implementation": "static"}):
        want = generate(model, **options)
        with arimg.accelerate(model):
            runs[0] = 0
            assert torch.equal(generate(model, **options), want) and runs[0] == LAYERS * (NEW - 1)
            assert torch.equal(generate(model, PADDED[:1], **options), want[:1])
        assert len(want.unique()) > 8


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_equal_on_emulated_cuda(runs, name):
    model = MODELS[name]()
    want = [generate(model), generate(model, PROMPT)]
    with pretend_cuda() as mode:
        moved = copy.deepcopy(model).to(CUDA)
        with arimg.accelerate(moved) as report:
            got = [generate(moved, ids.to(CUDA)).cpu() for ids in (PADDED, PROMPT)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert runs[0] == 2 * LAYERS * (NEW - 1)
    kernels = {"norm_modulate", "append_", "cached_attention"}
    assert kernels <= set(mode.kernels) <= kernels | {"nearest_code"} and not mode.on_host
    assert mode.kernels["cached_attention"] > runs[0]  # one more where the first layer was compared
    (kept,) = (entry.note for entry in report.kept if entry.path == "lm_head")
    assert kept == "expected weights on the CPU, got cuda: torch's product"
    assert any(entry.note == llama_layer.GPU_NOTE for entry in report.replaced)


def test_pictures_and_beams_are_equal_on_emulated_cuda(runs):
    """Guidance in rows of their own, caches that are reordered, several tokens at once."""
    painter, writer = janus(), emu3()
    want = picture(painter), generate(writer, num_beams=3)
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = scored(writer, tokens, 4)
    with pretend_cuda() as mode:
        painter, writer = (copy.deepcopy(model).to(CUDA) for model in (painter, writer))
        with arimg.accelerate(painter), arimg.accelerate(writer):
            assert torch.equal(picture(painter, PROMPT.to(CUDA)).cpu(), want[0]) and runs[0] == LAYERS * 15
            assert torch.equal(generate(writer, PADDED.to(CUDA), num_beams=3).cpu(), want[1])
            for static in (False, True):
                store = transformers.StaticCache(config=writer.config, max_cache_len=24) if static else None
                runs[0] = 0
                assert (scored(writer, tokens.to(CUDA), 4, store).cpu() - logits).abs().max() < 1e-4
                assert runs[0] == LAYERS * 3
    assert not mode.on_host


def test_the_length_of_a_static_cache_is_waited_for_once_a_pass():
    store = transformers.StaticCache(config=emu3().config, max_cache_len=8)
    with pretend_cuda() as mode:
        length, first, second = torch.tensor(5, device=CUDA), torch.ones(1, device=CUDA), torch.ones(1)

        def asked(index, of_pass):
            return decode_step._length_of(store, index, length, of_pass)

        assert [asked(i, first) for i in range(3)] == [5, 5, 5] and mode.waits.total() == 1
        length.add_(2)
        assert asked(1, first) == 7  # a layer that asks twice is in another pass
        length.add_(2)
        assert [asked(i, second) for i in range(3)] == [9, 9, 9] and mode.waits.total() == 3
        assert asked(0, None) is None


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"weights": "int8"}])
def test_there_are_no_copies_on_emulated_cuda(runs, options):
    """Neither of a model that is accelerated there nor of one that moves there."""
    model, late = emu3(), emu3()
    want = generate(model)
    with arimg.accelerate(late, **options), pretend_cuda() as mode:
        same = generate(late.to(CUDA), PADDED.to(CUDA)).cpu()
        moved = copy.deepcopy(model).to(CUDA)
        with arimg.accelerate(moved, **options) as report:
            got = generate(moved, PADDED.to(CUDA)).cpu()
    assert torch.equal(got, want) and torch.equal(same, want) and runs[0] == 2 * LAYERS * (NEW - 1)
    assert report.memory == 0 and "linear_rows" not in mode.kernels and not few_rows._copies
    told = {entry.path: entry.note for entry in report.kept}
    assert told["model.text_model.layers.0"].startswith("its weights: ")


def test_beam_search_reorders_the_cache(runs):
    model = chameleon()
    want = generate(model, num_beams=3)
    with arimg.accelerate(model):
        assert torch.equal(generate(model, num_beams=3), want) and runs[0] > 0


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_pictures_of_janus_are_equal(runs, scale):
    model, padded = janus(), torch.tensor([[0, 1, 7, 3], [1, 9, 11, 3]])
    for ids in (PROMPT, padded):
        want = picture(model, ids, guidance_scale=scale)
        with arimg.accelerate(model) as report:
            runs[0] = 0
            got = picture(model, ids, guidance_scale=scale)
            assert torch.equal(got, want) and runs[0] == LAYERS * 15
            want_pixels, pixels = want, model.decode_image_tokens(got)
        assert torch.allclose(model.decode_image_tokens(want_pixels), pixels, atol=1e-4)
    assert len(want.unique()) > 4
    replaced = {entry.path for entry in report.replaced}
    assert {"model.generation_head.vision_head", "model.vqmodel.decoder.mid.block_1"} <= replaced


def test_sampling_follows_torchs_seed():
    model = janus()

    def drawn(seed):
        torch.manual_seed(seed)
        return picture(model, do_sample=True, temperature=1.5)

    want = [drawn(0), drawn(1)]
    with arimg.accelerate(model):
        assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
        assert torch.equal(drawn(0), want[0]) and torch.equal(drawn(1), want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["chameleon", "chameleon-swin", "emu3"])
def test_logits_are_as_near_to_float64_as_the_original(runs, name, dtype):
    model = MODELS[name]().to(dtype)
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    exact = scored(copy.deepcopy(model).double(), tokens)
    peer = (scored(model, tokens) - exact).abs()
    with arimg.accelerate(model):
        ours = (scored(model, tokens) - exact).abs()
    assert runs[0] > 0 and ours.mean() <= 1.2 * peer.mean() and ours.max() <= 2 * peer.max()


@pytest.mark.parametrize("static", [False, True])
def test_several_tokens_at_once(runs, static):
    model = emu3()
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))

    def store():
        return transformers.StaticCache(config=model.config, max_cache_len=24) if static else None

    want = scored(model, tokens, 4, store())
    with arimg.accelerate(model):
        assert (scored(model, tokens, 4, store()) - want).abs().max() < 1e-4 and runs[0] == LAYERS * 3


def test_growing_caches_stay_the_original_kind(runs):
    """Their keys are the original's; they can be cropped, copied and gone on with, by either code."""
    model = emu3()
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    store = transformers.DynamicCache(config=model.config)
    want_logits = scored(model, tokens, store=store)
    want = [layer.keys for layer in store.layers]
    with arimg.accelerate(model):
        store = transformers.DynamicCache(config=model.config)
        scored(model, tokens[:, :4], store=store)
        early, kept = store.layers[1].keys, store.layers[1].keys.clone()
        twin = copy.deepcopy(store)
        store.crop(-2)
        step = {"cache": store, "use_cache": True}
        seen = torch.cat((PADDED, tokens), 1) != 0
        places = (seen.long().cumsum(1) - 1).clamp(min=0)
        for t in range(2, 12):
            masks = {"attention_mask": seen[:, : 7 + t].long(), "position_ids": places[:, 6 + t : 7 + t]}
            out = model(input_ids=tokens[:, t : t + 1], **masks, **step).logits
            assert (out[:, 0] - want_logits[:, 1 + t]).abs().max() < 1e-4
        assert type(store.layers[0]).__name__ == "DynamicLayer" and store.get_seq_length() == 18
        assert all(torch.allclose(layer.keys, k, atol=1e-4) for layer, k in zip(store.layers, want))
        assert torch.equal(early, kept)  # what was handed out is not written again
        assert twin.get_seq_length() == 10 and torch.equal(twin.layers[1].keys, kept)
        store.reset()
        assert store.get_seq_length() == 0
    number = len(decode_step._buffers)
    del store, step, twin
    assert number == LAYERS and len(decode_step._buffers) == 0


def test_buffers_are_written_in_place_between_growths():
    model, store = emu3(), None
    with arimg.accelerate(model), torch.no_grad():
        store = model(input_ids=PROMPT, use_cache=True).cache
        places = []
        for _ in range(40):
            model(input_ids=PROMPT[:, :1], cache=store, use_cache=True)
            places.append(store.layers[0].keys.data_ptr())
    assert len(set(places)) <= 3


def test_what_is_not_known_runs_the_original(runs):
    model = emu3()
    model.set_attn_implementation("eager")

    def same(**options):
        runs[0] = 0
        want = generate(reference, **options)
        got = generate(model, **options)
        if hasattr(want, "sequences"):
            assert all(torch.equal(a, b) for a, b in zip(want.attentions[-1], got.attentions[-1]))
            want, got = want.sequences, got.sequences
        assert torch.equal(want, got)
        return runs[0]

    reference, pristine = copy.deepcopy(model), copy.deepcopy(model)
    with arimg.accelerate(model):
        assert same() > 0
        assert same(output_attentions=True, return_dict_in_generate=True) == 0
    model = pristine  # transformers has not put its recorders there
    with arimg.accelerate(model):
        assert same(use_cache=False) == 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same() == 0
        seen = []
        hook = model.model.text_model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        assert same() == (LAYERS - 1) * (NEW - 1) and len(seen) == NEW
        hook.remove()
        for layer in model.model.text_model.layers:
            layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj)
        assert same() == 0


def test_hidden_states_are_recorded(runs):
    model = chameleon()
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    want = generate(model, **options).hidden_states
    with arimg.accelerate(model):
        got = generate(model, **options).hidden_states
    assert runs[0] == LAYERS * (NEW - 1) and len(got[-1]) == len(want[-1]) == LAYERS + 1
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got[-1], want[-1]))


def test_gradients_and_training_run_the_original(runs):
    model = emu3().requires_grad_(True)
    ids = torch.randint(5, 60, (2, 4))

    def gradient():
        loss = model(input_ids=ids, labels=ids).loss
        return torch.autograd.grad(loss, list(model.model.text_model.parameters()))

    def through_a_cache():
        store = model(input_ids=ids, use_cache=True).cache
        return model(input_ids=ids[:, :1], cache=store, use_cache=True).logits

    want, logits = gradient(), through_a_cache()
    with arimg.accelerate(model):
        assert all(torch.equal(a, b) for a, b in zip(gradient(), want))
        assert torch.equal(through_a_cache(), logits) and through_a_cache().requires_grad
        assert runs[0] == 0
        model.train()
        with torch.no_grad():
            through_a_cache()
        assert runs[0] == 0


def test_inference_mode(runs):
    model = chameleon()
    want = generate(model)
    with arimg.accelerate(model):
        with torch.inference_mode():
            assert torch.equal(generate(model), want) and runs[0] == LAYERS * (NEW - 1)
            store = model(input_ids=PROMPT, use_cache=True).cache
            model(input_ids=PROMPT[:, :1], cache=store, use_cache=True)
        assert torch.equal(generate(model), want)


def test_compiled_models_are_the_original(runs):
    model = chameleon()
    store = transformers.StaticCache(config=model.config, max_cache_len=8)
    ids = {"input_ids": PROMPT[:, :1], "use_cache": True}
    with torch.no_grad():
        prompt = copy.deepcopy(model(input_ids=PROMPT, cache=store, use_cache=True).cache)
        want = model(**ids, cache=copy.deepcopy(prompt)).logits
        with arimg.accelerate(model):
            got = torch.compile(model, backend="eager")(**ids, cache=copy.deepcopy(prompt)).logits
    assert torch.equal(got, want) and runs[0] == 0
    torch._dynamo.reset()


def test_nothing_is_stored_and_copies_are_accelerated(runs):
    model = janus()
    want, names, state = picture(model), [set(vars(m)) for m in model.modules()], list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    report = arimg.accelerate(model)
    assert list(model.state_dict()) == state
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        runs[0] = 0
        assert is_swapped(twin.model.language_model.layers[0])
        assert torch.equal(picture(twin), want) and runs[0] == LAYERS * 15
    report.restore()
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == names
    runs[0] = 0
    assert torch.equal(picture(model), want) and runs[0] == 0


def test_copies_of_the_weights():
    """dtype: nearer to float32 than a bfloat16 model, follows changes, and its memory is given back."""
    model = emu3()
    tokens = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    want = scored(model, tokens)
    peer = (scored(copy.deepcopy(model).bfloat16(), tokens) - want).abs().mean()
    report = arimg.accelerate(model, dtype=torch.bfloat16)
    copied = [p for n, p in model.named_parameters() if "layers" in n and n.endswith("proj.weight")]
    assert report.memory == 2 * sum(p.numel() for p in (*copied, model.lm_head.weight))
    assert 0 < (scored(model, tokens) - want).abs().mean() < peer
    assert len(few_rows._copies) == LAYERS * 5 + 1  # queries, keys and values in one
    with torch.no_grad():
        model.model.text_model.layers[0].self_attn.o_proj.weight.zero_()
    changed = scored(model, tokens)
    report.restore()
    assert not few_rows._copies
    assert (scored(model, tokens) - changed).abs().mean() < peer


def rounded(model, weights):
    """The model in steps with the weights that codes stand for; its prompt reads the weights themselves."""
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if name.endswith("lm_head") or ("layers" in name and name.endswith("proj")):
            packed = ops.quantize_weight(module.weight, BITS[weights])
            module.weight.data = ops.dequantize_weight(packed)

    def run(input_ids, **step):
        return (model if input_ids.shape[1] > 1 else twin)(input_ids=input_ids, **step)

    run.config = model.config
    return run


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["biases", "chameleon-swin", "emu3"])
def test_codes_of_the_weights(runs, name, weights):
    """Steps have the logits of the rounded weights and follow changes; memory is counted and given back."""
    model = MODELS[name]()
    o_proj = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.o_proj"))
    tokens = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    exact, state = scored(model, tokens), copy.deepcopy(model.state_dict())
    want = [scored(rounded(model, weights), tokens)]
    o_proj.weight.zero_()
    want.append(scored(rounded(model, weights), tokens))
    model.load_state_dict(state)
    report = arimg.accelerate(model, weights=weights)
    got = [scored(model, tokens)]
    kept = [packed for _, packed in few_rows._copies.values()]
    assert len(kept) == LAYERS * 5 + 1 and runs[0] == LAYERS * 8
    assert report.memory == sum(c.codes.nbytes + c.scales.nbytes for c in kept)
    assert f"weights {weights}" in str(report) and f"no {weights} here" not in str(
        [e for e in report.kept if "layers" in e.path or "lm_head" in e.path]
    )
    o_proj.weight.zero_()
    got.append(scored(model, tokens))
    for a, b in zip(got, want):
        assert (a - b)[:, 1:].abs().max() < 1e-3
    assert (got[0] - exact).abs().max() > 0.01
    model.load_state_dict(state)
    report.restore()
    assert not few_rows._copies and torch.equal(scored(model, tokens), exact)


def test_relatives_with_other_arithmetic_are_kept():
    def reason(kind, config):
        torch.manual_seed(0)
        model = spread(kind(config))
        report = arimg.accelerate(model)
        assert not any("layers" in entry.path for entry in report.replaced)
        return next(e.note for e in report.kept if not e.path.endswith("lm_head"))

    text = {"vocab_size": 60, "num_key_value_heads": 2, **TEXT}
    scaled = transformers.GraniteConfig(**text, residual_multiplier=0.5)
    assert reason(transformers.GraniteForCausalLM, scaled).startswith(
        "expected the arithmetic of a Llama layer"
    )
    gelu = transformers.LlamaConfig(**text, hidden_act="gelu")
    assert reason(transformers.LlamaForCausalLM, gelu) == "layer 0: expected SiLU in the MLP"
    normed = transformers.Qwen3Config(**text, head_dim=16)
    assert "arithmetic" in reason(transformers.Qwen3ForCausalLM, normed)
    odd = transformers.LlamaConfig(**{**text, "hidden_size": 48})
    assert "head dim" in reason(transformers.LlamaForCausalLM, odd)


def test_a_head_alone():
    head = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(48, 70)})
    x = torch.randn(2, 3, 48)
    many = x.repeat(3, 1, 1)  # more rows than ours takes: the original's bits, which depend on their number
    want, want_many = head["lm_head"](x), head["lm_head"](many)
    with arimg.accelerate(head):
        with torch.no_grad():
            assert torch.allclose(head["lm_head"](x), want, atol=1e-5)
        assert torch.equal(head["lm_head"](x), want) and head["lm_head"](x).requires_grad
        with torch.no_grad():
            assert torch.equal(head["lm_head"](many), want_many)


@torch.no_grad()
@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_codes_and_graphs_together(runs, name):
    """Steps of these models are not captured: they read their codes, and the report says that."""
    model = MODELS[name]()
    tokens = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    with arimg.accelerate(model, weights="int8"):
        want = scored(model, tokens)
    steps = runs[0]
    with arimg.accelerate(model, weights="int8", graphs=True) as report:
        assert torch.equal(scored(model, tokens), want) and runs[0] == 2 * steps > 0
        assert "CUDA graphs: not used: no CUDA device here" in str(report) or torch.cuda.is_available()
