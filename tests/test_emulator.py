"""The emulator of CUDA kernels (tests/emulator) can fail: planted mistakes are caught, right twins pass.

The kernels are in tests/emulator/cases.cu, each as a right one and a broken one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from guarded import GuardInputs, guarded

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "emulator" / "cases.cu"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
CUDA_ERROR = 3  # arimg::Status
THREADS = 128  # of a block, as in cases.cu
SEEDS = (0, 1, 2, 3, 17)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "cases.so"
    flags = [
        "-std=c++20",
        "-O1",
        "-fno-strict-aliasing",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
    ]
    include = ["-DARIMG_EMULATOR", f"-I{ROOT}/tests/emulator", f"-I{ROOT}/csrc"]
    sources = ["-x", "c++", str(CASES), str(ROOT / "tests" / "emulator" / "engine.cpp")]
    subprocess.run([COMPILER, *flags, *include, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.arimg_emulator_last_error.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(autouse=True)
def usual_settings(cases: ctypes.CDLL) -> Iterator[None]:
    configure(cases, seed=1, races=True)
    yield


def configure(cases: ctypes.CDLL, *, seed: int, races: bool) -> None:
    cases.arimg_emulator_set_seed(ctypes.c_uint64(seed))
    cases.arimg_emulator_set_race_check(ctypes.c_int(races))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run(cases: ctypes.CDLL, name: str, broken: bool) -> tuple[int, str, np.ndarray, np.ndarray]:
    """Status, message, input and output of one case; small integers, so that every sum is exact."""
    given = guarded(torch.arange(1, 3 * THREADS + 1, dtype=torch.float32)).numpy()
    out = np.zeros_like(given)
    status = getattr(cases, f"case_{name}")(int(broken), pointer(given), pointer(out), len(given))
    return (
        status,
        cases.arimg_emulator_last_error().decode(),
        given.reshape(3, THREADS),
        out.reshape(3, THREADS),
    )


def pairs(x: np.ndarray) -> np.ndarray:
    return x + np.pad(x[:, 1:], ((0, 0), (0, 1)))


def half_warps(x: np.ndarray) -> np.ndarray:
    halves = x.reshape(3, -1, 2, 16).copy()
    halves[:, :, 0] = halves[:, :, 0].sum(-1, keepdims=True)
    return halves.reshape(x.shape)


EXPECTED = {
    "barrier": lambda x: x[:, ::-1],
    "bounds": pairs,
    "exited": lambda x: np.broadcast_to(x.sum(1, keepdims=True), x.shape),
    "divergent": lambda x: x[:, ::-1],
    "async_copy": lambda x: x,
    "async_barrier": lambda x: x,
    "mask": half_warps,
    "call_site": lambda x: np.repeat(x[:, ::32], 32, axis=1),
    "warp_order": lambda x: x.reshape(3, -1, 2)[:, :, ::-1].reshape(x.shape),
    "stuck": lambda x: np.repeat(x.reshape(3, -1, 32).sum(-1), 32, axis=1),
    "alignment": np.zeros_like,
    "unwritten": lambda x: np.broadcast_to(x.sum(1, keepdims=True), x.shape),
    "counter": lambda x: np.broadcast_to(x.sum(1, keepdims=True), x.shape),
    "global_bounds": lambda x: x,
    "shared_size": lambda x: x[:, ::-1],
}

# The message that each broken twin must give. `unwritten` and `async_copy` break no rule that the emulator
# knows; their poisoned memory shows in the result (below).
MESSAGES = {
    "barrier": r"race: (reads|writes) shared memory that thread \(\d+,0,0\) (wrote|read) at .*cases\.cu:\d+",
    "bounds": r"out of bounds: shared element 128 of 128",
    "exited": r"divergent barrier: 32 threads of the block have exited, 96 wait here",
    "divergent": r"divergent barrier: waits here while thread \(\d+,0,0\) waits at .*cases\.cu:\d+",
    "async_barrier": r"race: (reads|writes) shared memory that thread \(\d+,0,0\) (wrote|read)",
    "mask": r"warp collective.*lane",
    "call_site": r"warp collective here, while lane \d+ waits at .*cases\.cu:\d+",
    "warp_order": r"race: (reads|writes) shared memory that thread \(\d+,0,0\) (wrote|read)",
    "stuck": r"waits in a warp collective for lane 5, which waits at the barrier .*cases\.cu:\d+",
    "alignment": r"misaligned vector access to shared element \d+",
    "counter": r"race: (reads|updates) shared memory that thread \(\d+,0,0\) (updated|wrote|read)",
    "global_bounds": r"out of bounds: read of address 0x",
    "shared_size": r"the kernel takes 512 bytes of shared memory, the launch gives 16",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_right_kernels_pass(cases: ctypes.CDLL, name: str, seed: int) -> None:
    configure(cases, seed=seed, races=True)
    status, message, given, out = run(cases, name, broken=False)
    assert status == 0, message
    np.testing.assert_array_equal(out, EXPECTED[name](given))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MESSAGES)
def test_planted_mistakes_are_named(cases: ctypes.CDLL, name: str, seed: int) -> None:
    configure(cases, seed=seed, races=True)
    status, message, _, _ = run(cases, name, broken=True)
    assert status == CUDA_ERROR
    assert re.search(MESSAGES[name], message), message
    kernel = "barrier<false>" if name == "shared_size" else f"{name}<true>"
    assert re.search(
        rf"emulated kernel \({kernel}\), block \(\d,0,0\), thread \(\d+,0,0\), (\S+:\d+|global memory): ",
        message,
    )
    # The process is as good as new afterwards.
    status, message, given, out = run(cases, name, broken=False)
    assert status == 0, message
    np.testing.assert_array_equal(out, EXPECTED[name](given))


@pytest.mark.parametrize("name", ["async_copy", "unwritten"])
def test_poison_shows_in_the_result(cases: ctypes.CDLL, name: str) -> None:
    status, _, _, out = run(cases, name, broken=True)
    assert status == 0
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", ["barrier", "async_barrier", "warp_order", "counter"])
def test_order_alone_shows_races(cases: ctypes.CDLL, name: str) -> None:
    wrong = 0
    for seed in SEEDS:
        configure(cases, seed=seed, races=False)
        status, _, given, out = run(cases, name, broken=True)
        assert status == 0
        wrong += not np.array_equal(out, EXPECTED[name](given))
    assert wrong > len(SEEDS) // 2  # an order may hide one, which is what the race check is for


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "tf32"])
def test_tensor_cores_multiply(cases: ctypes.CDLL, dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(16, 16 * k, generator=generator).to(dtype)
    b = torch.randn(16 * k, 8, generator=generator).to(dtype)
    c = torch.full((16, 8), float("nan"))
    code = [torch.bfloat16, torch.float16, torch.float32].index(dtype)
    status = cases.multiply(code, *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)), k)
    assert status == 0, cases.arimg_emulator_last_error().decode()
    # 16-bit inputs multiply exactly, so what remains is the rounding of 16 k additions in fp32; tf32 rounds
    # each input to 11 significant bits.
    magnitude = a.double().abs() @ b.double().abs()
    unit = 2.0**-10 if dtype == torch.float32 else 16 * k * 2.0**-24
    assert bool(((c.double() - a.double() @ b.double()).abs() <= magnitude * unit).all())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nvcc_compiles_the_same_kernels(tmp_path: Path, architecture: str) -> None:
    command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    result = subprocess.run(
        [
            *command,
            "--expt-relaxed-constexpr",
            f"-I{ROOT}/csrc",
            "-c",
            str(CASES),
            "-o",
            str(tmp_path / "cases.o"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill", result.stderr)
    assert len(spills) >= 2 * (2 * len(EXPECTED) - 2) and set(spills) == {"0"}


def test_operator_inputs_are_guarded_and_written_back() -> None:
    seen = []

    def double_(x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append((x.data_ptr() + x.untyped_storage().nbytes(), x.stride(), y.stride()))
        x.mul_(2).add_(y)

    library = torch.library.Library("arimg_guard_test", "DEF")
    library.define("double_(Tensor(a!) x, Tensor y) -> ()")
    library.impl("double_", double_, "CPU")
    x = torch.arange(12.0).reshape(3, 4).t()
    expected = 2 * x + 1
    with GuardInputs("arimg_guard_test"):
        torch.ops.arimg_guard_test.double_(x, torch.ones(1).expand(4, 3))
    assert torch.equal(x, expected)
    end, *strides = seen[0]
    assert end % mmap.PAGESIZE == 0 and strides == [(1, 4), (0, 0)]
