"""LlamaGen's tokenizer: released names and shapes, agreement with a stand-in of the released code, files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import arimg
from arimg import tokenizers
from arimg.tokenizers import VQModel
from arimg.tokenizers.vqmodel import _renamed
from standins import llamagen_vq

SMALL = dict(vocab=50, dim=8, z=16, ch=128, ch_mult=(1, 1, 2), blocks=1)


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    model = llamagen_vq.VQModel(**SMALL).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
            elif "embedding" in name:
                p.normal_()
            else:
                p.normal_(std=p[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="module")
def ours(released):
    return VQModel.from_state_dict(released.state_dict())


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_indices_are_those_of_the_released_code(released, ours):
    x = images(2, 3, 16, 24)
    with torch.no_grad():
        want = released.encode(2 * x - 1)[2][2].view(2, -1)
        z = released.quant_conv(released.encoder(2 * x - 1)).permute(0, 2, 3, 1)
        near = (nn.functional.normalize(z, dim=-1) @ released.quantize.codes().t()).topk(2).values
    got = ours.encode(x)
    assert got.dtype == torch.int64 and got.shape == (2, 4 * 6)
    differs = (got != want).view(2, 4, 6)
    assert (near[..., 0] - near[..., 1])[differs].lt(1e-5).all() and differs.sum() <= 1
    assert len(got.unique()) > 5


def test_pictures_are_those_of_the_released_code(released, ours):
    index = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = released.decode_code(index, (2, 8, 4, 6)).add(1).div(2).clamp(0, 1)
    got = ours.decode(index, (4, 6))
    assert got.shape == (2, 3, 16, 24) and got.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert torch.equal(ours.decode(index[:1, :16]), ours.decode(index[:1, :16], (4, 4)))
    x = images(1, 3, 8, 16)
    assert torch.equal(ours.reconstruct(x), ours.decode(ours.encode(x), (2, 4)))


def test_training_has_the_released_loss(released, ours):
    x = images(2, 3, 8, 8)
    released.quantize.train()
    try:
        quant, losses, _ = released.encode(2 * x - 1)
        want = losses[0] + losses[1]
        given = torch.autograd.grad(want + released.decode(quant).sum(), released.quant_conv.weight)[0]
    finally:
        released.quantize.eval()
    got = ours(x)
    torch.testing.assert_close(got.loss, want, rtol=1e-4, atol=1e-6)
    # Pixels are half the released ones.
    grad = torch.autograd.grad(got.loss + 2 * got.reconstruction.sum(), ours.quant_conv.weight)[0]
    torch.testing.assert_close(grad, given, rtol=1e-3, atol=1e-3 * given.abs().max().item())
    codes = torch.autograd.grad(ours(x).loss, ours.quantize.embedding.weight)[0]
    assert codes.abs().sum() > 0


@pytest.mark.parametrize("levels", [(1, 1, 2, 2, 4), (1, 2, 2, 4)], ids=["VQ-16", "VQ-8"])
def test_released_sizes(levels):
    with torch.device("meta"):
        state = llamagen_vq.VQModel(ch_mult=levels).state_dict()
    assert state["quantize.embedding.weight"].shape == (16384, 8)
    assert state["encoder.conv_blocks.0.downsample.conv.weight"].shape == (128, 128, 3, 3)
    with torch.device("meta"):
        model = VQModel(ch_mult=levels)

    renamed = {k: v.shape for k, v in _renamed(state).items()}
    assert renamed == {k: v.shape for k, v in model.state_dict().items()}
    assert model.factor == 2 ** (len(levels) - 1)


def test_files_and_types(ours, tmp_path):
    tokenizers.save(ours, tmp_path / "vq.safetensors")
    again = tokenizers.load_vqmodel(tmp_path / "vq.safetensors")
    x = images(1, 3, 16, 16)
    assert torch.equal(again.encode(x), ours.encode(x)) and again.config() == ours.config()
    with pytest.raises(ValueError, match="got a VQModel"):
        tokenizers.load(tmp_path / "vq.safetensors")
    narrow = again.to(torch.bfloat16)
    assert narrow.decode(narrow.encode(x)).dtype == torch.bfloat16


def test_errors(released, ours):
    state = released.state_dict()
    with pytest.raises(ValueError, match=r"without 'quantize.embedding.weight'"):
        VQModel.from_state_dict({})
    del state["encoder.mid.1.k.weight"]
    with pytest.raises(ValueError, match=r"without 'encoder.mid.1.k.weight'"):
        VQModel.from_state_dict(state)
    with pytest.raises(ValueError, match="multiples of 4"):
        ours.encode(torch.rand(1, 3, 10, 8))
    with pytest.raises(TypeError, match="floating-point"):
        ours.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"indices \[B, 2 \* 2\]"):
        ours.decode(torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_accelerated_quantizer(l2_norm):
    torch.manual_seed(3)
    module = llamagen_vq.VectorQuantizer(60, 8, l2_norm=l2_norm).eval()
    tree, z = nn.Sequential(module), torch.randn(2, 8, 5, 7, requires_grad=True)
    want = tree(z)
    wanted = torch.autograd.grad(want[0].square().sum(), z)[0]
    with arimg.accelerate(tree) as report:
        assert [e.path for e in report.replaced] == ["0"]
        got = tree(z)
        grad = torch.autograd.grad(got[0].square().sum(), z)[0]
        tree.train()
        assert tree(z)[1][0] is not None  # training is the original's
    assert torch.equal(got[2][2], want[2][2]) and got[1] == want[1]
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(grad, wanted)


def test_a_quantizer_of_other_results_is_kept():
    class Farthest(llamagen_vq.VectorQuantizer):
        def codes(self):
            return -super().codes()

    with arimg.accelerate(nn.Sequential(Farthest(60, 8))) as report:
        assert not report.replaced and "nearest codes" in report.kept[0].note


def test_accelerated_tokenizer(released):
    x = images(1, 3, 16, 16)
    with torch.no_grad():
        want = released.encode(2 * x - 1)
        with arimg.accelerate(released) as report:
            got = released.encode(2 * x - 1)
            assert "quantize" in {e.path for e in report.replaced}
    assert (got[2][2] != want[2][2]).sum() <= 1
