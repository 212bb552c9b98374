"""What arimg.accelerate promises for every model it knows, one test for each promise over all stand-ins."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import arimg
import test_accelerate
import test_accelerate_llamagen
from arimg.accelerate.swap import is_swapped
from arimg.accelerate.view import parameters_of


@dataclass(frozen=True)
class Subject:
    """make(seed) -> a model in evaluation; use(model) -> a float result of what is accelerated in it."""

    make: Callable[..., nn.Module]
    use: Callable[[Any], torch.Tensor]
    near: float = 1e-4  # of a float32 result
    half_near: float = 0.05  # mean, of a bfloat16 result
    autocasts: bool = True  # whether the original itself runs under autocast
    called: Callable[[Any], torch.Tensor] | None = None  # a short use through the forward of `module`
    module: str = ""
    part: str = ""  # what the use runs through, with what is accelerated around it


def var_and_tokenizer(seed=0):
    model, _ = test_accelerate.make(depth=1)  # half the time to compile
    with torch.no_grad():
        model.head.weight.mul_(1 + seed)
    return model


def tokenizer(seed=0):
    return test_accelerate.make()[1]


def decoded(vae):
    rng = torch.Generator().manual_seed(3)
    dtype = vae.post_quant_conv.weight.dtype
    return vae.fhat_to_img(torch.randn(2, 8, 4, 4, generator=rng).to(dtype)).float()


def scored(model):
    """Logits of given tokens, one at a time, from the model's caches."""
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
    return test_accelerate_llamagen.scored(model, tokens).float()


def replicated(model):
    """What DataParallel makes of a model for one device: copies of its weights as plain attributes."""
    modules = dict(model.named_modules())
    replicas = {path: module._replicate_for_data_parallel() for path, module in modules.items()}
    for path, module in modules.items():
        replica = replicas[path]
        replica._former_parameters = {}
        for name in module._modules:
            setattr(replica, name, replicas[f"{path}.{name}".lstrip(".")])
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                copied = p.detach().clone()
                setattr(replica, name, copied)
                replica._former_parameters[name] = copied
        for name, b in module._buffers.items():
            setattr(replica, name, b.clone())
    return replicas[""]


def labelled(model):
    """Logits of a VAR through its forward."""
    x = torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(3))
    return test_accelerate.scored(model, x)


def first_steps(model):
    tokens = torch.tensor([[3, 4], [5, 6]])
    return test_accelerate_llamagen.scored(model, tokens)


def half_decoded(vae):
    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(3))
    return vae.decoder.mid.block_1(x)


SUBJECTS = {
    # greedy pictures: a rounding of bfloat16 may choose another token
    "VAR": Subject(
        var_and_tokenizer, test_accelerate.greedy, half_near=0.2, called=labelled, part="blocks.0.ffn"
    ),
    "VAR's tokenizer": Subject(
        tokenizer, decoded, called=half_decoded, module="decoder.mid.block_1", part="decoder.mid.block_1"
    ),
    "LlamaGen": Subject(
        test_accelerate_llamagen.make, scored, autocasts=False, called=first_steps, part="layers.1.attention"
    ),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]


def near(got, want, subject):
    return got.shape == want.shape and torch.allclose(got, want, atol=subject.near, rtol=1e-3)


@torch.no_grad()
def test_restore_is_bit_identical_and_the_state_dict_stays(subject):
    model = subject.make()
    want = subject.use(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = arimg.accelerate(model)
    assert report.replaced and near(subject.use(model), want, subject)
    now = model.state_dict()
    assert now.keys() == state.keys()
    report.restore()
    assert torch.equal(subject.use(model), want)
    weights = dict(model.named_parameters())
    assert all(torch.equal(now[k], state[k]) for k in weights)


def test_inference_mode(subject):
    model = subject.make()
    with torch.inference_mode():
        want = subject.use(model)
        with arimg.accelerate(model):
            assert near(subject.use(model), want, subject)


@torch.no_grad()
def test_autocast_is_as_near_as_the_original_s(subject):
    model = subject.make()
    want = subject.use(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not subject.autocasts:  # its caches have the weights' type, its keys autocast's
            with arimg.accelerate(model), pytest.raises(RuntimeError, match="dtypes match"):
                subject.use(model)
            return
        peer = (subject.use(model) - want).abs().mean()
        with arimg.accelerate(model):
            ours = (subject.use(model) - want).abs().mean()
    assert ours <= 2 * peer + 0.02


@torch.no_grad()
def test_casts_after_acceleration(subject):
    model = subject.make()
    want = subject.use(model)
    with arimg.accelerate(model):
        for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)):
            cast(model)
            assert (subject.use(model) - want).abs().mean() < subject.half_near
            model.float()  # the weights stay rounded
            assert (subject.use(model) - want).abs().mean() < subject.half_near
        model.half()
        assert subject.use(model).isfinite().all()
        model.float().to("cpu")


@torch.no_grad()
def test_state_dicts_load_after_acceleration(subject):
    model, other = subject.make(), subject.make(1)
    want = subject.use(other)
    state = {k: v for k, v in other.state_dict().items() if "kv_cache" not in k}
    for assign in (False, True):
        model = subject.make()
        with arimg.accelerate(model):
            subject.use(model)
            model.load_state_dict(state, strict=False, assign=assign)
            model.requires_grad_(False)
            assert near(subject.use(model), want, subject)


@torch.no_grad()
def test_copies(subject):
    model = subject.make()
    with arimg.accelerate(model):
        want = subject.use(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert any(is_swapped(m) for m in twin.modules())
            assert torch.equal(subject.use(twin), want)
            next(p for p in twin.parameters() if p.dim() > 1).zero_()
            assert torch.equal(subject.use(model), want)


@torch.no_grad()
def test_replicas_of_data_parallel(subject):
    """They are accelerated, have weights of their own and leave the model's alone."""
    model = subject.make()
    with arimg.accelerate(model):
        want = subject.use(model)
        replica = replicated(model)
        assert type(replica) is type(model) and any(is_swapped(m) for m in replica.modules())
        assert near(subject.use(replica), want, subject)
        for p in parameters_of(replica.get_submodule(subject.part)).values():
            p.zero_()
        assert not near(subject.use(replica), want, subject)
        assert torch.equal(subject.use(model), want)


@torch.no_grad()
def test_a_compiled_call_agrees(subject):
    model = subject.make()
    with arimg.accelerate(model):
        want = subject.called(model)
        torch._dynamo.reset()
        assert near(torch.compile(subject.called, backend="eager")(model), want, subject)
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_are_called(subject):
    """On the accelerated module, and on a part of it, where the original runs."""
    model = subject.make()
    want = subject.use(model), subject.called(model)
    calls = []
    with arimg.accelerate(model):
        handle = model.get_submodule(subject.module).register_forward_hook(lambda *_: calls.append("module"))
        assert near(subject.called(model), want[1], subject) and set(calls) == {"module"}
        handle.remove()
        handle = model.get_submodule(subject.part).register_forward_hook(lambda *_: calls.append("part"))
        assert near(subject.use(model), want[0], subject) and "part" in calls
        handle.remove()
        calls.clear()
        assert near(subject.use(model), want[0], subject) and not calls
