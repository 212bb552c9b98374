"""`arimg.pipelined`: the results of the sequential loop, in order, whatever happens on the way."""

from __future__ import annotations

import contextlib
import contextvars
import signal
import threading
import time
import traceback
import weakref

import pytest
import torch

import arimg
from arimg import pipelined
from arimg.accelerate.graphs import CudaBackend, GraphedStep
from arimg.generators import VAR
from arimg.tokenizers import VQVAE
from standins import llamagen as standin

SECONDS = 20  # until a test that hangs fails


def same(x):
    return x


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """In a shell's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Results ------------------------------------------------------------------------------------------------


def test_our_generator_draws_the_sequential_pictures():
    torch.manual_seed(0)
    tokenizer = VQVAE(32, 8, 8, (1, 2), (1, 2, 4), blocks=1).eval()
    var = VAR(tokenizer, 3, depth=1, width=16, heads=1).eval()
    torch.nn.init.normal_(var.head.weight)

    def make(batch):
        *_, last = var.stream([0, 1, 2], seed=10 * batch)
        return last.f_hat

    state = torch.get_rng_state()
    pictures = list(pipelined(make, tokenizer.decode_features, range(4)))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [tokenizer.decode_features(make(batch)) for batch in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(pictures, expected, strict=True))
    assert not torch.equal(pictures[0], pictures[1])


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_model_that_draws_from_the_global_generator(accelerated):
    torch.manual_seed(0)
    model = standin.Transformer(standin.ModelArgs()).eval().requires_grad_(False)
    decoder = torch.nn.Conv2d(1, 3, 3)

    def make(labels):  # as users of the released code sample: no seed of its own, caches of the model
        start = torch.randint(0, 7, (1,))
        return standin.generate(model, (torch.tensor(labels) + start) % 7, 9, cfg_scale=2.0)

    @torch.no_grad()
    def finish(tokens):
        return decoder(tokens.view(-1, 1, 3, 3).float())

    batches = [[0, 1], [2, 3], [4, 5], [6, 0]]
    with arimg.accelerate(model) if accelerated else contextlib.nullcontext():
        torch.manual_seed(5)
        expected = [finish(make(batch)) for batch in batches]
        after = torch.get_rng_state()
        torch.manual_seed(5)
        found = list(pipelined(make, finish, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_batch_comes_once_and_in_order(count):
    assert list(pipelined(lambda n: n + 1, lambda n: 10 * n, iter(range(count)))) == [
        10 * (n + 1) for n in range(count)
    ]


def test_the_next_batch_is_made_while_one_is_finished():
    """Each waits for the other: neither would come to an end alone."""
    begun = [threading.Event() for _ in range(4)]
    finishing = [threading.Event() for _ in range(4)]
    threads = {}

    def make(n):
        threads["make", n] = threading.get_ident()
        begun[n].set()
        assert n == 0 or finishing[n - 1].wait(SECONDS)
        return n

    def finish(n):
        threads["finish", n] = threading.get_ident()
        finishing[n].set()
        assert n == 3 or begun[n + 1].wait(SECONDS)
        return n

    assert list(pipelined(make, finish, range(4))) == [0, 1, 2, 3]
    here = threading.get_ident()
    assert all(threads["finish", n] == here for n in range(4)) and threads["make", 0] == here
    assert len({threads["make", n] for n in (1, 2, 3)} - {here}) == 1


def test_two_batches_are_there_at_once():
    class Tokens:
        pass

    alive, most, lock = weakref.WeakSet(), 0, threading.Lock()

    def make(n):
        nonlocal most
        made = Tokens()
        with lock:
            alive.add(made)
            most = max(most, len(alive))
        return made

    for _ in pipelined(make, lambda made: time.sleep(0.01), range(8)):
        assert len(alive) <= 2
    assert most == 2 and not alive


# Errors and early ends ----------------------------------------------------------------------------------


def collect(results):
    """What came, and the error that ended it."""
    found = []
    try:
        for result in results:
            found.append(result)
    except BaseException as error:
        return found, error
    return found, None


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_of_make_comes_after_the_results_before_it(bad):
    def make(n):
        if n == bad:
            raise LookupError(f"batch {n}")
        return n

    found, error = collect(pipelined(make, same, range(5)))
    assert found == list(range(bad))
    assert isinstance(error, LookupError) and str(error) == f"batch {bad}"
    assert traceback.extract_tb(error.__traceback__)[-1].line == 'raise LookupError(f"batch {n}")'


def test_an_error_of_the_batches_comes_after_the_results_before_it():
    def batches():
        yield 0
        yield 1
        raise LookupError("no more")

    found, error = collect(pipelined(same, same, batches()))
    assert found == [0, 1] and isinstance(error, LookupError)


def test_an_error_of_finish_wins_over_one_of_the_next_make():
    made = []

    def make(n):
        made.append(n)
        if n == 2:
            raise LookupError("make")
        return n

    def finish(n):
        if n == 1:
            raise ArithmeticError("finish")
        return n

    found, error = collect(pipelined(make, finish, range(9)))
    assert found == [0] and isinstance(error, ArithmeticError) and made == [0, 1, 2]


def test_left_early_it_ends_with_the_batch_in_the_making():
    ended = []

    def make(n):
        time.sleep(0.05)
        ended.append(n)
        return n

    results = pipelined(make, same, range(100))
    assert [next(results), next(results)] == [0, 1]
    results.close()
    assert ended == [0, 1, 2]
    assert list(results) == []


def endless(interrupted):
    """A make that never returns by itself, but for batch 0."""

    def make(n):
        if n == 0:
            return n
        until = time.monotonic() + SECONDS
        try:
            while time.monotonic() < until:
                time.sleep(0.001)
        except KeyboardInterrupt:
            interrupted.append(n)
            raise
        return n

    return make


def test_an_interrupt_in_finish_interrupts_make():
    def finish(n):
        time.sleep(0.05)  # make is under way
        raise KeyboardInterrupt

    interrupted = []
    found, error = collect(pipelined(endless(interrupted), finish, range(3)))
    assert found == [] and isinstance(error, KeyboardInterrupt) and interrupted == [1]


@pytest.mark.parametrize("closing", [False, True])
def test_ctrl_c_while_waiting_interrupts_make(closing):
    """While the loop waits for the next batch, and while it waits for it because it was left early."""
    main = threading.main_thread().ident
    ctrl_c = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    interrupted = []
    results = pipelined(endless(interrupted), same, range(3))
    assert next(results) == 0
    ctrl_c.start()
    with pytest.raises(KeyboardInterrupt):
        results.close() if closing else next(results)
    ctrl_c.join()
    assert interrupted == [1]


# The caller's state -------------------------------------------------------------------------------------


def inferred():
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.empty(0).is_inference()


def autocast():
    kinds = ("cpu", "cuda")
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    enabled = [torch.is_autocast_enabled(kind) for kind in kinds]
    return enabled, torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(), product.dtype


@contextlib.contextmanager
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def variable_set():
    token = VARIABLE.set("here")
    yield
    VARIABLE.reset(token)


VARIABLE = contextvars.ContextVar("VARIABLE", default="elsewhere")
STATES = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference_mode": (torch.inference_mode, inferred),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), autocast),
    "autocast without cache": (lambda: torch.autocast("cpu", torch.float16, cache_enabled=False), autocast),
    "device": (lambda: torch.device("meta"), lambda: torch.empty(2).device.type),
    "threads": (three_threads, torch.get_num_threads),
    "context variables": (variable_set, lambda: VARIABLE.get()),
}


@pytest.mark.parametrize("name", STATES)
def test_make_sees_the_callers_state(name):
    context, look = STATES[name]
    plain = look()
    with context():
        there = look()
        assert there != plain
        seen = [found for found in pipelined(lambda n: look(), same, range(3))]
    assert seen == [there] * 3
    assert look() == plain


def test_a_state_of_the_moment_is_seen():
    """As in a generator expression: what holds at a `next`, not where the loop was set up."""

    def look(n):
        return torch.is_grad_enabled(), torch.get_num_threads()

    threads = torch.get_num_threads()
    with torch.no_grad():
        results = pipelined(look, same, range(5))
        found = [next(results), next(results)]
    with three_threads():
        found.append(next(results))  # batch 2 was begun before; batch 3 begins
    found += results
    assert found == [(False, threads)] * 3 + [(True, 3), (True, threads)]


# CUDA ---------------------------------------------------------------------------------------------------


class Stream:
    """A stream that keeps, for each piece of work on it, what comes before it; for machines without a GPU."""

    def __init__(self, log):
        self.before, self.log = set(), log

    def work(self, *name):
        self.log.append((self, name, set(self.before)))
        self.before.add(name)

    def wait_stream(self, other):
        self.before |= other.before


@pytest.fixture
def streams(monkeypatch):
    """The caller's stream, and a list of all work on it and on those that `torch.cuda.Stream()` gave."""
    log, local = [], threading.local()
    callers = Stream(log)

    @contextlib.contextmanager
    def use(stream):
        before, local.stream = current(), stream
        yield
        local.stream = before

    def current():
        return getattr(local, "stream", callers)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(log))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    return callers, log


def test_streams_wait_for_what_they_read_and_for_nothing_else(streams):
    callers, log = streams

    def make(n):
        torch.cuda.current_stream().work("make", n)
        return n

    def finish(n):
        torch.cuda.current_stream().work("finish", n)
        return n

    callers.work("weights")
    for n in pipelined(make, finish, range(5)):
        callers.work("body", n)
    before = {name: done for _, name, done in log}
    assert len({stream for stream, *_ in log}) == 2
    for n in range(5):
        assert ("weights",) in before["make", n] and ("make", n) in before["finish", n]
    for n in range(1, 5):
        assert ("finish", n - 1) not in before["make", n]  # side by side
        assert ("make", n) not in before["finish", n - 1]


def test_memory_is_kept_until_the_other_stream_has_waited(streams):
    """What a stream allocated may be written by its later work as soon as it is dropped: all work that reads
    it must come before that.
    """
    callers, log = streams
    dropped = {}

    class Tokens:
        def __init__(self, n, reader):
            self.n = n
            weakref.finalize(self, lambda: dropped.update({(reader, n): len(log)}))

    def make(tokens):
        torch.cuda.current_stream().work("make", tokens.n)
        return Tokens(tokens.n, "finish more")

    def finish(made):
        torch.cuda.current_stream().work("finish", made.n)
        time.sleep(0.02)
        torch.cuda.current_stream().work("finish more", made.n)

    # batches of the caller's memory, as a list of tensors would be
    batches = [Tokens(n, "make") for n in range(6)]
    for _ in pipelined(make, finish, (batches.pop(0) for _ in range(6))):
        pass
    assert len(dropped) == 12
    workers = next(stream for stream, name, _ in log if name == ("make", 1))
    for (reader, n), at in dropped.items():
        owner = callers if reader == "make" else workers
        for stream, name, before in log[at:]:
            assert stream is not owner or (reader, n) in before or n == 0, (reader, n, name)


def test_after_an_early_end_the_callers_stream_waits_for_the_worker(streams):
    callers, _ = streams
    results = pipelined(lambda n: torch.cuda.current_stream().work("make", n), same, range(9))
    next(results)
    results.close()
    assert ("make", 1) in callers.before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    weight = torch.randn(1024, 1024, device="cuda") / 32

    def make(n):
        x = torch.full((1024, 1024), float(n + 1), device="cuda")
        for _ in range(20):
            x = (x @ weight).tanh()
        return x

    def finish(x):
        for _ in range(20):
            x = (x @ weight).sin()
        return x

    expected = [finish(make(n)) for n in range(6)]
    found = list(pipelined(make, finish, range(6)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_is_captured_while_another_batch_is_finished():
    weight = torch.randn(256, 256, device="cuda") / 16
    step = GraphedStep(lambda x: ((x @ weight).tanh(),), CudaBackend())

    def make(n):
        x = torch.full((256, 256), float(n + 1), device="cuda")
        return step(x)[0]  # the second batch captures

    def finish(x):
        sums = []
        for i in range(200):
            torch.cuda.empty_cache()  # so that each allocation asks the driver
            sums.append((x.repeat(2 + i % 7, 1) @ weight).sum())
        return torch.stack(sums)

    expected = [finish((torch.full((256, 256), n + 1.0, device="cuda") @ weight).tanh()) for n in range(4)]
    found = list(pipelined(make, finish, range(4)))
    assert step.counts.captures == 1 and not step.reason
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
