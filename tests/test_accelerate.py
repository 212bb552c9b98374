"""arimg.accelerate on stand-ins with the names of public code: equal results, reversible, nothing stored."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import arimg
from arimg.accelerate.swap import is_swapped
from pretend_cuda import CUDA, pretend_cuda
from standins import var as standin

LABELS = torch.tensor([3, 7])


def make(shared_aln=False, attn_l2_norm=True, trainable=False, **dropouts):
    torch.manual_seed(0)
    vae = standin.VQVAE()
    model = standin.VAR(vae, shared_aln=shared_aln, attn_l2_norm=attn_l2_norm, **dropouts)
    with torch.no_grad():
        for p in [*model.parameters(), *vae.parameters()]:
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
        vae.quantize.embedding.weight.normal_()
    model.requires_grad_(trainable)
    vae.requires_grad_(trainable)
    return model.eval(), vae.eval()


def greedy(model, labels=LABELS):
    return model.autoregressive_infer_cfg(len(labels), labels, g_seed=1, top_k=1)


def scored(model, x, seed=5):
    torch.manual_seed(seed)  # the original drops labels in evaluation too
    return model(LABELS, x)


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_var_gives_the_same_pictures_logits_and_codes(shared_aln, attn_l2_norm):
    model, vae = make(shared_aln, attn_l2_norm)
    with torch.no_grad():
        codes = vae.img_to_idxBl(images())
        x = vae.quantize.idxBl_to_var_input(codes)
        before = (
            greedy(model),
            scored(model, x),
            vae.quantize.f_to_idxBl_or_fhat(x.new_ones(2, 8, 4, 4), True),
        )
        report = arimg.accelerate(model)
        assert all(torch.equal(a, b) for a, b in zip(vae.img_to_idxBl(images()), codes))
        assert torch.allclose(vae.quantize.idxBl_to_var_input(codes), x, atol=1e-5)
        assert torch.allclose(greedy(model), before[0], atol=1e-4)
        assert torch.allclose(scored(model, x), before[1], atol=1e-4)
        running = vae.quantize.f_to_idxBl_or_fhat(x.new_ones(2, 8, 4, 4), True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(running, before[2]))
        report.restore()
        assert torch.equal(greedy(model), before[0]) and torch.equal(scored(model, x), before[1])


def test_float64_runs_the_original():
    model, vae = make()
    model.double(), vae.double()
    f = images()[..., :4, :4].double().repeat(1, 3, 1, 1)[:, :8]

    def results():
        codes = vae.img_to_idxBl(images().double())
        x = vae.quantize.idxBl_to_var_input(codes)
        return [greedy(model), scored(model, x), *codes, x, *vae.quantize.f_to_idxBl_or_fhat(f, True)]

    with torch.no_grad():
        want = results()
        with arimg.accelerate(model):
            got = results()
    assert want[0].dtype == torch.float64 and len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5)


def test_the_report_names_what_was_replaced():
    model, vae = make()
    report = arimg.accelerate(model)
    replaced = {e.path: e.part for e in report.replaced}
    assert replaced[""] == "VAR" and replaced["vae_proxy[0].quantize"] == "VectorQuantizer2"
    assert replaced["vae_proxy[0].decoder.up.1.upsample"] == "Upsample2x"
    assert sum(part == "ResnetBlock" for part in replaced.values()) == 13
    assert "memory beyond the original's: nothing" in str(report)
    assert "vae_proxy[0].encoder.down.0.block.0 ... vae_proxy[0].decoder.up.2.block.1 (13)" in str(report)
    assert vae.decoder.mid.attn_1.__class__ is standin.AttnBlock


def test_sampled_pictures_follow_the_seed_and_the_distribution():
    """The first scale has one token: its law over many rows is that of the original's logits."""
    model, vae = make()
    drawn = []
    quantizer = type(vae.quantize)
    rows = 2000
    labels = torch.full((rows,), 3)

    def first_codes(g_seed):
        from arimg.accelerate.var import _generator

        view = _generator(model)
        step = next(iter(view.stream(labels, cfg=1.5, top_k=0, top_p=1.0, seed=g_seed)))
        return step.indices[:, 0]

    with torch.no_grad(), arimg.accelerate(model):
        one = model.autoregressive_infer_cfg(2, LABELS, g_seed=7)
        assert torch.equal(one, model.autoregressive_infer_cfg(2, LABELS, g_seed=7))
        assert not torch.equal(one, model.autoregressive_infer_cfg(2, LABELS, g_seed=8))
        torch.manual_seed(3)
        free = model.autoregressive_infer_cfg(2, LABELS)
        torch.manual_seed(3)
        assert torch.equal(free, model.autoregressive_infer_cfg(2, LABELS))
        assert model.autoregressive_infer_cfg(2, None, g_seed=1).shape == one.shape
        assert torch.equal(
            model.autoregressive_infer_cfg(2, 4, g_seed=1),
            model.autoregressive_infer_cfg(2, torch.tensor([4, 4]), g_seed=1),
        )
        drawn = first_codes(11)
    assert type(vae.quantize) is quantizer
    with torch.no_grad():
        cond = model.class_emb(torch.tensor([3]))
        x = cond[:, None] + model.pos_start + (model.lvl_embed(model.lvl_1L) + model.pos_1LC)[:, :1]
        for block in model.blocks:
            x = block(x, cond, None)
        law = model.head(model.head_nm(x, cond))[0, 0].softmax(-1)
    expected = law * rows
    counts = torch.bincount(drawn, minlength=len(law)).float()
    many = expected > 5
    chi2 = ((counts - expected)[many] ** 2 / expected[many]).sum()
    freedom = many.sum() - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_nothing_is_stored_and_restore_leaves_nothing():
    model, vae = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [set(vars(m)) for m in (*model.modules(), *vae.modules())]
    with arimg.accelerate(model) as report, torch.no_grad():
        greedy(model)
        assert model.state_dict().keys() == before.keys()
        assert isinstance(model, standin.VAR) and type(model).__name__ == "VAR"
    assert [set(vars(m)) for m in (*model.modules(), *vae.modules())] == names
    assert type(model) is standin.VAR and not any(is_swapped(m) for m in vae.modules())
    report.restore()  # again: nothing to do
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_changed_and_replaced_weights_are_seen(dtype):
    (model, _), (other, _) = make(), make()
    with torch.no_grad():
        other.head.weight.normal_()
        want = greedy(other)
        with arimg.accelerate(model, dtype=dtype):
            first = greedy(model)
            model.load_state_dict(other.state_dict(), assign=True)
            model.requires_grad_(False)
            changed = greedy(model)
            assert not torch.equal(first, changed)
            assert (changed - want).abs().mean() < (1e-5 if dtype is None else 0.05)
            model.head.weight.add_(torch.randn_like(model.head.weight))
            assert not torch.equal(greedy(model), changed)


def test_copies_are_accelerated_too_and_independent():
    model, _ = make()
    with torch.no_grad(), arimg.accelerate(model):
        want = greedy(model)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert is_swapped(twin) and twin.head.weight is not model.head.weight
            assert torch.equal(greedy(twin), want)
            twin.head.weight.zero_()
            assert torch.equal(greedy(model), want)


def test_replicas_of_data_parallel_run_their_own_parameters():
    model, vae = make()
    block = vae.decoder.mid.block_1
    x = torch.randn(1, 32, 8, 8)
    with torch.no_grad(), arimg.accelerate(model):
        want = block(x)
        replica = block._replicate_for_data_parallel()
        replica.conv2 = copy.deepcopy(block.conv2)
        replica.conv2.weight.zero_()
        assert is_swapped(replica) and not torch.allclose(replica(x), want)
        assert torch.equal(block(x), want)


def trained(model, scale=-1, seed=5):
    """Loss, gradients and the random number after them, of the first scales or all."""
    model.prog_si, tokens = scale, (29 if scale < 0 else (0, 4, 13, 29)[scale])
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, tokens, 8, generator=rng)
    target = torch.randint(64, (2, tokens + 1), generator=rng)
    torch.manual_seed(seed)
    loss = nn.functional.cross_entropy(model(LABELS, x).flatten(0, 1), target.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), gradients, torch.rand(1)


@pytest.mark.parametrize("scale", [-1, 0, 2])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_training_gives_the_loss_and_the_gradients_of_the_original(shared_aln, scale):
    """The same dropouts from the same seed, and as many random numbers."""
    model, _ = make(shared_aln, trainable=True, drop=0.2, drop_path=0.4)
    model.train()
    want = trained(model, scale)
    assert not torch.equal(trained(model, scale, seed=6)[0], want[0])
    with arimg.accelerate(model):
        got = trained(model, scale)
    assert torch.allclose(got[0], want[0], atol=1e-6) and torch.equal(got[2], want[2])
    largest = max(g.abs().max() for g in want[1] if g is not None)
    for ours, theirs in zip(got[1], want[1]):
        assert (ours is None) == (theirs is None)
        assert theirs is None or torch.allclose(ours, theirs, atol=1e-5 * largest)


def test_training_that_does_not_suit_runs_the_original():
    def sequential(model):
        model.word_embed = nn.Sequential(nn.Linear(8, 32), nn.Identity())

    for change, attn_drop in (
        (lambda m: None, 0.1),
        (lambda m: m.blocks[0].attn.register_forward_hook(lambda *a: None), 0.0),
        (sequential, 0.0),
    ):
        model, _ = make(trainable=True, attn_drop=attn_drop)
        model.train()
        with arimg.accelerate(model):
            change(model)
            got = trained(model)
        want = trained(model)
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1]) if b is not None)


def test_gradients_of_the_decoder_run_the_original_code():
    model, vae = make(trainable=True)
    f_hat = torch.ones(1, 8, 4, 4)

    def gradients():
        return torch.autograd.grad(vae.fhat_to_img(f_hat).mean(), list(vae.decoder.parameters()))

    want = gradients()
    with arimg.accelerate(model):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), want))


def test_inference_mode_autocast_and_dtype():
    model, _ = make()
    with torch.no_grad():
        want = greedy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            peer = (greedy(model) - want).abs().mean()
    with arimg.accelerate(model), torch.inference_mode():
        assert torch.allclose(greedy(model), want, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (greedy(model) - want).abs().mean() < 2 * peer + 0.02
    with arimg.accelerate(model, dtype=torch.bfloat16) as report, torch.inference_mode():
        assert report.memory == 2 * sum(p.numel() for p in model.parameters())
        assert (greedy(model) - want).abs().mean() < 2 * peer + 0.02
    with torch.no_grad():
        model.bfloat16()
        with arimg.accelerate(model):  # moved after acceleration, too
            half = greedy(model)
            model.float()
            assert greedy(model).dtype == torch.float32 and half.isfinite().all()


def test_compiled_parts_agree():
    model, vae = make()
    f_hat = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        want = vae.fhat_to_img(f_hat)
        with arimg.accelerate(model):
            compiled = torch.compile(vae.decoder, backend="eager")
            got = compiled(vae.post_quant_conv(f_hat)).clamp(-1, 1)
    assert torch.allclose(got, want, atol=1e-4)


def test_unknown_models_are_left_alone_and_told_what_was_looked_for():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    report = arimg.accelerate(model)
    assert not report.replaced and type(model) is nn.Sequential
    assert "no known part found; looked for generators of FlexVAR" in str(report)


def test_parts_that_do_not_fit_are_kept_with_a_reason():
    model, vae = make()
    vae.decoder.mid.block_1.norm1 = nn.BatchNorm2d(32)
    vae.decoder.mid.block_2.conv1 = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
    vae.decoder.up[1].upsample.forward = lambda x: x  # not what its name says
    model.word_embed = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
    with torch.no_grad():
        kept = {e.path: e.note for e in arimg.accelerate(model).kept}
    assert kept["vae_proxy[0].decoder.mid.block_1"] == "expected norm1 to be a GroupNorm, got BatchNorm2d"
    assert "conv1 to be a 3x3 convolution of stride 1" in kept["vae_proxy[0].decoder.mid.block_2"]
    assert "expected a parameter 'word_embed.weight'" in kept[""]
    assert type(vae.decoder.up[1].upsample) is standin.Upsample2x


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="expected a torch module, a pipeline or a scheduler, got dict"):
        arimg.accelerate({})
    model, _ = make()
    with pytest.raises(
        TypeError, match=r"expected dtype None, torch.bfloat16 or torch.float16, got torch.int8"
    ):
        arimg.accelerate(model, dtype=torch.int8)
    with arimg.accelerate(model), pytest.raises(ValueError, match="not accelerated yet"):
        arimg.accelerate(model)
    with (
        arimg.accelerate(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="expected labels from 0 to 9"),
    ):
        greedy(model, torch.tensor([3, 12]))


def test_a_view_draws_no_weights_and_does_not_wake_torchs_compiler():
    """Weights drawn or scaled on "meta" import torch's compiler and sympy: 100 MB for nothing."""
    code = (
        "import sys, torch, arimg; from standins import var; vae = var.VQVAE(); model = var.VAR(vae);"
        "assert arimg.accelerate(model.eval()).replaced;"
        "print({'torch._dynamo', 'sympy'} & sys.modules.keys())"
    )
    folder = Path(__file__).parent
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() == "set()"


def test_on_a_gpu_the_convolutions_stay_and_the_report_says_so():
    _, vae = make()
    with pretend_cuda():
        report = arimg.accelerate(vae.to(CUDA).decoder)
    kept = [e.note for e in report.kept if e.part in ("ResnetBlock", "Upsample2x")]
    assert not report.replaced and len(kept) == 10  # 2 in the middle, 2 a level, 2 times up
    assert set(kept) == {"expected weights on the CPU, got cuda: torch's convolution"}
