"""Two stages of generation side by side: the next batch is made while one is finished."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")
Made = TypeVar("Made")
Done = TypeVar("Done")

_END: Any = object()


def pipelined(
    make: Callable[[Batch], Made], finish: Callable[[Made], Done], batches: Iterable[Batch]
) -> Iterator[Done]:
    """finish(make(batch)) of each batch, in order; the next batch is made while one is finished.

    make draws tokens, finish decodes them, mostly. finish runs in the caller's thread, and so does make for
    the first batch; a worker thread pulls the other batches and makes them, under the caller's grad and
    inference mode, autocast, default device, number of threads and context variables. On CUDA the worker has
    a stream of its own on the current device, and each stream waits for what it reads of the other. At most
    two batches are there at once: the one being finished and the next.

    Results are those of the sequential loop, bit for bit, where make and finish share nothing that they
    change and what make returns is its own (no buffer that the next call writes). make may draw from torch's
    global generator, for batches are made one after another; then finish and the loop's body must not.

    An exception of make or of the batches is raised, with its traceback, after all batches before were given
    out. Where the loop is left early or finish fails, the batch in the making is waited for and dropped (the
    global generator is where it left it); where Ctrl-C interrupts finish or the wait, make is interrupted,
    too.
    """
    source = iter(batches)

    def step() -> Any:
        batch = next(source, _END)
        # The batch stays as long as what was made of it: on CUDA the worker's stream may still read it.
        return _END if batch is _END else (batch, make(batch))

    current = step()  # nothing to finish meanwhile
    with _Worker() as worker:
        while current is not _END:
            worker.start(step)
            yield finish(current[1])
            current = worker.result()


class _Worker:
    """A thread for one task at a time, with a stream of its own on CUDA."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "arimg-make")
        self._stream: Any = torch.cuda.Stream() if torch.cuda.is_initialized() else None
        self._task: Future[Any] | None = None
        self._lock = threading.Lock()
        self._busy: int | None = None  # the thread's number while a task runs

    def start(self, task: Callable[[], Any]) -> None:
        """Runs a task under the caller's state, behind what the caller's stream has to do."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._task = self._pool.submit(copy_context().run, self._run, _caller_state(), task)

    def _run(self, state: Callable[[], AbstractContextManager[Any]], task: Callable[[], Any]) -> Any:
        with self._lock:
            self._busy = threading.get_ident()
        try:
            with state(), torch.cuda.stream(self._stream):
                return task()
        finally:
            with self._lock:
                self._busy = None

    def result(self) -> Any:
        """The task's result, which the caller's stream may read."""
        assert self._task is not None
        result = self._task.result()
        self._join_stream()
        return result

    def _join_stream(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self._interrupt()
            self._wait()
        except KeyboardInterrupt:  # while waiting
            self._interrupt()
            self._wait()
            raise
        finally:
            self._pool.shutdown()
            self._join_stream()

    def _wait(self) -> None:
        """For the task, not by joining the thread: an interrupted `join` takes it for ended (bpo-45274)."""
        if self._task is not None:
            wait([self._task])

    def _interrupt(self) -> None:
        """Python passes Ctrl-C to the main thread alone: this raises it in the worker, between two calls."""
        with self._lock:
            if self._busy is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._busy), ctypes.py_object(KeyboardInterrupt)
                )


def _caller_state() -> Callable[[], AbstractContextManager[Any]]:
    """What torch keeps for each thread, as a function that enters it in another."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    threads, device = torch.get_num_threads(), torch.get_default_device()
    cache = torch.is_autocast_cache_enabled()
    autocast = {
        kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    }

    def enter() -> ExitStack:
        stack = ExitStack()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if device != torch.get_default_device():  # a context of its own would slow every call of torch
            stack.enter_context(device)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype in autocast.items():
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cache))
        return stack

    return enter
