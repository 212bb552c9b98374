"""Every `.cu` file compiles for GPUs without a warning and without spilled registers, and is listed in
docs/gpu-status.md. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "cuda" / "resource_usage.py"
spec = importlib.util.spec_from_file_location("resource_usage", SCRIPT)
assert spec is not None and spec.loader is not None
resource_usage = importlib.util.module_from_spec(spec)
sys.modules["resource_usage"] = resource_usage  # dataclasses look their module up
spec.loader.exec_module(resource_usage)

SOURCES = resource_usage.sources()

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5arimg12_GLOBAL__N_13addIfLi4EEEvPKfPfi' for 'sm_80'
ptxas info    : Function properties for _ZN5arimg12_GLOBAL__N_13addIfLi4EEEvPKfPfi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 18 registers, used 1 barriers, 256 bytes smem, 376 bytes cmem[0]
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", resource_usage.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_compiles_without_spills(source: Path, architecture: str) -> None:
    usages = resource_usage.compile_source(source, architecture)
    assert {u.kernel for u in usages} >= resource_usage.kernels_in(source)
    assert [u for u in usages if u.spills] == []


def test_spills_are_read_from_the_log() -> None:
    (usage,) = resource_usage.parse(LOG, "x.cu", "sm_80")
    assert usage == resource_usage.Usage("x.cu", "sm_80", "add", 18, 256, 16, 8, 12)
    assert usage.spills == 20


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_kernel_has_a_line_in_the_status_page(source: Path) -> None:
    page = resource_usage.DOCUMENT.read_text()
    name = source.relative_to(resource_usage.ROOT / "csrc").as_posix()
    missing = {k for k in resource_usage.kernels_in(source) if f"| {name} | `{k}` |" not in page}
    assert not missing, "run: python tests/cuda/resource_usage.py --write"
