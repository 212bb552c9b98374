"""What this installation is and can do."""

from __future__ import annotations

import platform
import sys

import torch

from arimg import _library


def show_config() -> str:
    """Versions, SIMD level, CUDA architectures of the build, and what could not load and why, as a text."""
    from arimg import __version__

    problem = _library.problem()
    architectures = _library.cuda_architectures()
    lines = {
        "arimg": f"{__version__} ({_library.library_dir()})",
        "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "operators": "loaded"
        if problem is None
        else f"NOT LOADED, the slow reference runs instead: {problem}",
        "SIMD level": f"{_library.simd_level()} (this machine has {', '.join(_library.simd_levels())})",
        "CUDA": _cuda(architectures),
        "host module": _host(),
    }
    if problem is not None:
        del lines["SIMD level"]
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _cuda(architectures: list[str]) -> str:
    if not architectures:
        return "no CUDA operators in this build (no nvcc, or ARIMG_CUDA=OFF); CUDA tensors use the reference"
    built = "operators for sm_" + ", sm_".join(architectures)
    if torch.version.cuda is None:
        return f"{built}; this torch has no CUDA, so only the CPU operators run"
    if not torch.cuda.is_available():
        return f"{built}; torch has CUDA {torch.version.cuda}, but no GPU is visible"
    major, minor = torch.cuda.get_device_capability()
    newest = max(int(a.rstrip("af")) for a in architectures)
    here = f"{torch.cuda.get_device_name()} is sm_{major}{minor}"
    matches = [a for a in architectures if int(a.rstrip("af")) == major * 10 + minor]
    same_major = [a for a in architectures if a.isdigit() and int(a) // 10 == major and int(a) % 10 <= minor]
    if matches or same_major:
        return f"{built}; {here}"
    if major * 10 + minor > newest:
        return f"{built}; {here}, newer than the build: PTX is compiled at first use"
    return f"{built}; {here}: NO KERNEL FITS, build with ARIMG_CUDA_ARCHITECTURES={major}{minor}"


def _host() -> str:
    try:
        return f"compiled by {_library.host().build_info()['compiler']}"
    except ImportError as error:
        return f"NOT LOADED: {error}"
