"""What each CUDA kernel asks of a GPU: registers, shared memory, stack and spills, as ptxas reports them.

    python tests/cuda/resource_usage.py            prints the table, and fails if a kernel spills
    python tests/cuda/resource_usage.py --write    also writes it into docs/gpu-status.md

Needs nvcc, no GPU. Dynamic shared memory is chosen at launch and is not part of the table.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu-status.md"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-Werror", "all-warnings")
BEGIN, END = "<!-- resource usage: begin -->", "<!-- resource usage: end -->"


@dataclass(frozen=True)
class Usage:
    """One compiled function. `stack` and the spills are bytes per thread."""

    source: str
    architecture: str
    kernel: str  # without template arguments
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("**/*.cu"))


def kernels_in(source: Path) -> set[str]:
    """Names of the `__global__` functions that a file defines."""
    text = re.sub(r"//[^\n]*", "", source.read_text())
    bounds = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    return set(re.findall(rf"__global__\s+{bounds}void\s+{bounds}(\w+)", text))


def short_name(mangled: str) -> str:
    """`_ZN5arimg12_GLOBAL__N_17forwardIfLi64EEEvPKfi` -> `forward`: the last of the plain names in front."""
    rest = re.sub(r"^_ZN?", "", mangled)
    name = mangled
    while match := re.match(r"(\d+)", rest):
        begin, length = match.end(), int(match[1])
        name, rest = rest[begin : begin + length], rest[begin + length :]
    return name


def parse(log: str, source: str, architecture: str) -> list[Usage]:
    """The functions of one `nvcc -Xptxas -v` run."""
    found: list[tuple[str, dict[str, int]]] = []
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            found.append((match[1], {}))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            stack, stores, loads = map(int, match.groups())
            found[-1][1].update(stack=stack, spill_stores=stores, spill_loads=loads)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1][1].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return [
        Usage(source, architecture, short_name(name), **{"registers": 0, "shared": 0, **values})
        for name, values in found
    ]


def compile_source(source: Path, architecture: str) -> list[Usage]:
    """Compiles one file; raises RuntimeError with the compiler's words when it does not compile cleanly."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", f"-I{ROOT / 'csrc'}"]
        result = subprocess.run(
            [*command, str(source), "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True
        )
    if result.returncode != 0:
        raise RuntimeError(f"{source.name} for {architecture}:\n{result.stderr}")
    return parse(result.stderr, str(source.relative_to(ROOT / "csrc")), architecture)


def table(usages: Iterable[Usage]) -> str:
    """Markdown, one line per kernel and file: the instance that needs the most of each."""
    groups: dict[tuple[str, str], list[Usage]] = {}
    for usage in usages:
        groups.setdefault((usage.source, usage.kernel), []).append(usage)
    lines = [
        "| source | kernel | instances | " + " | ".join(f"registers {a}" for a in ARCHITECTURES)
        + " | static shared (bytes) | stack (bytes) | spills (bytes) |",
        "|---|---|" + "--:|" * (len(ARCHITECTURES) + 4),
    ]  # fmt: skip
    for (source, kernel), group in sorted(groups.items()):
        registers = [
            str(max((u.registers for u in group if u.architecture == a), default="-")) for a in ARCHITECTURES
        ]
        instances = max(sum(u.architecture == a for u in group) for a in ARCHITECTURES)
        worst = [max(u.shared for u in group), max(u.stack for u in group), max(u.spills for u in group)]
        lines.append(
            f"| {source} | `{kernel}` | {instances} | " + " | ".join([*registers, *map(str, worst)]) + " |"
        )
    return "\n".join(lines)


def write(text: str) -> None:
    document = DOCUMENT.read_text()
    before, rest = document.split(BEGIN, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu-status.md")
    write_it = parser.parse_args().write
    usages = [u for source in sources() for a in ARCHITECTURES for u in compile_source(source, a)]
    print(table(usages))
    if write_it:
        write(table(usages))
    spilling = [u for u in usages if u.spills]
    for u in spilling:
        print(f"spills: {u.source} {u.kernel} on {u.architecture}: {u.spills} bytes", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
