"""VF prompt: a prefix read at once or in pieces, prompts of the right class, the same logits with caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import system_checks as checks
from arimg.generators.loop import Sampler
from arimg.systems import find
from arimg.systems.vf_prompt import PICTURES, VfPromptModel

SMALL = {"depth": 2, "width": 32, "heads": 2, "hidden": 48, "dropout": 0.0, "class_dropout": 0.0}


def model(kind: str = "class") -> VfPromptModel:
    """Pictures of class c hold codes of 10 c to 10 c + 9."""
    m = checks.spread(VfPromptModel(checks.tokenizer(), 3, kind=kind, prompt=6, **SMALL))
    labels = torch.arange(60) % 3
    pictures = torch.randint(10, (60, 16), generator=torch.Generator().manual_seed(2)) + 10 * labels[:, None]
    m.remember(pictures, labels)
    return m


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return checks.tokens_of(checks.turns_of(model()))


@pytest.mark.parametrize("kind", ["class", "universal"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_prefix_in_pieces_gives_the_same_logits(kind: str, chunk: int) -> None:
    m = model(kind)
    whole = checks.turns_of(m)
    given = [turn.drawn for turn in whole]
    pieces = checks.turns_of(m, chunk=chunk, given=given)
    assert checks.close(torch.cat([t.logits for t in pieces], 1), torch.cat([t.logits for t in whole], 1))
    session = pieces[-1].run.session
    assert session.caches[0].length == 1 + 6 + 15


@pytest.mark.parametrize("kind", ["class", "universal"])
def test_cached_logits_equal_teacher_forced_ones(kind: str) -> None:
    m = model(kind)
    turns = checks.turns_of(m)
    labels = torch.tensor([*checks.LABELS, -1, -1, -1])
    with torch.no_grad():
        forced = m(labels, checks.tokens_of(turns)[:, :-1].repeat(2, 1))
    assert checks.close(torch.cat([t.logits for t in turns], 1), forced)


def test_prompts_are_pictures_of_the_class_or_random_codes() -> None:
    m, labels = model(), torch.tensor([0, 1, 2, 2])
    several = [m.prompts(labels, seed) for seed in range(20)]
    for prompts in several:
        assert torch.equal(prompts // 10, labels[:, None].expand(-1, 6))
        assert torch.equal(prompts[2], prompts[3])  # shared by the rows of a class
    assert len({tuple(p[0].tolist()) for p in several}) > 5
    assert m.seen.tolist() == [20, 20, 20, 60] and m.bank.shape == (4, PICTURES, 6)
    codes = torch.cat([model("universal").prompts(labels, seed) for seed in range(40)])
    assert codes.min() >= 0 and codes.max() < 40 and len(codes.unique()) > 30
    unseen = VfPromptModel(checks.tokenizer(), 3, prompt=6, **SMALL).prompts(labels)
    assert len(unseen.unique()) > 2  # no picture yet: random codes


def test_the_prompt_matters_and_is_never_the_picture_itself() -> None:
    m = model()
    a, b = (torch.full((3, 6), c) for c in (1, 30))
    first = [checks.turns_of(m, prompts=p)[0].logits for p in (a, b)]
    assert (first[0] - first[1]).abs().max() > 0.1
    before = m.bank.clone()
    m.eval().loss(torch.zeros(3, 16, dtype=torch.int64), torch.arange(3))
    assert torch.equal(m.bank, before)
    m.train().loss(torch.full((3, 16), 39), torch.arange(3))
    assert not torch.equal(m.bank, before) and (m.bank == 39).any()


def test_a_row_depends_on_its_label_and_seed_alone() -> None:
    checks.check_rows_alone(model())
    checks.check_rows_alone(model("universal"), chunk=2)


def test_every_backend_draws_the_same_tokens(backend, expected: Tensor) -> None:
    if backend.device == "cpu":
        assert torch.equal(checks.tokens_of(checks.turns_of(model())), expected)


def test_what_does_not_fit_is_named() -> None:
    assert find("vf-prompt").title == "VF prompt"
    with pytest.raises(ValueError, match="expected a kind of"):
        VfPromptModel(checks.tokenizer(), 3, kind="style", **SMALL)
    with pytest.raises(ValueError, match="expected a prompt of 1 to 16 tokens, got 17"):
        VfPromptModel(checks.tokenizer(), 3, prompt=17, **SMALL)
    with pytest.raises(ValueError, match=r"expected prompts \[1, 6\], got \[1, 5\]"):
        checks.turns_of(model(), [0], prompts=torch.zeros(1, 5, dtype=torch.int64))


def first_token_nll(kind: str, seed: int) -> float:
    """Of a class with two modes, which share no code, when all its pictures of late are of one of them."""
    tokenizer = checks.tokenizer(4, 8)
    torch.manual_seed(seed)
    m = VfPromptModel(tokenizer, 2, kind=kind, prompt=6, **{**SMALL, "depth": 1}).train()
    optimizer = torch.optim.Adam(m.parameters(), 3e-3)
    labels, losses = torch.arange(64) % 2, []
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 120)  # it runs after the last modes
        code = (4 * labels + 2 * torch.randint(2, (2,))[labels])[:, None]  # of the mode of each class
        m.remember(code + torch.randint(2, (64, 16)), labels)
        pictures = code + torch.randint(2, (64, 16))
        if step >= 90:
            with torch.no_grad():
                logits = m(labels, pictures[:, :0], m.prompts(labels, step))
            losses.append(torch.nn.functional.cross_entropy(logits[:, 0], pictures[:, 0]))
        loss = m.loss(pictures, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(torch.stack(losses).mean())


def test_a_prompt_of_the_class_tells_its_mode_and_a_universal_one_does_not() -> None:
    """Four codes of a class are 2 log 2, the two of a mode log 2 = 0.69. Were pictures independent given
    their class, no prompt could tell anything.
    """
    informed, blind = ([first_token_nll(kind, s) for s in range(3)] for kind in ("class", "universal"))
    checks.check_apart(informed, blind)
    # the network that is told nothing runs after the last modes, and is worse than 1.39
    assert max(informed) < 0.9 and min(blind) > 1.3, (informed, blind)


def test_the_whole_model_draws_the_same_on_emulated_cuda() -> None:
    checks.same_tokens_emulated(model())
    checks.same_tokens_emulated(model(), sampler=Sampler(top_k=1))
