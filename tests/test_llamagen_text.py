"""LlamaGen from captions: released names and shapes, a stand-in of the released network and its masks, cached
generation against teacher forcing, padding, error messages.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arimg.generators import Captions, Jacobi, Sampler, TextLlamaGen, final_tokens, generate
from arimg.guidance import Guidance
from standins import llamagen as standin

GRID, PLACES, TEXT = 4, 6, 12


@pytest.fixture(scope="module")
def model() -> TextLlamaGen:
    m = TextLlamaGen(
        50, PLACES, TEXT, 2, 64, 4, hidden=96, grid=GRID, dropout=0.0, class_dropout=0.0
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        m.cls_embedding.uncond_embedding.normal_(generator=g)
        for p in m.parameters():
            if p.dim() == 2:
                p.normal_(std=1.5 * p.shape[1] ** -0.5, generator=g)
            else:
                p.normal_(mean=1.0, std=0.5, generator=g)
    return m.eval()


def captions(lengths: tuple[int, ...] = (6, 2, 4), seed: int = 0) -> Captions:
    """As a text encoder gives them: what counts comes first."""
    states = torch.randn(len(lengths), PLACES, TEXT, generator=torch.Generator().manual_seed(seed))
    return Captions(states, torch.arange(PLACES) < torch.tensor(lengths)[:, None])


def tokens(batch: int, n: int) -> Tensor:
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(1))


def released_logits(model: TextLlamaGen, given: Captions, index: Tensor) -> Tensor:
    """The stand-in's, for captions moved to the end of their places and the mask of the released loop."""
    args = standin.ModelArgs(
        n_layer=2, block_size=GRID * GRID, hidden=96, vocab_size=50, cls_token_num=PLACES, dropout=0.0,
        model_type="t2i", caption_dim=TEXT,
    )  # fmt: skip
    theirs = standin.Transformer(args)
    theirs.load_state_dict(model.state_dict())
    states, mask = given
    states = torch.stack([s.roll(PLACES - int(m.sum()), 0) for s, m in zip(states, mask)])
    mask = mask.flip(1)
    length = PLACES + index.shape[1]
    seen = torch.ones(length, length).tril().repeat(len(states), 1, 1)
    seen[:, :, :PLACES] *= mask[:, None]
    eye = torch.eye(length)
    seen = (seen * (1 - eye) + eye).bool()[:, None]
    with torch.no_grad():
        logits, _ = theirs.eval()(index, states * mask[..., None], torch.arange(length), mask=seen)
    return logits[:, PLACES - 1 :]


def test_logits_are_those_of_the_released_code(model):
    given, index = captions(), tokens(3, 10)
    with torch.no_grad():
        got = model(given, index)
    want = released_logits(model, given, index)
    assert got.shape == (3, 11, 50) and want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("lengths", [(6, 2, 4), (3, 3), (6, 6)])
def test_cached_generation_is_teacher_forcing(model, cfg, lengths):
    given = captions(lengths)
    got = model.generate(*given, cfg=cfg, top_k=1)
    assert got.shape == (len(lengths), GRID * GRID) and got.dtype == torch.int64
    nothing = model.with_unconditional(model.labels(given), True)
    with torch.no_grad():
        logits = model(given, got[:, :-1])
        states, mask = (t[len(lengths) :] for t in nothing)
        other = model(Captions(states, mask), got[:, :-1])
    law = other + cfg * (logits - other) if cfg > 1 else logits
    best = law.topk(2).values
    assert ((law.argmax(-1) == got) | (best[..., 0] - best[..., 1] < 1e-4)).all()


def test_what_the_mask_hides_does_not_matter(model):
    given = captions()
    changed = torch.where(given.mask[..., None], given.states, torch.nan)
    want = model.generate(*given, seed=5)
    assert torch.equal(model.generate(changed, given.mask, seed=5), want)
    assert not torch.equal(model.generate(given.states, seed=5), want)  # all of it counts
    # Fewer places, or padding in front already: the same caption.
    short = Captions(given.states[1:2, :2])
    assert torch.equal(model.generate(*short, seed=6), want[1:2])
    at_end = Captions(given.states[1:2].roll(4, 1), given.mask[1:2].roll(4, 1))
    assert torch.equal(model.generate(*at_end, seed=6), want[1:2])


def test_guidance_of_the_first_tokens_and_speculation(model):
    given = captions()
    some = model.generate(*given, cfg=3.0, cfg_interval=2, seed=1)
    assert torch.equal(some[:, :4], model.generate(*given, cfg=3.0, seed=1)[:, :4])
    assert not torch.equal(some, model.generate(*given, cfg=3.0, seed=1))
    greedy = Sampler(Guidance(3.0), top_k=1)
    drafted = generate(model, given, sampler=greedy, commit=Jacobi(4))
    assert torch.equal(torch.cat(final_tokens(drafted), 1), model.generate(*given, cfg=3.0, top_k=1))


def test_training(model):
    m = TextLlamaGen.from_state_dict(model.state_dict(), heads=4, grid=GRID, dropout=0.0, class_dropout=1.0)
    given, index = captions(), tokens(3, 10)
    m.train()
    nothing = Captions(m.cls_embedding.uncond_embedding.expand(3, -1, -1), given.mask.flip(1))
    assert torch.equal(m(given, index), m(nothing, index))
    m.class_dropout = 0.0
    m(given, index).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


def test_released_sizes():
    with torch.device("meta"):
        state = TextLlamaGen(grid=16).state_dict()
    assert state["cls_embedding.uncond_embedding"].shape == (120, 2048)
    assert state["cls_embedding.cap_proj.fc1.weight"].shape == (1280, 2048)
    assert state["cls_embedding.cap_proj.fc2.weight"].shape == (1280, 1280)
    assert state["layers.35.feed_forward.w1.weight"].shape == (3584, 1280)
    assert state["output.weight"].shape == (16384, 1280)
    assert not any("embedding_table" in name for name in state)


def test_state_dict_and_config(model):
    again = TextLlamaGen.from_state_dict(model.state_dict(), heads=4, grid=GRID)
    assert torch.equal(again.generate(*captions(), seed=2), model.generate(*captions(), seed=2))
    third = TextLlamaGen(**model.config())
    third.load_state_dict(model.state_dict())
    assert third.config() == model.config()
    narrow = TextLlamaGen.from_state_dict(
        {k: v.bfloat16() for k, v in model.state_dict().items()}, heads=4, grid=GRID
    )
    assert narrow.generate(*captions(), tokens=3).shape == (3, 3)


def test_errors(model):
    states = captions().states
    with pytest.raises(ValueError, match=r"states \[B, T <= 6, 12\], got \[3, 7, 12\]"):
        model.generate(torch.zeros(3, 7, 12))
    with pytest.raises(ValueError, match=r"states \[B, T <= 6, 12\]"):
        model.generate(states[..., :5])
    with pytest.raises(ValueError, match=r"expected mask \[3, 6\], got \[3, 5\]"):
        model.generate(states, torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected indices \[3, n < 16\]"):
        model(states, tokens(2, 3))
    with pytest.raises(ValueError, match="uncond_embedding"):
        TextLlamaGen.from_state_dict(
            {k: v for k, v in model.state_dict().items() if "uncond" not in k}, heads=4
        )
