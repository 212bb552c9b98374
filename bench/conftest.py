"""What every benchmark shares: ceilings measured in the same run, and the table printed at the end.

    @pytest.mark.parametrize("peer", ["arimg", "torch sort"])
    def test_x(peer, measure):
        measure("what is compared", peer, function, bytes=..., flops=...)

Rows of one group stand together: median, p10, p90, GB/s, GFLOP/s, percentages of the measured ceilings, and
how many times slower than the `arimg` row each is. pytest-benchmark does the timing (`--benchmark-json FILE`
keeps the raw numbers). Threads: ARIMG_BENCH_THREADS (1). ARIMG_BENCH_SMOKE=1 runs each row once, to show that
it works and that the results agree.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("ARIMG_BENCH_THREADS", "1"))
SMOKE = os.environ.get("ARIMG_BENCH_SMOKE") == "1"
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import pytest
import torch

from arimg import _library
from arimg.benchmark import best, reads

OURS = "arimg"
_rows: list[dict[str, Any]] = []
_ceilings: dict[str, float] = {}


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """GB/s of a copy (read + write) and of a read, GFLOP/s of a float32 GEMM, with the run's threads."""
    if not _ceilings:
        torch.set_num_threads(THREADS)
        rounds = 2 if SMOKE else 9
        source = torch.rand(32 * 2**20)
        target = torch.empty_like(source)
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        _ceilings["copy GB/s"] = 2 * source.nbytes / best(lambda: target.copy_(source), rounds) / 1e9
        _ceilings["read GB/s"] = source.nbytes / min(best(f, rounds) for f in reads(source)) / 1e9
        _ceilings["sgemm GFLOP/s"] = 2 * 1024**3 / best(lambda: a @ b, rounds) / 1e9
    return _ceilings


@pytest.fixture
def measure(benchmark: Any, ceilings: dict[str, float]) -> Callable[..., float]:
    """measure(group, name, function, *, bytes, flops, peak, rounds, ceiling) -> median seconds; once a test.

    ceiling: of the bytes, "copy" or "read". peak: bytes of memory that a call took, shown as a column of its
    own where one row gives it.
    """
    torch.set_num_threads(THREADS)

    def run(
        group: str,
        name: str,
        function: Callable[[], object],
        *,
        bytes: float = 0,
        flops: float = 0,
        peak: float = 0,
        rounds: int | None = None,
        ceiling: str = "copy",
    ) -> float:
        benchmark.group = group
        once = best(function, 1)  # also the warm-up
        rounds = 1 if SMOKE else rounds or max(5, min(100, int(1.5 / max(once, 1e-6))))
        # Short calls are timed in a loop, so that the clock's resolution does not show.
        inner = 1 if SMOKE else max(1, int(2e-4 / max(once, 1e-7)))
        benchmark.pedantic(function, rounds=rounds, iterations=inner)
        row = _row(group, name, benchmark.stats.stats.data)
        median: float = row["median_ms"] / 1e3
        if bytes:
            row["GB/s"] = bytes / median / 1e9
            row["ceiling"] = ceiling
            row[f"% {ceiling}"] = 100 * row["GB/s"] / ceilings[f"{ceiling} GB/s"]
        if flops:
            row["GFLOP/s"] = flops / median / 1e9
            row["% sgemm"] = 100 * row["GFLOP/s"] / ceilings["sgemm GFLOP/s"]
        if peak:
            row["peak MB"] = peak / 1e6
        benchmark.extra_info.update(row)
        _rows.append(row)
        return median

    return run


@pytest.fixture
def paired(benchmark: Any, ceilings: dict[str, float]) -> Callable[..., dict[str, float]]:
    """paired(group, functions, rounds, bytes) -> median seconds by name; once a test.

    The functions take turns, so that a change of the machine meets all of them. Each gives the seconds that
    it took itself. bytes: what each reads in these seconds.
    """
    torch.set_num_threads(THREADS)

    def run(
        group: str,
        functions: dict[str, Callable[[], float]],
        rounds: int = 3,
        bytes: dict[str, float] | None = None,
    ) -> dict[str, float]:
        benchmark.group = group
        times: dict[str, list[float]] = {name: [] for name in functions}

        def turn() -> None:
            for name, function in functions.items():
                times[name].append(function())

        benchmark.pedantic(turn, rounds=1 if SMOKE else rounds)
        rows = [_row(group, name, seconds) for name, seconds in times.items()]
        for row in rows if bytes else ():
            row["GB/s"] = bytes[row["name"]] / row["median_ms"] / 1e6
            row["ceiling"], row["% read"] = "read", 100 * row["GB/s"] / ceilings["read GB/s"]
        benchmark.extra_info["rows"] = rows
        _rows.extend(rows)
        return {row["name"]: row["median_ms"] / 1e3 for row in rows}

    return run


@pytest.fixture
def peaks() -> Callable[[str, str, str], None]:
    """peaks(script, model, peer): the peak of a process that accelerates is not above that of one that does
    not (but for a percent).

    `python script model ours-or-peer` makes one picture and prints its peak in KiB last.
    """

    def check(script: str, model: str, peer: str) -> None:
        found = {}
        for which in (OURS, peer):
            command = [sys.executable, script, model, which]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[which] = int(said.split()[-1])
        numbers = ", ".join(f"{name} {peak / 1e3:.0f}" for name, peak in found.items())
        print(f"\n{model}: peak of the process, MB: {numbers}")
        assert found[OURS] < 1.01 * found[peer] + 10e3

    return check


def _row(group: str, name: str, seconds: list[float]) -> dict[str, Any]:
    times = sorted(seconds)
    return {
        "group": group,
        "name": name,
        "median_ms": statistics.median(times) * 1e3,
        "p10_ms": times[len(times) // 10] * 1e3,
        "p90_ms": times[(len(times) * 9) // 10] * 1e3,
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host's name is nobody's business
    machine_info["arimg"] = {"simd": _library.simd_level(), "threads": THREADS, "torch": torch.__version__}
    machine_info["ceilings"] = _ceilings


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else "-"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    ceilings = ", ".join(f"{value:.1f} {name}" for name, value in _ceilings.items())
    write(
        f"\ntorch {torch.__version__}, SIMD {_library.simd_level()}, {THREADS} thread(s); "
        f"ceilings: {ceilings}"
    )
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _rows:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        ours = next((r["median_ms"] for r in rows if r["name"] == OURS), float("nan"))
        write(f"\n{group}")
        of_ceiling = f"% {rows[0].get('ceiling', 'copy')}"
        heads = "".join(f"{h:>8}" for h in ("GB/s", of_ceiling, "GFLOP/s", "% gemm", "ratio"))
        peaks = any("peak MB" in row for row in rows)
        write(f"  {'':30}{'median ms':>11}{'p10':>10}{'p90':>10}{heads}{'   peak MB' if peaks else ''}")
        for row in rows:
            write(
                f"  {row['name']:30}{row['median_ms']:11.4f}{row['p10_ms']:10.4f}{row['p90_ms']:10.4f}"
                f"{_number(row, 'GB/s', '.1f'):>8}{_number(row, of_ceiling, '.0f'):>8}"
                f"{_number(row, 'GFLOP/s', '.1f'):>8}{_number(row, '% sgemm', '.0f'):>8}"
                f"{row['median_ms'] / ours:7.2f}x"
                f"{_number(row, 'peak MB', '.1f').rjust(10) if peaks else ''}"
            )
