"""arimg.accelerate on a stand-in of the text-conditional LlamaGen, whose loop changes the causal mask."""

from __future__ import annotations

import copy

import pytest
import torch

import arimg
import test_accelerate_llamagen
from standins import llamagen as standin
from test_accelerate_graphs import Recorder
from test_accelerate_llamagen import steps  # noqa: F401 (a fixture)

PLACES, TOKENS = 6, 25
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
MASKS = {
    "left": LEFT,
    "left, alike": LEFT[:1].expand(3, -1),
    "right": LEFT.flip(1),
    "full": torch.ones(3, PLACES),
    "none": None,
    "no text": torch.zeros(3, PLACES, dtype=torch.bool),
    "a gap": torch.tensor([[1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]),
}


def make(seed=0, **options):
    return test_accelerate_llamagen.make(seed, model_type="t2i", cls_token_num=PLACES, **options)


def texts(seed=0):
    return torch.randn(3, PLACES, 12, generator=torch.Generator().manual_seed(seed))


def greedy(model, mask, cfg_scale=3.0, tokens=TOKENS):
    return standin.generate(model, texts(), tokens, cfg_scale, emb_masks=mask)


def scored(model, tokens, mask):
    with torch.no_grad():
        model.setup_caches(3, PLACES + TOKENS, model.tok_embeddings.weight.dtype)
        if mask is not None:
            standin.hide(model, mask)
        out = [model(None, texts().to(model.norm.weight), torch.arange(PLACES))[0][:, -1:]]
        for t in range(tokens.shape[1] - 1):
            at = torch.tensor([PLACES + t], dtype=torch.int)
            out.append(model(tokens[:, t : t + 1], cond_idx=None, input_pos=at)[0])
    return torch.cat(out, 1)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", MASKS)
def test_an_unmodified_loop_gives_the_same_tokens(steps, name, cfg_scale):  # noqa: F811
    model, mask = make(), MASKS[name]
    want = greedy(model, mask, cfg_scale)
    logits = scored(model, want, mask)
    assert len(want.unique()) > 5 and steps[0] == 0
    with arimg.accelerate(model) as report:
        assert torch.equal(greedy(model, mask, cfg_scale), want) and steps[0] == TOKENS - 1
        assert (scored(model, want, mask) - logits).abs().max() < 1e-4
        assert "the original for the text, and for masks not causal" in str(report)
        with torch.inference_mode():
            assert torch.equal(greedy(model, mask, cfg_scale), want)
        twin, steps[0] = copy.deepcopy(model), 0
        assert torch.equal(greedy(twin, mask, cfg_scale), want) and steps[0] == TOKENS - 1
    assert torch.equal(scored(model, want, mask), logits)


def test_masks_of_one_model_differ_and_others_run_the_original(steps):  # noqa: F811
    model = make()
    want = {name: greedy(model, mask) for name, mask in MASKS.items()}
    assert not torch.equal(want["left"], want["full"]) and torch.equal(want["none"], want["full"])
    holes = torch.tensor([[1, 0, 1, 0, 1, 1]]).expand(3, -1)
    original = greedy(model, holes)
    with arimg.accelerate(model):
        for name, mask in MASKS.items():
            assert torch.equal(greedy(model, mask), want[name])
        steps[0] = 0
        assert torch.equal(greedy(model, holes), original) and steps[0] == 0
        # A mask that changes inside a picture is looked at again: here the diagonal is missing.
        tokens = want["left"]
        scored(model, tokens[:, :5], LEFT)
        model.causal_mask[:, :, 3] = False
        steps[0] = 0
        with torch.no_grad():
            got = model(tokens[:, 4:5], None, torch.tensor([PLACES + 4]))[0]
        assert steps[0] == 0 and not torch.allclose(got, scored(model, tokens, LEFT)[:, 5:6], atol=1e-3)


@pytest.mark.parametrize("name", ["left", "right", "none"])
def test_graphs_and_codes(steps, name):  # noqa: F811
    model, mask, backend = make(), MASKS[name], Recorder()
    other = None if mask is None else mask.roll(1, 0)  # the next picture hides other places
    want, wanted = greedy(model, mask), greedy(model, other)
    with arimg.accelerate(model, graphs=backend):
        assert torch.equal(greedy(model, mask), want)
        assert torch.equal(greedy(model, other), wanted)
        assert torch.equal(greedy(model, mask), want)
        assert (backend.recorded, backend.replayed) == (1, 23 + 24 + 24)
        others = [greedy(model, MASKS[kind]) for kind in ("full", "left", "right")]
    assert all(
        torch.equal(a, greedy(model, MASKS[kind])) for a, kind in zip(others, ("full", "left", "right"))
    )
    with arimg.accelerate(model, weights="int8") as report:
        steps[0] = 0
        near = scored(model, want, mask)
        assert steps[0] == TOKENS - 1 and report.memory > 0
    error = (near - scored(model, want, mask))[:, 1:].square().mean().sqrt()
    assert 1e-3 < error / near.std() < 0.1


def test_bfloat16_is_as_near_to_float32_as_the_original(steps):  # noqa: F811
    model = make()
    tokens = greedy(model, LEFT)
    want = scored(model, tokens, LEFT)
    peer = (scored(model.bfloat16(), tokens, LEFT) - want).abs().mean()
    with arimg.accelerate(model):
        ours = (scored(model, tokens, LEFT) - want).abs().mean()
    assert steps[0] == TOKENS - 1 and 0 < ours < peer
