"""The one place that loads the compiled libraries, and that explains a failure to.

`ops()` gives the namespace of registered operators, or None when they could not load; `problem()` says why
in one sentence. Environment: ARIMG_LIBRARY_DIR names another folder to load `_ops.so`, `_host` and
`_emulated.so` from (a development build); ARIMG_EMULATE_CUDA=1 routes every operator to the emulated CUDA
kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MINIMUM_TORCH = (2, 10)
SIMD_LEVELS = ("scalar", "avx2", "avx512")

_library: ctypes.CDLL | None = None
_problem: str | None = None
_emulated_problem: str | None = "not loaded (tests load it on demand)"
_emulate = False
_warned = False
_loaded: list[str] = []  # operator namespaces
_hooks: list[Callable[[str], object]] = []


def library_dir() -> Path:
    return Path(os.environ.get("ARIMG_LIBRARY_DIR") or Path(__file__).parent)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load_shared(name: str) -> ctypes.CDLL:
    path = library_dir() / f"{name}.so"
    if _torch_version() < MINIMUM_TORCH:
        raise OSError(
            f"the operators need torch >= 2.10 (libtorch stable ABI), got torch {torch.__version__}"
        )
    if not path.exists():
        raise OSError(
            f"{path.name} is not in {path.parent}: the package was not built (see README, 'make build')"
        )
    # torch.ops.load_library would hide the reason behind a generic message; ctypes does not.
    return ctypes.CDLL(str(path))


def _load() -> None:
    global _library, _problem
    try:
        _library = _load_shared("_ops")
    except OSError as error:
        _problem = str(error)
        return
    _library.arimg_cuda_architectures.restype = ctypes.c_char_p
    _loaded.append("arimg")


def on_load(hook: Callable[[str], object]) -> None:
    """Calls hook(namespace) for each operator library, now if it is loaded, else when it is."""
    _hooks.append(hook)
    for namespace in _loaded:
        hook(namespace)


def load_emulated() -> None:
    """Loads the emulated CUDA kernels (builds with ARIMG_EMULATOR=ON); raises OSError with the reason."""
    global _emulated_problem
    if _emulated_problem is not None:
        _load_shared("_emulated")
        _emulated_problem = None
        _loaded.append("arimg_emulated")
        for hook in _hooks:
            hook("arimg_emulated")


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Inside, operators on CPU tensors run the CUDA kernels in the emulator. For tests."""
    global _emulate
    load_emulated()
    before, _emulate = _emulate, True
    try:
        yield
    finally:
        _emulate = before


def emulating() -> bool:
    """Whether operators on CPU tensors run the CUDA kernels in the emulator."""
    return _emulate


def ops() -> Any | None:
    """`torch.ops.arimg`, or None (with one warning) when the library could not load."""
    global _warned
    if _emulate:
        return torch.ops.arimg_emulated
    if _library is not None:
        return torch.ops.arimg
    if not _warned:
        _warned = True
        warnings.warn(f"arimg runs without its compiled operators: {_problem}", RuntimeWarning, stacklevel=3)
    return None


def problem() -> str | None:
    """Why the operators could not load, or None."""
    return _problem


def cuda_architectures() -> list[str]:
    """Compute capabilities that the CUDA operators of this build were compiled for."""
    text = _library.arimg_cuda_architectures().decode() if _library is not None else ""
    return [a for a in text.split(",") if a]


def cuda_usable() -> bool:
    """True when this build has CUDA operators (every listed architecture, and PTX for newer ones)."""
    return _library is not None and bool(_library.arimg_cuda_architectures())


def simd_level() -> str | None:
    """The SIMD level that the CPU operators run at: scalar, avx2 or avx512; None when they are not loaded."""
    return SIMD_LEVELS[_library.arimg_simd_level()] if _library is not None else None


def simd_levels() -> list[str]:
    """The SIMD levels that this machine can run, lowest first."""
    return list(SIMD_LEVELS[: _library.arimg_detected_simd_level() + 1]) if _library is not None else []


def set_simd_level(level: str) -> None:
    """Forces a SIMD level, for tests and measurements.

    Raises ValueError for an unknown level or one that this machine lacks.
    """
    if level not in SIMD_LEVELS:
        raise ValueError(f"expected a SIMD level of {', '.join(SIMD_LEVELS)}, got {level!r}")
    if _library is None or not _library.arimg_set_simd_level(SIMD_LEVELS.index(level)):
        raise ValueError(
            f"expected a SIMD level that runs here ({', '.join(simd_levels()) or 'none'}), got {level!r}"
        )


def host() -> ModuleType:
    """The compiled host module; raises ImportError with the reason when it is missing."""
    if "ARIMG_LIBRARY_DIR" not in os.environ:
        return importlib.import_module("arimg._host")
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = library_dir() / f"_host{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location("arimg._host", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError(f"no _host module for this Python in {library_dir()}")


_load()
if os.environ.get("ARIMG_EMULATE_CUDA") == "1":
    load_emulated()
    _emulate = True
