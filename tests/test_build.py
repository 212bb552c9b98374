"""The build itself: what the objects and the library may and may not contain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from arimg import _library

BUILD = _library.library_dir()


def run(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("level", _library.SIMD_LEVELS)
def test_no_inline_function_escapes_its_simd_level(level):
    """A weak symbol compiled with AVX-512 flags could be the copy that the linker keeps for every level."""
    objects = list((BUILD / "CMakeFiles" / f"arimg_cpu_{level}.dir").rglob("*.o"))
    if not objects:
        pytest.skip("not a build folder (an installed wheel keeps no objects)")
    for path in objects:
        for line in run("nm", "-C", path).splitlines():
            kind, name = line[17:18], line[19:]
            weak = kind in "WVu" and not name.startswith(("DW.ref", "__gxx"))
            assert not weak or f"arimg::{level}::" in name, f"{path.name}: weak symbol {name}"
            if kind == "T":
                assert name.startswith(f"arimg::{level}::"), f"{path.name}: {name} is outside its level"


def test_the_library_needs_libtorch_cpu_alone():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", BUILD / "_ops.so"))
    system = (
        "libc.so",
        "libm.so",
        "libstdc++.so",
        "libgcc_s.so",
        "ld-linux",
        "libdl.so",
        "libpthread.so",
        "librt.so",
    )
    assert [n for n in needed if not n.startswith(system)] == ["libtorch_cpu.so"]
    dynamic = run("readelf", "-d", BUILD / "_ops.so")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_only_the_named_symbols_are_exported():
    symbols = run("nm", "-D", "--defined-only", BUILD / "_ops.so").splitlines()
    named = {line.split()[-1].split("@")[0] for line in symbols if line.split()[-2] == "T"}
    assert named == {
        "arimg_cuda_architectures",
        "arimg_detected_simd_level",
        "arimg_set_simd_level",
        "arimg_simd_level",
    }


def test_every_operator_has_a_fake_and_every_family_a_document():
    import torch

    operators = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("arimg::")]
    assert operators
    for name in operators:
        packet = getattr(torch.ops.arimg, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(packet.name(), "Meta"), f"{name} has no fake"
    root = Path(__file__).parents[1]
    for family in ("quantize", "kv_cache", "pyramid", "attention", "sampling", "block"):
        assert (root / "docs" / "ops" / f"{family}.md").exists(), f"docs/ops/{family}.md is missing"
