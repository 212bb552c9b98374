"""arimg.accelerate(graphs=True): what is captured when, replayed with what, and why not.

No GPU is needed: a backend of the test records a function and runs it again on the memory of the recording,
as a CUDA graph would; recordings run under a watch for what a capture forbids.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import arimg
import test_accelerate
import test_accelerate_llamagen
from arimg import _library
from arimg.accelerate.graphs import GraphedStep, Graphs
from arimg.accelerate.swap import is_swapped
from test_cuda_graphs import Watch

LABELS = test_accelerate.LABELS


class Recorder:
    """A graph's semantics: outputs at one place, constants of the host as they were at the capture."""

    def __init__(self, reason="", error=None):
        self.reason, self.error, self.recorded, self.replayed = reason, error, 0, 0

    def refusal(self):
        return self.reason

    def capture(self, function):
        if self.error:
            raise RuntimeError(self.error)
        with Watch():
            outputs = [t.clone() for t in function()]
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.inference_mode():  # a replay is no operation of torch's
                for own, new in zip(outputs, function(), strict=True):
                    own.copy_(new)

        return outputs, replay


def plus(x, factor=1):
    return x * factor, x + factor


def test_the_second_call_of_a_shape_is_captured_and_later_ones_are_replayed():
    backend = Recorder()
    step = GraphedStep(plus, backend)
    for call in range(5):
        x = torch.full((3,), float(call))
        assert torch.equal(step(x, factor=2)[0], 2 * x)
        assert (backend.recorded, backend.replayed) == (int(call >= 1), max(call, 0))
    for other in (torch.ones(4), torch.ones(3, dtype=torch.float64)):  # other shapes, types and settings
        step(other, factor=2)
    step(torch.ones(3), factor=3)
    assert backend.recorded == 1
    assert torch.equal(step(torch.ones(3), factor=3)[1], torch.full((3,), 4.0)) and backend.recorded == 2


def test_results_stay_as_they_are_and_inputs_are_not_kept():
    step = GraphedStep(plus, Recorder())
    x = torch.ones(2)
    step(x)
    with torch.inference_mode():
        step(torch.ones(2))  # captured here, replayed outside
    first = step(x)[0]
    step(torch.full((2,), 7.0))
    assert torch.equal(first, torch.ones(2)) and torch.equal(x, torch.ones(2))


def test_moved_memory_is_captured_anew():
    weight, backend = [torch.ones(2)], Recorder()
    step = GraphedStep(lambda x: (x * weight[0],), backend, lambda: weight)
    x = torch.ones(2)
    for _ in range(3):
        step(x)
    weight[0].fill_(5)  # a change in place is seen by a replay
    assert torch.equal(step(x)[0], torch.full((2,), 5.0)) and backend.recorded == 1
    keep, weight[0] = weight[0], torch.full((2,), 3.0)
    assert torch.equal(step(x)[0], weight[0]) and backend.recorded == 1
    assert torch.equal(step(x)[0], weight[0]) and backend.recorded == 2
    assert keep is not weight[0]


def test_what_cannot_be_captured_runs_as_it_is_and_says_why():
    graphs = Graphs(Recorder(error="operation not permitted\n when stream is capturing"))
    step = graphs.step(plus)
    for _ in range(3):
        assert torch.equal(step(torch.ones(2))[0], torch.ones(2))
    assert step.reason == "capture failed: operation not permitted when stream is capturing"
    assert str(graphs).endswith(f"(0 captured, 0 replayed so far); not used: {step.reason}")

    refused = GraphedStep(plus, Recorder("no such device"))
    for _ in range(3):
        refused(torch.ones(2))
    assert refused.reason == "no such device" and not refused._graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_report_says_that_there_is_no_gpu():
    model, _ = test_accelerate.make()
    want = test_accelerate.greedy(model)
    with arimg.accelerate(model, graphs=True) as report:
        assert torch.allclose(test_accelerate.greedy(model), want, atol=1e-4)
        assert "CUDA graphs: not used: no CUDA device here" in str(report)


def test_generations_of_var_replay_every_scale():
    model, _ = test_accelerate.make()
    other = torch.tensor([1, 9])
    with torch.no_grad():
        want = test_accelerate.greedy(model), test_accelerate.greedy(model, other)
        backend = Recorder()
        with arimg.accelerate(model, graphs=backend) as report:
            for picture in range(4):
                got = test_accelerate.greedy(model, other if picture % 2 else LABELS)
                assert torch.allclose(got, want[picture % 2], atol=1e-4)
                assert backend.recorded == (0 if picture == 0 else 4)
            assert backend.replayed == 12
            assert "captured at the second step of a shape (4 captured, 12 replayed so far)" in str(report)
            model.head.weight.mul_(-1)  # in place: seen by replays
            changed = test_accelerate.greedy(model)
            assert backend.recorded == 4 and not torch.allclose(changed, want[0], atol=1e-4)
            model.head.weight = torch.nn.Parameter(-model.head.weight, requires_grad=False)
            for _ in range(3):  # moved: captured anew
                assert torch.allclose(test_accelerate.greedy(model), want[0], atol=1e-4)
            assert backend.recorded == 8
            three = torch.tensor([3, 7, 1])  # another batch has its own
            for _ in range(2):
                got = test_accelerate.greedy(model, three)
                assert torch.allclose(got[:2], want[0], atol=1e-4)
            assert backend.recorded == 12
            with torch.autocast("cpu", dtype=torch.bfloat16):
                test_accelerate.greedy(model)
            assert "not used: under autocast" in str(report)


def test_seeds_are_those_of_a_run_without_graphs():
    model, _ = test_accelerate.make()
    with torch.no_grad():
        with arimg.accelerate(model):
            want = [model.autoregressive_infer_cfg(2, LABELS, g_seed=s, top_k=9) for s in (1, 2, 3)]
        with arimg.accelerate(model, graphs=Recorder()):
            got = [model.autoregressive_infer_cfg(2, LABELS, g_seed=s, top_k=9) for s in (1, 2, 3)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_tokens_of_llamagen_are_replayed_with_their_position_on_the_device():
    model = test_accelerate_llamagen.make()
    want = test_accelerate_llamagen.greedy(model)
    backend = Recorder()
    with arimg.accelerate(model, graphs=backend) as report:
        for picture in range(2):
            assert torch.equal(test_accelerate_llamagen.greedy(model), want)
            assert (backend.recorded, backend.replayed) == (picture + 1, 24 * (picture + 1))
        assert "2 captured, 48 replayed" in str(report)
    assert torch.equal(test_accelerate_llamagen.greedy(model), want)


def test_copies_have_graphs_of_their_own():
    model, _ = test_accelerate.make()
    with torch.no_grad(), arimg.accelerate(model, graphs=True) as report:
        want = test_accelerate.greedy(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_swapped(twin) and twin.graphs is not model.graphs is not None
            assert torch.equal(test_accelerate.greedy(twin), want)
        assert report.graphs is model.graphs


@pytest.mark.skipif(not torch.cuda.is_available() or not _library.cuda_usable(), reason="no GPU")
def test_on_a_gpu():
    model, vae = test_accelerate.make()
    model.cuda(), vae.cuda()
    labels = LABELS.cuda()
    with torch.no_grad(), arimg.accelerate(model, graphs=True) as report:
        want = model.autoregressive_infer_cfg(2, labels, g_seed=1, top_k=1)
        for _ in range(3):
            assert torch.equal(model.autoregressive_infer_cfg(2, labels, g_seed=1, top_k=1), want)
        assert "(4 captured, 12 replayed so far)" in str(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_codes_without_a_gpu_run_as_they_do_without_graphs(weights):
    """The report says why nothing is captured; the steps read their codes all the same."""
    model = test_accelerate_llamagen.make()
    with arimg.accelerate(model, weights=weights) as report:
        want, memory = test_accelerate_llamagen.greedy(model), report.memory
    with arimg.accelerate(model, weights=weights, graphs=True) as report:
        assert torch.equal(test_accelerate_llamagen.greedy(model), want) and report.memory == memory
        text = str(report)
        assert f"; weights {weights}" in text and "CUDA graphs: not used: no CUDA device here" in text
    with arimg.accelerate(model, weights=weights, graphs=(backend := Recorder())):
        assert torch.equal(test_accelerate_llamagen.greedy(model), want)
        assert (backend.recorded, backend.replayed) == (1, 24)
