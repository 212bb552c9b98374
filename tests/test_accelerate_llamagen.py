"""arimg.accelerate on a stand-in of LlamaGen: equal tokens through an unmodified loop, reversible."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import arimg
from arimg import ops
from arimg.accelerate import llamagen as accelerated
from arimg.accelerate import view
from arimg.accelerate.swap import is_swapped
from arimg.generators.llamagen import Decoder
from standins import llamagen as standin

LABELS = torch.tensor([3, 6])


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = standin.Transformer(standin.ModelArgs(**options))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            else:
                p.normal_(mean=1.0, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture
def steps(monkeypatch):
    """Number of steps that ran on our code."""
    count = [0]
    run = Decoder.run

    def counted(self, *arguments):
        count[0] += 1
        return run(self, *arguments)

    monkeypatch.setattr(Decoder, "run", counted)
    return count


def greedy(model, tokens=25, cfg_scale=3.0, **options):
    return standin.generate(model, LABELS, tokens, cfg_scale, **options)


def scored(model, tokens):
    """Logits of given tokens through the cache, as the sampling loop asks for them."""
    with torch.no_grad():
        model.setup_caches(max_batch_size=2, max_seq_length=26, dtype=model.tok_embeddings.weight.dtype)
        out = [model(None, LABELS, torch.arange(1))[0]]
        for t in range(tokens.shape[1] - 1):
            out.append(model(tokens[:, t : t + 1], cond_idx=None, input_pos=torch.tensor([1 + t]))[0])
    return torch.cat(out, 1)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0}, {"cfg_interval": 4}])
def test_an_unmodified_loop_gives_the_same_tokens(steps, options):
    model = make()
    want = greedy(model, **options)
    assert len(want.unique()) > 5
    with arimg.accelerate(model):
        assert torch.equal(greedy(model, **options), want) and steps[0] == 25
        assert torch.equal(greedy(model, 7, **options), want[:, :7])
        assert (scored(model, want) - scored(make(), want)).abs().max() < 1e-4
    assert torch.equal(greedy(model, **options), want) and steps[0] == 25 + 7 + 25


def test_nothing_is_stored_and_restore_leaves_nothing():
    model = make()
    greedy(model)
    names, state = [set(vars(m)) for m in model.modules()], set(model.state_dict())
    report = arimg.accelerate(model)
    greedy(model)
    assert isinstance(model, standin.Transformer) and set(model.state_dict()) == state
    assert "(the model): Transformer: steps of one token" in str(report)
    report.restore()
    report.restore()
    assert type(model) is standin.Transformer
    assert [set(vars(m)) for m in model.modules()] == names


@pytest.mark.parametrize("ours_first", [True, False])
def test_original_and_accelerated_steps_mix(steps, ours_first):
    """Both write the same cache: what one began the other goes on with."""
    model = make()
    tokens = greedy(model)
    want = scored(model, tokens)
    report = arimg.accelerate(model)
    with torch.no_grad():
        model.setup_caches(2, 26, torch.float32)
        out = []
        for t in range(25):
            arguments = (None, LABELS) if t == 0 else (tokens[:, t - 1 : t], None)
            ours = (t < 12) == ours_first
            step = model if ours else lambda *a: standin.Transformer.forward(model, *a)
            out.append(step(*arguments, torch.tensor([t]))[0])
    assert steps[0] == (12 if ours_first else 13)
    report.restore()
    assert torch.allclose(torch.cat(out, 1), want, atol=1e-4)


def test_changed_and_replaced_weights_are_seen():
    model, other = make(0), make(1)
    want = greedy(other)
    state = {k: v for k, v in other.state_dict().items() if "kv_cache" not in k}
    with arimg.accelerate(model):
        first = greedy(model)
        assert not torch.equal(first, want)
        model.load_state_dict(state, assign=True, strict=False)
        assert torch.equal(greedy(model), want)
        model.norm.weight.copy_(-model.norm.weight)
        assert not torch.equal(greedy(model), want)


def test_copies_are_accelerated_too_and_independent(steps):
    model = make()
    with arimg.accelerate(model):
        want = greedy(model)
        twin = copy.deepcopy(model)
        assert is_swapped(twin)
        steps[0] = 0
        assert torch.equal(greedy(twin), want) and steps[0] == 25
        twin.output.weight.zero_()
        assert torch.equal(greedy(model), want)


def test_bfloat16_models_and_copies_are_as_near_to_float32_as_the_original(steps):
    model = make()
    tokens = greedy(model)
    want = scored(model, tokens)
    with arimg.accelerate(model, dtype=torch.bfloat16) as report:
        copied = (scored(model, tokens) - want).abs().mean()
        assert report.memory == 2 * sum(p.numel() for p in model.parameters())
    model.bfloat16()
    peer = (scored(model, tokens) - want).abs().mean()
    steps[0] = 0
    with arimg.accelerate(model):
        ours = (scored(model, tokens) - want).abs().mean()
        assert steps[0] == 25 and 0 < copied < peer and 0 < ours < peer
        model.float()  # moved after acceleration
        assert scored(model, tokens).isfinite().all()


def test_sampled_tokens_have_the_distribution_of_the_logits():
    """The unmodified sampler on our logits: the first token's law over many rows, and the seed's sequence."""
    model, rows = make(), 4000
    labels = torch.full((rows,), 3)

    def first(seed):
        torch.manual_seed(seed)
        model.setup_caches(max_batch_size=8, max_seq_length=8, dtype=torch.float32)
        with torch.no_grad():
            parts = [model(None, part, torch.arange(1))[0][:, -1] for part in labels.split(8)]
        return torch.cat(parts).softmax(-1).multinomial(1)[:, 0]

    with torch.no_grad():
        model.setup_caches(max_batch_size=1, max_seq_length=8, dtype=torch.float32)
        law = model(None, labels[:1], torch.arange(1))[0][0, -1].softmax(-1)
    with arimg.accelerate(model):
        drawn = first(5)
        assert torch.equal(first(5), drawn) and not torch.equal(first(6), drawn)
    expected = law * rows
    many = expected > 5
    counts = torch.bincount(drawn, minlength=len(law)).float()
    chi2 = ((counts - expected)[many] ** 2 / expected[many]).sum()
    assert chi2 < many.sum() + 5 * (2 * many.sum()) ** 0.5


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}])
def test_pickled_models_and_replicas_are_accelerated_too(steps, options):
    model = make()
    with arimg.accelerate(model, **options):
        want = greedy(model)
        twin = pickle.loads(pickle.dumps(model))
        replica = model._replicate_for_data_parallel()  # shares the parameters, as DataParallel sets them
        for one in (twin, replica):
            steps[0] = 0
            assert is_swapped(one)
            assert torch.equal(greedy(one), want) and steps[0] == 25


def test_compiled_models_give_the_same_tokens():
    model = make()
    want = greedy(model, 6)
    with arimg.accelerate(model):
        compiled = torch.compile(model, backend="eager")
        model.setup_caches(2, 26, torch.float32)
        with torch.no_grad():
            first = compiled(None, LABELS, torch.arange(1))[0]
        assert torch.allclose(first, scored(model, want)[:, :1], atol=1e-4)


def test_training_runs_the_original(steps):
    model, tokens = make().requires_grad_(True).train(), torch.randint(50, (2, 25))

    def gradient():
        torch.manual_seed(0)  # of the dropouts
        loss = model(tokens[:, :-1], LABELS, targets=tokens)[1]
        return torch.autograd.grad(loss, list(model.parameters()))

    want = gradient()
    with arimg.accelerate(model):
        assert all(torch.equal(a, b) for a, b in zip(gradient(), want)) and steps[0] == 0


def test_steps_that_do_not_suit_run_the_original(steps):
    model = make()
    tokens = greedy(model)
    with arimg.accelerate(model), torch.no_grad():
        model.setup_caches(2, 26, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(None, LABELS, torch.arange(1))
        model.setup_caches(2, 26, torch.float32)
        model(tokens[:, :3], None, torch.tensor([1, 2, 3]))
        first = model(None, LABELS, torch.arange(1))[0]
        assert steps[0] == 1 and torch.allclose(first, scored(model, tokens)[:, :1])
        # a mask of the caller's: some later tokens do not see the class
        model.setup_caches(2, 26, torch.float32)
        model.causal_mask[:, 1:9, 0] = False
        steps[0] = 0
        model(None, LABELS, torch.arange(1))
        hidden = model(tokens[:, :1], None, torch.tensor([1]))[0]
        assert steps[0] == 0 and not torch.allclose(hidden, scored(model, tokens)[:, 1:2], atol=1e-3)
    model.double()
    want = greedy(model)
    with arimg.accelerate(model):
        steps[0] = 0
        assert torch.equal(greedy(model), want) and steps[0] == 0
    model.float().requires_grad_(True)
    with arimg.accelerate(model):
        model.setup_caches(2, 26, torch.float32)
        steps[0] = 0
        model(None, LABELS, torch.arange(1))[0].sum().backward()
        assert model.output.weight.grad is not None and steps[0] == 0


def test_inference_mode(steps):
    model = make()
    want = greedy(model)
    with arimg.accelerate(model), torch.inference_mode():
        assert torch.equal(greedy(model), want) and steps[0] == 25


def test_relatives_are_kept_with_a_reason():
    def reason(model):
        report = arimg.accelerate(model)
        assert not report.replaced and type(model) is standin.Transformer
        return report.kept[0].note

    model = make()
    model.model_type = "edit"
    assert reason(model) == "expected a model for classes (c2i) or texts (t2i), got edit"
    model = make()
    model.layers[1].attention.q_norm = torch.nn.LayerNorm(16)
    assert reason(model).startswith("unknown parameters layers.1.attention.q_norm.bias")
    model = make()
    model.layers[1].ffn_norm.eps = 1e-3
    assert reason(model) == "expected one epsilon of all norms, got [1e-05, 0.001]"
    model = make()
    model.layers[1].attention.wqkv = torch.nn.Linear(64, 100, bias=False)
    assert reason(model) == "expected 'layers.1.attention.wqkv.weight' of shape [192, 64], got [100, 64]"


def test_plans_and_copies_end_with_the_acceleration_and_with_the_model():
    for ends in (False, True):
        model = make()
        report = arimg.accelerate(model, weights="int8")
        greedy(model)
        assert model in accelerated._plans and model in view._views
        number, views = len(accelerated._plans), len(view._views)
        if ends:
            report.restore()
        else:
            del model, report
        assert len(accelerated._plans) == number - 1 and len(view._views) == views - 1


def rounded(model, bits):
    """The model with the weights that the codes stand for."""
    twin = copy.deepcopy(model)
    for linear in [m for part in (twin.layers, [twin.output]) for p in part for m in p.modules()]:
        if isinstance(linear, torch.nn.Linear):
            linear.weight.copy_(ops.dequantize_weight(ops.quantize_weight(linear.weight, bits)))
    return twin


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_codes_for_weights(steps, storage):
    """Logits are those of the weights that the codes stand for, and near the original's as documented."""
    model, bits = make(), int(storage[3:])
    tokens = greedy(model)
    with torch.no_grad():
        want, peer = scored(model, tokens), scored(rounded(model, bits), tokens)
    state = copy.deepcopy(model.state_dict())
    with arimg.accelerate(model, weights=storage) as report:
        got = scored(model, tokens)
        assert steps[0] == 25 and (got - peer).abs().max() < 1e-4
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "kv_cache" not in k)
        # 9 products in series, of which each is off by 0.9 % (11 %) of its size
        error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert 1e-3 < error < 9 * {"int8": 0.009, "int4": 0.11}[storage]
        weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        codes = [ops.quantize_weight(w, bits) for w in weights]
        assert report.memory == sum(c.codes.nbytes + c.scales.nbytes for c in codes)
        assert f"products at the speed of reading their weights; weights {storage}" in str(report)
        model.layers[1].feed_forward.w2.weight.mul_(2)  # seen at the next picture
        assert (scored(model, tokens) - scored(rounded(model, bits), tokens)).abs().max() < 1e-4
        model.bfloat16()
        assert (scored(model, tokens) - scored(rounded(model.float(), bits), tokens)).abs().mean() < 0.05
    model.load_state_dict(state, strict=False)
    assert torch.equal(scored(model, tokens), want)


def test_other_weights_are_refused_and_parts_without_them_named():
    for wrong in ("int2", "bfloat16", 8):
        with pytest.raises(ValueError, match=r"expected weights None or one of \['int8', 'int4'\], got"):
            arimg.accelerate(make(), weights=wrong)
    with pytest.raises(ValueError, match=r"expected dtype or weights, got both: torch\.bfloat16 and 'int8'"):
        arimg.accelerate(make(), dtype=torch.bfloat16, weights="int8")
    from standins import var

    report = arimg.accelerate(var.VAR(var.VQVAE()), weights="int8")
    assert ("", "VAR", "its weights: no int8 here") in [(e.path, e.part, e.note) for e in report.kept]
    assert len(report.kept) == len(report.replaced) and report.memory == 0
