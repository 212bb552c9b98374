"""DD1: noise to tokens by the codebook flow, a student that answers in one pass."""

import copy

import pytest
import torch
from torch import Tensor

import released
from arimg import models, ops
from arimg.generators import VAR
from arimg.generators.loop import final_tokens, generate
from arimg.guidance import Guidance
from arimg.systems import find
from arimg.systems.dd1 import DD1, FlowSampler, make, token_noise
from arimg.tokenizers import VQVAE
from conftest import Backend
from pretend_cuda import CUDA, pretend_cuda
from system_checks import same_tokens_emulated


@pytest.fixture(scope="module")
def teacher() -> VAR:
    torch.manual_seed(0)
    tokenizer = models.load().tokenizer
    teacher = VAR(tokenizer, 3, 1, 64, 2).eval()
    torch.nn.init.normal_(teacher.head.weight, std=0.3)
    return teacher


@pytest.fixture(scope="module")
def student(teacher: VAR) -> DD1:
    torch.manual_seed(0)
    student = DD1(teacher, again=(2, 4)).eval()
    torch.nn.init.normal_(student.blocks[0].get_parameter("ada_lin.1.weight"), std=0.3)  # opens the branches
    torch.nn.init.normal_(student.class_emb.weight)
    return student


def heun(x: Tensor, codebook: Tensor, logits: Tensor, steps: int = 10) -> Tensor:
    """The flow with its N x K matrix."""

    def velocity(x: Tensor, t: float) -> Tensor:
        squares = (x[:, None] - t * codebook).square().sum(2)
        weights = (logits.log_softmax(1) - squares / (2 * (1 - t) ** 2)).softmax(1)
        return (weights @ codebook - x) / (1 - t)

    for i in range(steps):
        v = velocity(x, i / steps)
        if i + 1 < steps:
            v = (v + velocity(x + v / steps, (i + 1) / steps)) / 2
        x = x + v / steps
    return x


def test_the_flow_draws_what_the_teacher_says(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(16, 4, generator=generator)
    logits = torch.randn(1, 16, generator=generator)
    noise = token_noise(torch.arange(20), 25, 4).flatten(0, 1)
    carried = ops.codebook_flow(
        noise.to(backend.device), codebook.to(backend.device), logits.to(backend.device)
    )
    index = ops.nearest_code(carried, codebook.to(backend.device)).cpu()
    share = index.bincount(minlength=16) / len(index)
    # total variation of 500 independent draws of 16 codes: about 0.06
    assert 0.5 * float((share - logits.softmax(1)[0]).abs().sum()) < 0.12
    expected = heun(noise.double(), codebook.double(), logits.double())
    same = torch.cdist(expected, codebook.double()).argmin(1)
    assert (index == same).float().mean() > 0.99


def test_noise_is_normal_and_belongs_to_the_row() -> None:
    noise = token_noise(torch.arange(50), 103, 16)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(token_noise(torch.tensor([7]), 103, 16), noise[7:8])


def test_a_token_sees_earlier_scales_and_itself(student: DD1) -> None:
    labels, tokens = torch.tensor([1]), torch.zeros(1, 103, dtype=torch.int64)
    noise = token_noise(torch.tensor([3]), 103, 16)
    before = student.student(labels, noise, tokens, 0)[0]
    for changed in (0, 6, 50):
        other = noise.clone()
        other[:, changed] += 1.0
        moved = (student.student(labels, other, tokens, 0)[0] - before).abs().amax((0, 2)) > 0
        level = student.layout.level()
        expected = level > level[changed]
        expected[changed] = True
        assert torch.equal(moved, expected)


def test_passes_keep_told_tokens_and_the_noise(student: DD1) -> None:
    turns = list(generate(student, torch.tensor([0, 2]), seed=5))
    assert [t.number for t in turns] == [0, 1, 2] and [t.done for t in turns] == [False, False, True]
    first, second, third = (t.drawn for t in turns)
    assert torch.equal(first[:, :5], second[:, :5]) and torch.equal(second[:, :39], third[:, :39])
    # the second pass is the network on the same noise behind the tokens of the first
    noise = token_noise(torch.tensor([5, 6]), 103, 16)
    logits, _ = student.student(torch.tensor([0, 2]), noise, first, 5)
    torch.testing.assert_close(logits, turns[1].logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.argmax(-1)[:, 5:], second[:, 5:])


def test_a_row_does_not_depend_on_the_others_and_the_seed_decides(student: DD1) -> None:
    both = final_tokens(generate(student, torch.tensor([0, 2]), seed=torch.tensor([4, 9])))[0]
    alone = final_tokens(generate(student, torch.tensor([2]), seed=torch.tensor([9])))[0]
    assert torch.equal(both[1:], alone)
    other = final_tokens(generate(student, torch.tensor([2]), seed=torch.tensor([10])))[0]
    assert not torch.equal(other, alone)


def test_the_pairs_are_the_teachers(student: DD1, teacher: VAR) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pairs = student.examples(pixels, torch.tensor([0, 2]))
    assert pairs.shape == (2, 103, 17)
    assert torch.equal(pairs[1:], student.examples(pixels[1:], torch.tensor([2])))
    seeds = (pixels.double().flatten(1) * 255).sum(1).long()
    sampler = FlowSampler(teacher.sampler.guidance)
    tokens = torch.cat(final_tokens(generate(teacher, torch.tensor([0, 2]), sampler=sampler, seed=seeds)), 1)
    assert torch.equal(pairs[..., -1].long(), tokens)
    assert torch.equal(pairs[..., :-1], token_noise(seeds, 103, 16))


def test_the_student_learns_which_token_a_noise_becomes(teacher: VAR) -> None:
    torch.manual_seed(0)
    student = DD1(teacher).train()
    pairs = student.examples(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    labels, optimizer = torch.tensor([0, 1, 2, 0]), torch.optim.Adam(student.parameters(), 3e-3)
    for _ in range(60):
        loss = student.loss(pairs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()
    noise, tokens = pairs[..., :-1], pairs[..., -1].long()
    logits, _ = student.student(labels, noise, tokens, 0)
    right = (logits.argmax(-1) == tokens).float().mean()
    other = student.student(labels, noise.flip(1), tokens, 0)[0]
    wrong = (other.argmax(-1) == tokens).float().mean()
    assert right > 0.5 and right > 4 * wrong  # it reads its noise and does not only know the picture


def test_at_full_size_its_shapes_are_those_of_var_and_three_more() -> None:
    with torch.device("meta"):
        big = DD1(VAR(VQVAE(), depth=16))
    more = {"kind.weight": (2, 1024), **released.linear("code_head", 32, 1024)}
    assert released.shapes_of(big) == {**released.var(16, False, True, 680), **more}


def test_what_does_not_fit_is_refused(student: DD1, teacher: VAR) -> None:
    with pytest.raises(ValueError, match=r"expected rising scales of 1\.\.4 .* got \(4, 2\)"):
        DD1(teacher, again=(4, 2))
    with pytest.raises(ValueError, match="expected no guidance"):
        student.begin(torch.tensor([0]), guided=Guidance(2.0) is not None)
    with pytest.raises(ValueError, match=r"expected noise \[B, 103, 16\]"):
        student.student(torch.tensor([0]), torch.zeros(1, 3, 16), torch.zeros(1, 3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="expected the 3 classes of the bundled teacher, got 2"):
        make(teacher, 2)
    assert find("dd1").name == "dd1"
    names = set(student.state_dict()) - set(teacher.state_dict())
    assert names == {"kind.weight", "code_head.weight", "code_head.bias"}
    assert student.state_dict()["kind.weight"].shape == (2, 64)


def test_the_whole_model_draws_the_same_on_emulated_cuda(student: DD1) -> None:
    same_tokens_emulated(student)


def test_the_teacher_answers_the_same_on_emulated_cuda(student: DD1) -> None:
    pixels, labels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    expected = student.examples(pixels, labels)
    with pretend_cuda() as mode:
        moved = copy.deepcopy(student).to(CUDA)
        pairs = moved.examples(pixels.to(CUDA), labels.to(CUDA)).cpu()
    assert torch.allclose(pairs[..., :-1], expected[..., :-1], atol=1e-5)
    assert (pairs[..., -1] == expected[..., -1]).float().mean() > 0.98  # a token may flip near a tie
    assert {"codebook_softmax_mean", "nearest_code", "philox_uniform"} <= set(mode.kernels)
    assert not mode.on_host
