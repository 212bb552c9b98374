"""arimg.accelerate on diffusers' VQModel (where it is installed)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import arimg
from arimg import _library
from arimg.accelerate import autoencoder

diffusers = pytest.importorskip("diffusers")
resnet = pytest.importorskip("diffusers.models.resnet")

FAST = pytest.mark.skipif(
    _library.simd_level() not in ("avx2", "avx512"), reason="torch's convolution is the faster one here"
)


def vqmodel(**options):
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=4, latent_channels=8, num_vq_embeddings=50,
        lookup_from_codebook=True, **options,
    )  # fmt: skip
    model.quantize.embedding.weight.data.normal_()
    return model.eval().requires_grad_(False)


def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def results(model, pixels):
    """Latents, decoded latents and decoded codes."""
    latents = model.encode(pixels).latents
    quantized, _, (_, _, index) = model.quantize(latents)
    codes = model.decode(index, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
    return latents, quantized, model.decode(latents).sample, codes


@pytest.fixture
def runs(monkeypatch):
    """How often a residual block ran on our code."""
    count, original = [0], autoencoder._residual_block

    def counted(module, x):
        count[0] += 1
        return original(module, x)

    monkeypatch.setattr(autoencoder, "_residual_block", counted)
    return count


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_as_near_to_float64_as_the_original(runs, dtype):
    model, pixels = vqmodel().to(dtype), pictures().to(dtype)
    model.register_to_config(lookup_from_codebook=False)  # latents are decoded as they are
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)

    def parts(m, dtype):
        decoded = m.decode(x.to(dtype), force_not_quantize=True).sample
        return m.encode(pixels.to(dtype)).latents, decoded

    want = parts(exact, torch.float64)
    peer = parts(model, dtype)
    with arimg.accelerate(model) as report:
        blocks = sum(e.part == "ResnetBlock2D" for e in report.replaced)
        runs[0] = 0
        ours = parts(model, dtype)
        assert runs[0] == blocks == 10
    for a, b, c in zip(ours, peer, want):
        # Winograd's transforms enlarge float32 roundings by up to 8 in each direction.
        allowed = (64 if dtype == torch.float32 else 2) * (b - c).abs().max()
        assert (a - c).abs().max() <= allowed


@FAST
def test_the_report_the_way_back_and_copies(runs):
    model, pixels = vqmodel(), pictures()
    want, names, kinds = results(model, pixels), list(model.state_dict()), [type(m) for m in model.modules()]
    report = arimg.accelerate(model)
    parts = [e.part for e in report.replaced]
    assert {p: parts.count(p) for p in parts} == {"ResnetBlock2D": 10, "VectorQuantizer": 1, "Upsample2D": 1}
    assert not report.kept and list(model.state_dict()) == names
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        runs[0] = 0
        with torch.inference_mode():
            got = results(twin, pixels)
        assert runs[0] > 0
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, want))
    report.restore()
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(results(model, pixels), want))


@pytest.mark.parametrize(("legacy", "sane"), [(True, False), (False, True)])
def test_codes_losses_and_gradients_of_the_quantizer(legacy, sane):
    module = vqmodel().quantize.requires_grad_(True)
    module.legacy, module.sane_index_shape = legacy, sane
    z = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def parts():
        out, loss, (_, _, index) = module(z)
        gradients = torch.autograd.grad(out.square().sum() + loss, (z, module.embedding.weight))
        return index, out, loss, *gradients

    want = parts()
    with arimg.accelerate(module) as report:
        got = parts()
    assert [e.note for e in report.replaced] == ["nearest codes without a matrix of distances"]
    assert torch.equal(got[0], want[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got[1:], want[1:], strict=True))


def test_gradients_are_the_originals(runs):
    model, pixels = vqmodel().requires_grad_(True), pictures()
    want = model.encode(pixels).latents
    with arimg.accelerate(model):
        runs[0] = 0
        got = model.encode(pixels).latents
        got.sum().backward()
    assert runs[0] == 0 and torch.equal(got, want) and model.encoder.conv_in.weight.grad is not None


def test_blocks_that_compute_something_else_are_kept():
    options = {"in_channels": 16, "temb_channels": None, "groups": 4}
    for block in (
        resnet.ResnetBlock2D(**options, output_scale_factor=2.0),
        resnet.ResnetBlock2D(**options, up=True, kernel="sde_vp"),
        resnet.ResnetBlock2D(**{**options, "temb_channels": 8}),
        resnet.ResnetBlock2D(**options, non_linearity="gelu"),
    ):
        report = arimg.accelerate(block.eval())
        assert not report.replaced and report.kept[0].part == "ResnetBlock2D"


@FAST
def test_an_adapter_a_hook_and_a_given_size_run_the_original(runs):
    block = resnet.ResnetBlock2D(in_channels=16, temb_channels=None, groups=4).eval().requires_grad_(False)
    x = torch.randn(1, 16, 8, 8)
    want = block(x, None)
    with arimg.accelerate(block):
        runs[0] = 0
        block(x, temb=None)
        assert runs[0] == 1
        block.conv1 = torch.nn.Sequential(block.conv1)
        assert torch.equal(block(x, None), want)
        seen = []
        block.norm1.register_forward_hook(lambda *a: seen.append(0))
        block.conv1 = block.conv1[0]
        assert torch.equal(block(x, None), want) and seen and runs[0] == 1
    tree = (
        torch.nn.ModuleDict({"upsamplers": resnet.Upsample2D(8, use_conv=True)}).eval().requires_grad_(False)
    )
    x = torch.randn(1, 8, 4, 4)
    want = tree["upsamplers"](x, (7, 9))
    with arimg.accelerate(tree) as report:
        assert report.replaced and torch.equal(tree["upsamplers"](x, (7, 9)), want)
