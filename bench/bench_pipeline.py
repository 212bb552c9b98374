"""`arimg.pipelined` on two cores: a thread that generates beside one that decodes, against one after another.

The sequential loop runs with one thread and with two, the overlapped one with one thread for each stage and
with two (four threads on two cores). All take turns in one process; their pictures must be equal before, bit
for bit where the number of threads is the same. Weights of the large models are random.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arimg import benchmark, models, pipelined
from arimg.generators import VAR
from arimg.tokenizers import VQModel

SMOKE = os.environ.get("ARIMG_BENCH_SMOKE") == "1"


class Stages(NamedTuple):
    make: Callable[[int], Any]
    finish: Callable[[Any], Tensor]
    batches: int = 3
    rounds: int = 2


def emoji64() -> Stages:
    """The bundled model; 16 pictures at once."""
    model = models.load()
    labels = torch.full((16,), model.label("smileys/fluent"))
    make, finish, *_ = _var_stages(model.var, labels, **model.sampling)
    return Stages(make, finish, 2 if SMOKE else 8, rounds=6)


def var() -> Stages:
    """One picture at once, the transformer in bfloat16."""
    size = benchmark.MODELS["var-tiny" if SMOKE else "var-d16"]
    model = benchmark.build_var(size, torch.bfloat16)  # type: ignore[arg-type]
    return _var_stages(model, torch.tensor([207]))._replace(batches=2)


def _var_stages(var: VAR, labels: Tensor, **sampling: Any) -> Stages:
    def make(n: int) -> Tensor:
        *_, last = var.stream(labels, seed=n * len(labels), **sampling)
        return last.f_hat

    return Stages(make, var.tokenizer.decode_features)


def llamagen() -> Stages:
    """One picture at once, weights in int8, and the decoder of its tokenizer in float32."""
    size = benchmark.MODELS["llamagen-tiny" if SMOKE else "llamagen-b"]
    model = benchmark.build_llamagen(size, torch.float32)  # type: ignore[arg-type]
    model.pack("int8")
    tokenizer = VQModel(size.vocab, ch=32 if SMOKE else 128).eval().requires_grad_(False)
    return Stages(lambda n: model.generate([207], cfg=4.0, top_k=2000, seed=n), tokenizer.decode)


CASES = {
    "emoji64, 8 batches of 16": emoji64,
    "VAR, depth 16, 256 px, bfloat16, 2 batches of 1": var,
    "LlamaGen-B, 256 px, int8, 3 batches of 1": llamagen,
}


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_overlap(case: str, paired) -> None:
    make, finish, batches, rounds = CASES[case]()

    def sequential() -> list[Tensor]:
        return [finish(make(n)) for n in range(batches)]

    def overlapped() -> list[Tensor]:
        return list(pipelined(make, finish, range(batches)))

    def timed(function: Callable[[], Any], threads: int) -> Callable[[], float]:
        def seconds() -> float:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            start = time.perf_counter()
            pictures[threads].append(torch.cat(function()))
            passed = time.perf_counter() - start
            torch.set_num_threads(before)
            return passed

        return seconds

    pictures: dict[int, list[Tensor]] = {1: [], 2: []}
    finish(make(0))  # what is prepared at the first use
    ways = {
        "arimg": timed(overlapped, 1),
        "overlapped, 2 threads each": timed(overlapped, 2),
        "sequential, 1 thread": timed(sequential, 1),
        "sequential, 2 threads": timed(sequential, 2),
    }
    paired(f"{case}, ms for all", ways, rounds)
    for same in pictures.values():
        assert all(torch.equal(same[0], other) for other in same)
