"""Fixtures for every test: the backends an operation runs on.

A test that takes `backend` runs once per backend: `cpu-<level>` for each SIMD level of this machine,
`emulated` (the CUDA kernels in the emulator, on CPU tensors that end at a forbidden page) and, with a GPU,
`cuda`. `backend.device` is where its tensors must live.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from arimg import _library
from guarded import GuardInputs

LEVELS = _library.SIMD_LEVELS


@dataclass(frozen=True)
class Backend:
    name: str
    device: str


def _names() -> list[str]:
    return [f"cpu-{level}" for level in LEVELS] + ["emulated", "cuda"]


@pytest.fixture(params=_names())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name = request.param
    if name.startswith("cpu-"):
        level = name[4:]
        if level not in _library.simd_levels():
            pytest.skip(f"this machine has no {level}")
        before = _library.simd_level()
        _library.set_simd_level(level)
        yield Backend(name, "cpu")
        _library.set_simd_level(before)
    elif name == "emulated":
        try:
            _library.load_emulated()
        except OSError as error:
            if os.environ.get("ARIMG_REQUIRE_EMULATOR") == "1":
                raise
            pytest.skip(f"no emulated kernels: {error}")
        _shuffle_threads(request.node.name)
        with _library.emulated_cuda(), GuardInputs("arimg_emulated"):
            yield Backend(name, "cpu")
    else:
        if not (torch.cuda.is_available() and _library.cuda_usable()):
            pytest.skip("no GPU, or a build without CUDA operators")
        yield Backend(name, "cuda")


def _shuffle_threads(test: str) -> None:
    # Each test sees the threads in another order, always the same one, unless the environment asks for one.
    if "ARIMG_EMULATOR_SEED" not in os.environ:
        emulator = ctypes.CDLL(str(_library.library_dir() / "_emulated.so"))
        emulator.arimg_emulator_set_seed(ctypes.c_uint64(zlib.crc32(test.encode())))


def pytest_report_header(config: pytest.Config) -> str:
    import arimg

    return arimg.show_config()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A suite that silently ran on the reference would test nothing.
    if _library.problem() is not None and os.environ.get("ARIMG_ALLOW_REFERENCE") != "1":
        raise pytest.UsageError(f"the compiled operators did not load: {_library.problem()}")
