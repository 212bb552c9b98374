"""Mixers with a carried state: whole sequence = step by step, and the formulas of the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg.nn.state_mixers import HybridLinearAttention, Mamba2
from test_attention_linear import per_image
from test_attention_ssd import recurrence

SCALES = [1, 4, 9, 16]  # M-VAR's tokens per scale


@pytest.fixture(params=[1, 2])
def mixer(request):
    torch.manual_seed(0)
    return Mamba2(32, state=16, head_dim=16, groups=request.param)


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_mamba2_scale_by_scale_equals_the_whole(mixer):
    x = inputs(2, sum(SCALES), 32)
    whole, last = mixer(x)
    carried, parts = None, []
    for part in x.split(SCALES, 1):
        y, carried = mixer(part, carried)
        parts.append(y)
        assert carried.scan.shape == last.scan.shape == (2, 4, 16, 16)  # whatever has been seen
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5
    assert (carried.scan - last.scan).abs().max() < 1e-5
    assert (carried.tail - last.tail).abs().max() < 1e-6  # a projection of other row counts


@torch.no_grad()
def test_mamba2_is_its_formula(mixer):
    x = inputs(2, 11, 32)
    z, mixed, dt = F.linear(x, mixer.in_proj.weight).split((64, 64 + 32 * mixer.groups, 4), -1)
    channels = mixed.shape[2]
    conv = F.conv1d(
        F.pad(mixed.transpose(1, 2), (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=channels
    )
    value, B, C = F.silu(conv).transpose(1, 2).split((64, 16 * mixer.groups, 16 * mixer.groups), -1)
    B, C = (t.unflatten(2, (mixer.groups, 16)) for t in (B, C))
    dt, A = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp()
    y, _ = recurrence(value.unflatten(2, (4, 16)), dt, A, B, C, mixer.D, torch.zeros(2, 4, 16, 16))
    y = (y.flatten(2) * F.silu(z)).unflatten(2, (mixer.groups, -1))
    y = (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2) * mixer.norm.weight
    assert (mixer(x)[0] - F.linear(y, mixer.out_proj.weight)).abs().max() < 1e-5


def test_mamba2_has_the_released_parameter_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in Mamba2(1024).state_dict().items()}
    assert shapes == {
        "dt_bias": (32,),
        "A_log": (32,),
        "D": (32,),
        "in_proj.weight": (4256, 1024),
        "conv1d.weight": (2176, 1, 4),
        "conv1d.bias": (2176,),
        "norm.weight": (2048,),
        "out_proj.weight": (1024, 2048),
    }


def test_mamba2_trains(mixer):
    x = inputs(1, 9, 32)
    y, carried = mixer(x)
    (y.square().sum() + carried.scan.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixer.parameters())


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return HybridLinearAttention(32, 2)


@torch.no_grad()
def test_hybrid_attention_image_by_image_equals_the_whole(attention):
    x, condition = inputs(2, 2, 48, 32)
    whole, last = attention(x, condition, chunk=16)
    state, parts = None, []
    for a, b in zip(x.split(16, 1), condition.split(16, 1)):
        y, state = attention(a, b, state)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 and (state - last).abs().max() < 1e-5


@torch.no_grad()
def test_hybrid_attention_is_its_formula(attention):
    x, condition = inputs(2, 2, 32, 32)

    def rms(t):
        return t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def heads(proj):
        return rms(F.linear(x, proj.weight)).unflatten(2, (2, 16)).transpose(1, 2)

    q, k, v = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    gate = F.logsigmoid(F.linear(x + condition, attention.gt_proj.weight)).transpose(1, 2) / 16
    out, _ = per_image(q, k, v, gate, torch.zeros(2, 2, 16, 16), 16)
    gated = F.silu(F.linear(x, attention.g_proj.weight)) * rms(out).transpose(1, 2).flatten(2)
    want = F.linear(gated, attention.out_proj.weight)
    assert (attention(x, condition, chunk=16)[0] - want).abs().max() < 1e-5


def test_hybrid_attention_trains_and_has_the_released_names(attention):
    x, condition = inputs(2, 1, 32, 32)
    y, _ = attention(x, condition, chunk=16)
    y.square().sum().backward()
    names = {name for name, p in attention.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {f"{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "g_proj", "gt_proj", "out_proj")}
