"""The tokenizer: released names and shapes, encode and decode, training forward, files and error messages."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import reference, tokenizers
from arimg.nn.scale_quantizer import nearest_tick
from arimg.tokenizers import SCALES_512, VQVAE

Shapes = dict[str, tuple[int, ...]]


def randomise(module: nn.Module, seed: int) -> None:
    """Weights at which every part matters: normal with unit gain, random biases and codes of unit size."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            codes = name == "quantize.embedding.weight"
            std = 0.1 if p.dim() == 1 else 1.0 if codes else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=g) * std + (p.dim() == 1 and "norm" in name))


def small(**options: object) -> VQVAE:
    arguments = {
        "vocab_size": 64,
        "z_channels": 8,
        "ch": 16,
        "ch_mult": (1, 2),
        "scales": (1, 2, 4),
        "blocks": 1,
    }
    model = VQVAE(**(arguments | options)).eval()
    randomise(model, 1)
    return model


def images(model: VQVAE, batch: int = 3) -> Tensor:
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(7))


def conv(name: str, c_in: int, c_out: int, k: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, k, k), f"{name}.bias": (c_out,)}


def norm(name: str, c: int) -> Shapes:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def resnet(name: str, c_in: int, c_out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", c_in) | conv(f"{name}.conv1", c_in, c_out)
    shapes |= norm(f"{name}.norm2", c_out) | conv(f"{name}.conv2", c_out, c_out)
    return shapes | (conv(f"{name}.nin_shortcut", c_in, c_out, 1) if c_in != c_out else {})


def attention(name: str, c: int) -> Shapes:
    return norm(f"{name}.norm", c) | conv(f"{name}.qkv", c, 3 * c, 1) | conv(f"{name}.proj_out", c, c, 1)


def middle(name: str, c: int) -> Shapes:
    shapes = resnet(f"{name}.block_1", c, c) | attention(f"{name}.attn_1", c)
    return shapes | resnet(f"{name}.block_2", c, c)


def released_shapes() -> Shapes:
    """Names and shapes of vae_ch160v4096z32.pth: widths 160, 160, 320, 320, 640."""
    widths, z = [160, 160, 320, 320, 640], 32
    s: Shapes = {"quantize.ema_vocab_hit_SV": (10, 4096), "quantize.embedding.weight": (4096, z)}
    for i in range(4):
        s |= conv(f"quantize.quant_resi.qresi_ls.{i}", z, z)
    s |= conv("quant_conv", z, z) | conv("post_quant_conv", z, z)
    s |= conv("encoder.conv_in", 3, 160) | middle("encoder.mid", 640)
    s |= norm("encoder.norm_out", 640) | conv("encoder.conv_out", 640, z)
    s |= conv("decoder.conv_in", z, 640) | middle("decoder.mid", 640)
    s |= norm("decoder.norm_out", 160) | conv("decoder.conv_out", 160, 3)
    for i, w in enumerate(widths):
        for j in range(2):
            s |= resnet(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else w, w)
            s |= attention(f"encoder.down.{i}.attn.{j}", w) if i == 4 else {}
        for j in range(3):
            s |= resnet(f"decoder.up.{i}.block.{j}", widths[min(i + 1, 4)] if j == 0 else w, w)
            s |= attention(f"decoder.up.{i}.attn.{j}", w) if i == 4 else {}
        s |= conv(f"encoder.down.{i}.downsample.conv", w, w) if i < 4 else {}
        s |= conv(f"decoder.up.{i}.upsample.conv", w, w) if i > 0 else {}
    return s


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        model = VQVAE()
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == released_shapes()
    assert model.image_size == (256, 256)


@pytest.mark.parametrize("shared_phi", [0, 1, 2, 4])
def test_from_state_dict_reads_the_sizes(shared_phi: int) -> None:
    model = small(shared_phi=shared_phi, ch_mult=(1, 2, 2), blocks=2)
    state = model.state_dict()
    twin = VQVAE.from_state_dict(state, scales=(1, 2, 4))
    assert twin.config() == model.config() and not twin.training
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), state.values()))
    del state["quantize.ema_vocab_hit_SV"]  # belongs to training
    assert not VQVAE.from_state_dict(state, scales=(1, 2, 4)).quantize.ema_vocab_hit_SV.any()


def test_phi_is_chosen_by_the_nearest_tick() -> None:
    """Ten scales at k / 9 against the ticks 1/12, 13/36, 23/36, 11/12 and, for other counts, 1/(2n), ...

    Scales 2 and 7 lie midway between two ticks: the rounding of float64 decides, as in the released model.
    """
    assert [nearest_tick(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [nearest_tick(k, 10, 10) for k in range(10)] == list(range(10))
    assert [nearest_tick(k, 4, 2) for k in range(4)] == [0, 0, 1, 1]
    assert nearest_tick(0, 1, 4) == 0


@pytest.mark.parametrize("cosine", [False, True])
def test_encode_and_decode_agree_with_the_training_forward(cosine: bool) -> None:
    model = small(cosine=cosine)
    x = images(model)
    with torch.no_grad():
        out = model(x)
    indices = model.encode(x)
    assert [tuple(i.shape) for i in indices] == [(3, 1), (3, 4), (3, 16)]
    assert all(torch.equal(a, b) for a, b in zip(indices, out.indices))
    assert len(torch.cat(indices, 1).unique()) > 8
    assert torch.allclose(model.decode(indices), out.reconstruction.clamp(0, 1), atol=1e-5)
    assert torch.equal(model.reconstruct(x), model.decode(indices))
    for b in range(3):
        alone = model.encode(x[b : b + 1])
        assert all(torch.equal(i[b : b + 1], a) for i, a in zip(indices, alone))


def test_loss_is_the_formula_and_has_its_gradients() -> None:
    model = small().double()
    f = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    f.requires_grad_()
    out = model.float().quantize(f)
    sums = [model.quantize.features(out.indices[: k + 1]) for k in range(3)]
    mse = torch.stack([F.mse_loss(s, f.detach()) for s in sums]).mean()
    assert torch.allclose(out.loss, 1.25 * mse, rtol=1e-5)
    # commitment pulls f to every partial sum; the other term reaches the codes and not f
    out.loss.backward()
    expected = sum(0.25 * 2 * (f.detach() - s) / f.numel() for s in sums) / 3
    assert torch.allclose(f.grad, expected, atol=1e-7)
    used = torch.cat(out.indices, 1).unique()
    touched = model.quantize.embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(touched, used)
    f.grad = None
    model.quantize(f).f_hat.mul(3).sum().backward()
    assert torch.equal(f.grad, torch.full_like(f, 3))


def test_generator_input_is_the_running_sum_averaged_down() -> None:
    model = small()
    indices = model.encode(images(model))
    x = model.quantize.generator_input(indices)
    assert x.shape == (3, 4 + 16, 8)
    for k, part in ((1, x[:, :4]), (2, x[:, 4:])):
        f_hat = model.quantize.features(indices[:k])
        small_map = reference.area_down(f_hat, model.scales[k])
        assert torch.allclose(part, small_map.flatten(2).transpose(1, 2), atol=1e-6)


def test_other_schedules_share_the_weights() -> None:
    with torch.device("meta"):
        model = VQVAE()
        large = model.with_scales(SCALES_512)
    assert large.image_size == (512, 512) and model.image_size == (256, 256)
    assert large.decoder is model.decoder and large.quantize.embedding is model.quantize.embedding
    with pytest.raises(ValueError, match=r"expected 10 scales, got 3"):
        model.with_scales((1, 2, 3))


def test_files(tmp_path: Path) -> None:
    model = small()
    tokenizers.save(model, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    twin = tokenizers.load(tmp_path / "a.safetensors")
    x = images(model)
    assert twin.config() == model.config() and torch.equal(twin.reconstruct(x), model.reconstruct(x))
    with pytest.raises(ValueError, match=r"expected scales=\(...\) with 3 entries"):
        tokenizers.load(tmp_path / "b.pth")
    tokenizers.save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "a.safetensors").stat().st_size
    assert tokenizers.load(tmp_path / "half.safetensors").quant_conv.weight.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"which does not exist"):
        tokenizers.load(tmp_path / "none.safetensors")


def test_errors_name_what_is_wrong() -> None:
    model = small()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 8, 8\], got \[1, 3, 9, 8\]"):
        model.encode(torch.rand(1, 3, 9, 8))
    with pytest.raises(TypeError, match=r"floating-point images"):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected indices \[B, 4\] for scale 2x2, got \[1, 5\]"):
        model.decode([torch.zeros(1, 1).long(), torch.zeros(1, 5).long()])
    with pytest.raises(ValueError, match=r"without 'quantize.embedding.weight'"):
        VQVAE.from_state_dict({"head.weight": torch.zeros(2, 2)})
    bad = state | {"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}
    with pytest.raises(ValueError, match=r"decoder.conv_out.weight: expected .*, got \[3, 5, 3, 3\]"):
        VQVAE.from_state_dict(bad, scales=(1, 2, 4))
    del bad["decoder.conv_out.weight"]
    with pytest.raises(ValueError, match=r"decoder.conv_out.weight: missing"):
        VQVAE.from_state_dict(bad, scales=(1, 2, 4))
