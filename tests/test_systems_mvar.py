"""M-VAR: a state of constant size in place of keys and values."""

from typing import cast

import pytest
import torch

from arimg import reference
from arimg.generators.loop import Sampler, generate
from arimg.systems import find
from arimg.systems.mvar import MVAR, MvarSession
from arimg.tokenizers import VQVAE
from conftest import Backend
from system_checks import LABELS, check_rows_alone, close, same_tokens_emulated, spread, tokens_of, turns_of


@pytest.fixture(scope="module")
def model() -> MVAR:
    torch.manual_seed(0)
    tokenizer = VQVAE(40, 8, 8, (1, 1, 1, 1), [1, 2, 3, 4], blocks=1).eval()
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    made = MVAR(tokenizer, 3, depth=2, width=32, heads=2, attn_l2_norm=False, mamba_head_dim=16)
    dt = [block.get_parameter("mamba.dt_bias").detach().clone() for block in made.blocks]
    rates = [block.get_parameter("mamba.A_log").detach().clone() for block in made.blocks]
    model: MVAR = spread(made)
    with torch.no_grad():  # a memory that lasts: rates and steps as they start
        for block, step, rate in zip(model.blocks, dt, rates):
            block.get_parameter("mamba.dt_bias").copy_(step)
            block.get_parameter("mamba.A_log").copy_(rate)
    return model


def test_the_carried_state_gives_the_logits_of_the_whole_sequence(model: MVAR) -> None:
    turns = turns_of(model)
    tokens = tokens_of(turns)
    x = model.tokenizer.quantize.generator_input(tokens.split(model.layout.sizes, 1))
    forced = model(torch.tensor(LABELS), x)
    assert close(torch.cat([t.logits[:3] for t in turns], 1), forced, 2e-5)
    again = turns_of(model, carried=False)
    assert torch.equal(tokens_of(again), tokens)
    assert close(torch.cat([t.logits[:3] for t in again], 1), forced, 2e-5)


def test_a_scale_sees_the_earlier_ones_through_the_state_alone(model: MVAR) -> None:
    x = torch.randn(1, model.layout.length - 1, 8, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, 0] += 1.0  # of the second scale, tokens 1..4
    base, changed = (model(torch.tensor([0]), t) for t in (x, other))
    moved = (base != changed).any(-1)[0]
    assert not moved[0] and moved[1:5].all() and moved[5:].any()
    for block in model.blocks:  # without the mixer nothing reaches another scale
        block.get_parameter("mamba.out_proj.weight").data.zero_()
    base, changed = (model(torch.tensor([0]), t) for t in (x, other))
    moved = (base != changed).any(-1)[0]
    spread(model)
    assert moved[1:5].all() and not moved[5:].any() and not moved[0]


def test_what_is_carried_does_not_grow(model: MVAR) -> None:
    def sizes(carried: bool) -> list[int]:
        found = []
        for t in generate(model, torch.tensor([0, 1]), seed=0, carried=carried):
            found.append(cast(MvarSession, t.run.session).nbytes)
        return found

    constant, growing = sizes(True), sizes(False)
    assert len(set(constant)) == 1 and constant[0] > 0
    assert [n // growing[0] for n in growing] == [1, 5, 14, 30]


def test_rows_are_independent_and_repeat(model: MVAR) -> None:
    check_rows_alone(model)


def test_the_same_draws_on_every_backend(backend: Backend, model: MVAR) -> None:
    for t in turns_of(model.to(backend.device), [1]):
        settings = t.run.sampler.settings(t)
        drawn = reference.sample(t.logits.cpu(), seed=torch.tensor([9]), position=t.position, **settings)
        assert torch.equal(drawn, t.drawn.cpu())


def test_it_trains() -> None:
    torch.manual_seed(1)
    tokenizer = VQVAE(8, 4, 8, (1, 1, 1), [1, 2], blocks=1).eval()
    model = MVAR(tokenizer, 2, depth=1, width=32, heads=2, mamba_head_dim=16).train()
    examples = torch.randint(8, (8, 5))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 5e-3), []
    for _ in range(40):
        loss = model.loss(examples, torch.arange(8) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_full_size_pairs_and_refusals() -> None:
    with torch.device("meta"):
        big = MVAR(VQVAE(), 1000, depth=16, attn_l2_norm=False)
    shapes = {k: tuple(v.shape) for k, v in big.state_dict().items()}
    assert shapes["blocks.15.ada_lin.1.weight"] == (9 * 1024, 1024)
    # z, x, B, C and dt of 32 heads, with a state of 64 and an expansion of 2
    assert shapes["blocks.0.mamba.in_proj.weight"] == (2 * 2048 + 2 * 64 + 32, 1024)
    assert shapes["blocks.0.mamba.conv1d.weight"] == (2048 + 128, 1, 4)
    pairs = {rule: big.layout.visibility(rule).density for rule in ("level-diagonal", "level-causal")}
    assert abs(pairs["level-diagonal"] - 0.239) < 1e-3 and abs(pairs["level-causal"] - 0.62) < 1e-3
    with pytest.raises(ValueError, match="expected shared_adaln=False, got True"):
        MVAR(VQVAE(8, 4, 8, (1, 1), [1, 2], blocks=1), 1, depth=1, width=64, heads=2, shared_adaln=True)
    assert find("mvar").title == "M-VAR"


def test_the_whole_model_draws_the_same_on_emulated_cuda(model: MVAR) -> None:
    same_tokens_emulated(model)
    same_tokens_emulated(model, sampler=Sampler(top_k=1))
