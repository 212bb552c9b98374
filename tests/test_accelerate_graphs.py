"""arimg.accelerate(graphs=True): what is captured when, replayed with what, and why not.

No GPU is needed: a backend of the test records a function and runs it again on the memory of the recording,
as a CUDA graph would; recordings run under a watch for what a capture forbids.
"""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arimg
import test_accelerate
import test_accelerate_llamagen
from arimg import _library
from arimg.accelerate.graphs import CudaBackend, GraphedStep, Graphs
from arimg.accelerate.swap import is_swapped
from standins import llamagen
from test_cuda_graphs import Watch

LABELS = test_accelerate.LABELS
LABELS_OF_LLAMAGEN = test_accelerate_llamagen.LABELS


class Memory(TorchDispatchMode):
    """Where the tensors lie that operations take and none of them has made: what a graph would hold."""

    def __init__(self):
        super().__init__()
        self.made, self.outside = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        self.outside |= places - self.made.keys() - {0}
        out = func(*args, **(kwargs or {}))
        new = [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.made |= {s.data_ptr(): s for s in new if s.data_ptr() not in self.outside}
        return out


class Recorder:
    """A graph's semantics: outputs at one place, constants of the host as they were at the capture. A replay
    that would read memory which is no longer that of the function fails.
    """

    def __init__(self, reason="", error=None):
        self.reason, self.error, self.recorded, self.replayed = reason, error, 0, 0

    def refusal(self):
        return self.reason

    def capture(self, function):
        if self.error:
            raise self.error
        with Watch(), Memory() as held:
            outputs = [t.clone() for t in function()]
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.inference_mode():  # a replay is no operation of torch's
                with Memory() as now:
                    new = function()
                assert now.outside == held.outside, "a graph would read other memory than the function does"
                torch._foreach_copy_(outputs, list(new))

        return outputs, replay


def model_of(tests):
    """The generator that a module of tests makes."""
    made = tests.make()
    return made[0] if isinstance(made, tuple) else made


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
    graphs = Graphs(Recorder(error=RuntimeError("operation not permitted\n when stream is capturing")))
    step = graphs.step(plus)
    for _ in range(3):
        assert torch.equal(step(torch.ones(2))[0], torch.ones(2))
    assert step.reason == "capture failed: operation not permitted when stream is capturing"
    assert str(graphs).endswith(f"(0 captured, 0 replayed so far); not used: {step.reason}")

    refused = GraphedStep(plus, Recorder("no such device"))
    for _ in range(3):
        refused(torch.ones(2))
    assert refused.reason == "no such device" and not refused._graphs


@pytest.mark.parametrize("error", [torch.AcceleratorError("lost"), torch.OutOfMemoryError("lost")])
def test_all_errors_of_the_device_are_reasons(error):
    step = GraphedStep(plus, Recorder(error=error))
    for _ in range(3):
        assert torch.equal(step(torch.ones(2))[0], torch.ones(2))
    assert step.reason == "capture failed: lost"


def test_other_errors_are_raised_and_nothing_stays_behind():
    """The function's own are the same without a graph."""
    backend = Recorder(error=ValueError("expected fewer"))
    step = GraphedStep(plus, backend)
    step(torch.ones(2))
    with pytest.raises(ValueError, match="expected fewer"):
        step(torch.ones(2))
    backend.error = None
    assert torch.equal(step(torch.ones(2))[0], torch.ones(2)) and backend.recorded == 1 and not step.reason


class Stream:
    def __init__(self, device):
        self.device = device


class Within:
    """Another device, or its stream: `with` ends, and an exit that is left out does nothing later."""

    def __init__(self, cuda, device, stream=None):
        self.cuda, self.place, self.new = cuda, device, stream

    def __enter__(self):
        self.before = self.cuda.device, self.cuda.current[self.place]
        self.cuda.device = self.place
        if self.new:
            self.cuda.current[self.place] = self.new

    def __exit__(self, *_):
        self.cuda.device, stream = self.before
        if self.new:
            self.cuda.current[self.place] = stream


class Cuda:
    """What the backend asks of torch.cuda: two devices with their streams and pools, no kernels.

    As torch's, its allocator refuses a pool whose last graph is gone, and `torch.cuda.graph`, which is
    torch's own, leaves its stream current where the end of a capture fails.
    """

    def __init__(self, monkeypatch):
        self.device, self.capturing, self.fails, self.log, self.users = 0, None, False, [], {}
        self.current = [Stream(0), Stream(1)]
        cuda = self

        class Graph:
            key = None

            def capture_begin(self, pool=None, **options):
                device = cuda.device
                self.key = device, (object(),) if pool is None else pool
                users = cuda.users.get(self.key)
                assert users is None or users > 0, "INTERNAL ASSERT FAILED"
                cuda.users[self.key] = (users or 0) + 1
                cuda.capturing = cuda.current[device]
                cuda.log.append(("begin", options["capture_error_mode"], cuda.capturing))

            def capture_end(self):
                cuda.capturing = None
                if cuda.fails:
                    raise torch.AcceleratorError("operation failed due to a previous error during capture")

            def pool(self):
                return self.key[1]

            def replay(self):
                pass

            def __del__(self):
                if self.key is not None:
                    cuda.users[self.key] -= 1

        names = dict(
            CUDAGraph=Graph,
            Stream=lambda: Stream(cuda.device),
            stream=lambda stream: Within(cuda, stream.device, stream),
            device=lambda device: Within(cuda, device.index),
            current_stream=lambda: cuda.current[cuda.device],
            set_stream=self.set_stream,
            synchronize=lambda: cuda.log.append(("synchronize", cuda.device)),
            empty_cache=lambda: None,
        )
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def set_stream(self, stream):
        self.current[stream.device], self.device = stream, stream.device

    def launching(self, index, error=None):
        """A function that launches on this device, in the order of the stream that is current there."""

        def function():
            self.log.append(("launch", index, self.current[index], self.capturing))
            if error and self.capturing:
                raise error
            return [types.SimpleNamespace(device=torch.device("cuda", index))]

        return function


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_a_capture_takes_the_device_of_its_tensors_and_waits_for_nothing_else(cuda):
    backend, before, kept = CudaBackend(), list(cuda.current), []
    for _ in range(2):
        kept.append(backend.capture(cuda.launching(1)))
        assert cuda.current == before and cuda.device == 0
    first, second = cuda.log[:4], cuda.log[4:]
    side = first[2][2]
    assert side.device == 1 and side is not before[1]
    assert first == second == [
        ("launch", 1, before[1], None),  # in the order of the caller's work
        ("synchronize", 1),
        ("begin", "thread_local", side),  # other threads go on
        ("launch", 1, side, side),
    ]  # fmt: skip


def test_graphs_of_a_device_share_a_pool_as_long_as_there_are_some(cuda):
    backend = CudaBackend()
    kept = [backend.capture(cuda.launching(i)) for i in (0, 1, 0, 1)]
    assert list(cuda.users.values()) == [2, 2]
    del kept[0], kept[0]
    kept.append(backend.capture(cuda.launching(0)))
    assert list(cuda.users.values()) == [2, 1]
    kept.clear()
    assert list(cuda.users.values()) == [0, 0]
    kept.append(backend.capture(cuda.launching(1)))  # torch would refuse the pool of before
    assert list(cuda.users.values()) == [0, 0, 1]
    twin = copy.deepcopy(backend)
    kept.append(twin.capture(cuda.launching(1)))
    assert list(cuda.users.values()) == [0, 0, 1, 1]


def test_a_failed_capture_leaves_the_streams_as_they_were(cuda):
    backend, before = CudaBackend(), list(cuda.current)
    cuda.fails = True
    error = torch.AcceleratorError("operation not permitted")
    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        backend.capture(cuda.launching(1, error))
    assert cuda.current == before and cuda.device == 0 and cuda.capturing is None
    cuda.fails = False
    with pytest.raises(ValueError, match="expected fewer"):
        backend.capture(cuda.launching(1, ValueError("expected fewer")))
    assert cuda.current == before and cuda.device == 0 and cuda.capturing is None
    del error
    gc.collect()
    kept = backend.capture(cuda.launching(1))
    assert cuda.current == before and sum(cuda.users.values()) == 1 and kept


def test_the_reason_names_the_error_before_too():
    """The end of a capture reports no more than that there was one."""

    class Chained(Recorder):
        def capture(self, function):
            try:
                raise RuntimeError("operation not permitted")
            finally:
                raise torch.AcceleratorError("previous error")

    step = GraphedStep(plus, Chained())
    for _ in range(2):
        step(torch.ones(2))
    assert step.reason == "capture failed: previous error; before it: operation not permitted"


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


def test_copies_of_the_weights_of_var_are_captured_anew_where_they_are_made_anew():
    model, _ = test_accelerate.make()
    with torch.no_grad():
        wanted = []
        for _ in range(2):
            with arimg.accelerate(model, dtype=torch.bfloat16):
                wanted.append(test_accelerate.greedy(model))
            model.head.weight.mul_(-1)
        with arimg.accelerate(model, dtype=torch.bfloat16, graphs=(backend := Recorder())):
            for picture, want in enumerate(wanted):
                for _ in range(3):
                    assert torch.equal(test_accelerate.greedy(model), want)
                assert backend.recorded == 4 * (picture + 1)
                model.head.weight.mul_(-1)
    assert not torch.equal(*wanted)


def test_seeds_are_those_of_a_run_without_graphs():
    model, _ = test_accelerate.make()
    with torch.no_grad():
        with arimg.accelerate(model):
            want = [model.autoregressive_infer_cfg(2, LABELS, g_seed=s, top_k=9) for s in (1, 2, 3)]
        with arimg.accelerate(model, graphs=Recorder()):
            got = [model.autoregressive_infer_cfg(2, LABELS, g_seed=s, top_k=9) for s in (1, 2, 3)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_tokens_of_llamagen_are_replayed_with_their_position_on_the_device():
    """From picture to picture, as long as shapes and memory stay."""
    model = test_accelerate_llamagen.make()
    greedy = test_accelerate_llamagen.greedy
    want, plain = greedy(model), greedy(model, cfg_scale=1.0)
    backend = Recorder()
    with arimg.accelerate(model, graphs=backend) as report:
        for picture in range(1, 4):
            assert torch.equal(greedy(model), want)
            assert (backend.recorded, backend.replayed) == (1, 25 * picture - 1)
        assert torch.equal(greedy(model, 7), want[:, :7])  # shorter caches
        assert torch.equal(greedy(model, cfg_scale=1.0), plain)  # another batch
        assert torch.equal(greedy(model), want) and backend.recorded == 4
        with torch.inference_mode():  # caches of another kind
            assert torch.equal(greedy(model), want) and torch.equal(greedy(model), want)
        assert torch.equal(greedy(model), want) and backend.recorded == 6
        assert "6 captured, 201 replayed" in str(report)
    assert torch.equal(greedy(model), want)


def test_caches_that_serve_again_are_empty():
    model = test_accelerate_llamagen.make()
    with arimg.accelerate(model, graphs=Recorder()):
        test_accelerate_llamagen.greedy(model)
        caches = [layer.attention.kv_cache for layer in model.layers]
        assert all(cache.k_cache.any() for cache in caches)
        model.setup_caches(4, 26, torch.float32)
        assert all(layer.attention.kv_cache is cache for layer, cache in zip(model.layers, caches))
        assert not any(t.any() for cache in caches for t in (cache.k_cache, cache.v_cache))


@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"dtype": torch.bfloat16}])
def test_changed_weights_of_llamagen_are_seen(options):
    make, greedy = test_accelerate_llamagen.make, test_accelerate_llamagen.greedy
    model = make()

    def state_of(model):
        return {k: v.clone() for k, v in model.state_dict().items() if "kv_cache" not in k}

    def expected(state):
        (twin := make()).load_state_dict(state)
        with arimg.accelerate(twin, **options):
            return greedy(twin)

    state = state_of(make(1))
    wanted = [expected(state_of(model)), expected(state)]
    backend = Recorder()
    with arimg.accelerate(model, graphs=backend, **options):
        assert torch.equal(greedy(model), wanted[0]) and backend.recorded == 1
        model.load_state_dict(state, strict=False)  # in place
        assert torch.equal(greedy(model), wanted[1])
        assert backend.recorded == (2 if options else 1)  # copies are made anew
        model.norm.weight.mul_(-1)  # a norm's weight is read at the beginning of a picture
        wanted.append(expected(state_of(model)))
        assert torch.equal(greedy(model), wanted[2]) and not torch.equal(wanted[1], wanted[2])
        assert backend.recorded == (2 if options else 1)
        model.norm.weight.mul_(-1)
        model.load_state_dict(copy.deepcopy(state), strict=False, assign=True)
        assert torch.equal(greedy(model), wanted[1]) and torch.equal(greedy(model), wanted[1])
        assert backend.recorded == (3 if options else 2)
        model.bfloat16().float()
        wanted.append(expected(state_of(model)))
        assert torch.equal(greedy(model), wanted[3]) and torch.equal(greedy(model), wanted[3])


def test_memory_that_moves_in_the_middle_of_a_picture_is_captured_anew():
    model = test_accelerate_llamagen.make()
    tokens = test_accelerate_llamagen.greedy(model)
    want = test_accelerate_llamagen.scored(model, tokens)
    backend, moved = Recorder(), []

    weight = model.layers[1].feed_forward.w2.weight
    with arimg.accelerate(model, graphs=backend), torch.no_grad():
        model.setup_caches(2, 26, torch.float32)
        cache = model.layers[1].attention.kv_cache
        got = [model(None, LABELS_OF_LLAMAGEN, torch.arange(1))[0]]
        for t in range(24):
            if t == 5:
                moved.append(weight.data)
                weight.data = weight.data.clone()
            if t == 11:
                moved.append(cache.k_cache)
                cache.k_cache = cache.k_cache.clone()
            if t == 17:
                model.to(torch.float64), model.to(torch.float32)  # the caches too
            got.append(model(tokens[:, t : t + 1], cond_idx=None, input_pos=torch.tensor([1 + t]))[0])
        assert backend.recorded == 4
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-4)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("tests", [test_accelerate, test_accelerate_llamagen])
def test_replays_of_the_kernels_of_a_gpu(backend, tests):
    model = model_of(tests)
    with torch.no_grad():
        with arimg.accelerate(model):
            want = tests.greedy(model)
        with arimg.accelerate(model, graphs=Recorder()) as report:
            for _ in range(2):
                assert torch.equal(tests.greedy(model), want)
            assert report.graphs.counts.replays > 0


@pytest.mark.parametrize("tests", [test_accelerate, test_accelerate_llamagen])
def test_copies_have_graphs_of_their_own(tests):
    model = model_of(tests)
    with torch.no_grad(), arimg.accelerate(model, graphs=Recorder()) as report:
        want = tests.greedy(model)
        tests.greedy(model)
        recorded = report.graphs.backend.recorded
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_swapped(twin) and twin.graphs is not model.graphs is not None
            assert not twin.graphs.kept and twin.graphs.counts.captures == 0
            for _ in range(2):
                assert torch.allclose(tests.greedy(twin), want, atol=1e-4)
            assert twin.graphs.counts.captures == recorded > 0 == recorded - report.graphs.backend.recorded
        assert report.graphs is model.graphs


@pytest.mark.parametrize("tests", [test_accelerate, test_accelerate_llamagen])
@pytest.mark.parametrize("end", ["restore", "move", "delete", "another batch"])
def test_graphs_end_with_the_acceleration_the_place_of_the_weights_and_the_model(tests, end):
    """Their memory goes back at once."""
    model = model_of(tests)
    report = arimg.accelerate(model, graphs=Recorder())
    with torch.no_grad():
        tests.greedy(model)
        tests.greedy(model)
        graphs = report.graphs
        (kept,) = graphs.kept.values()
        step = weakref.ref(kept.graphed if hasattr(kept, "graphed") else kept[1].graphed)
        assert step()._graphs
        del kept
        gc.disable()
        try:
            if end == "restore":
                report.restore()
            elif end == "move":
                model.to(torch.bfloat16)
            elif end == "delete":
                del model, report
            elif tests is test_accelerate:
                tests.greedy(model, torch.tensor([1, 2, 3]))
            else:
                tests.greedy(model, cfg_scale=1.0)
            assert step() is None and len(graphs.kept) == (end == "another batch")
        finally:
            gc.enable()


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


@pytest.mark.skipif(not torch.cuda.is_available() or not _library.cuda_usable(), reason="no GPU")
@pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"dtype": torch.bfloat16}], ids=str)
def test_tokens_of_llamagen_on_a_gpu(options):
    model, labels = test_accelerate_llamagen.make().cuda(), LABELS_OF_LLAMAGEN.cuda()
    with arimg.accelerate(model, **options):
        want = llamagen.generate(model, labels, 25, 3.0)
    with arimg.accelerate(model, graphs=True, **options) as report:
        for _ in range(2):
            assert torch.equal(llamagen.generate(model, labels, 25, 3.0), want)
        assert "(1 captured, 49 replayed so far)" in str(report)


@pytest.mark.skipif(not torch.cuda.is_available() or not _library.cuda_usable(), reason="no GPU")
def test_a_failed_capture_on_a_gpu_leaves_everything_usable():
    graphs, before, x = Graphs(), torch.cuda.current_stream(), torch.ones(2, device="cuda")
    step, good = graphs.step(lambda x: (x * x.sum().item(),)), graphs.step(plus)
    for _ in range(3):
        assert torch.equal(step(x)[0], 2 * x)
    assert step.reason.startswith("capture failed") and torch.cuda.current_stream() == before
    assert torch.rand(3, device="cuda").isfinite().all()
    for _ in range(3):
        assert torch.equal(good(x)[1], x + 1)
    assert (graphs.counts.captures, graphs.counts.replays) == (1, 2)


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
        assert torch.equal(test_accelerate_llamagen.greedy(model), want)
        assert (backend.recorded, backend.replayed) == (1, 49)
