"""Forward passes and milliseconds of a trained system, beside the same network sampled by the plain
method.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from arimg.generators.loop import Turn
from arimg.systems.registry import Trained

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Way:
    """One picture at a time: passes through the backbone and milliseconds, medians; decoding not included."""

    passes: float
    ms: float


@dataclass(frozen=True)
class Measured:
    """What `measure` found. tokens: of a picture; ways: the system's own first, the plain method last."""

    tokens: int
    parameters: int
    ways: dict[str, Way] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times faster the system is than the plain method, where there are both."""
        ways = list(self.ways.values())
        return ways[-1].ms / ways[0].ms if len(ways) > 1 else None


def measure(trained: Trained, pictures: int = 4, seed: int = 0) -> Measured:
    """Generates `pictures` pictures by each way, one by one and in turn, after one for warming up."""
    ways = trained.model.ways()
    found: dict[str, list[Way]] = {name: [] for name in ways}
    tokens = 0
    for n in range(pictures + 1):
        label = torch.tensor([(seed + n) % len(trained.classes)])
        for name, way in ways.items():
            passes, tokens_here, seconds = _once(way, label, seed + n)
            if n:
                found[name].append(Way(passes, 1000 * seconds))
            tokens = tokens or tokens_here
    medians = {
        name: Way(statistics.median(w.passes for w in each), statistics.median(w.ms for w in each))
        for name, each in found.items()
    }
    return Measured(tokens, sum(p.numel() for p in trained.model.parameters()), medians)


def _once(way: Callable[[Tensor, int], Iterator[Turn]], label: Tensor, seed: int) -> tuple[int, int, float]:
    """Passes, tokens and seconds of one picture."""
    passes = tokens = 0
    started = time.perf_counter()
    for turn in way(label, seed):
        passes += 1
        if turn.length is not None:
            tokens += int(turn.length.sum())
        elif turn.done:
            tokens += turn.drawn.shape[1]
    return passes, tokens, time.perf_counter() - started


def read(path: Path = FILE) -> dict[str, Measured]:
    """What was measured, by name of the system."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {
        name: Measured(m["tokens"], m["parameters"], {way: Way(**w) for way, w in m["ways"].items()})
        for name, m in stored["systems"].items()
    }


def about(path: Path = FILE) -> str:
    """On which machine and when, in words."""
    return str(json.loads(path.read_text())["about"]) if path.exists() else ""


def write(measured: dict[str, Measured], words: str, path: Path = FILE) -> None:
    """Adds to what the file holds. words: on which machine and when; where empty, those of the file stay."""
    together = {**read(path), **measured}
    content = {"about": words or about(path), "systems": {name: asdict(m) for name, m in together.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n")
