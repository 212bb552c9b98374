"""The training loop: schedule, EMA, checkpoints, logs and grids around any `Task`.

A run is a folder: `checkpoint.pt` (written whole or not at all), `log.jsonl`, `grid-<step>.png`. Everything
random in step n is drawn from a generator seeded by (seed, n), so a run that was killed and continued does
the same steps as one that was not.

Started by `torchrun --nproc-per-node N -m arimg train ...`, N processes share each batch; rank 0 writes.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from arimg.train.files import save_whole
from arimg.train.grid import save_png


class Task(Protocol):
    """What is trained. `modules` and `optimizers` are saved; EMA follows `modules["model"]`."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]

    def __len__(self) -> int:
        """Number of examples."""

    def weights(self) -> Tensor | None:
        """Sampling weight per example, or None: each once per epoch."""

    def step(self, indices: Tensor, step: int) -> dict[str, float]:
        """One optimizer step on these examples; returns values to log."""

    def grid(self, model: nn.Module) -> Tensor:
        """A picture [3, H, W] that shows the model's state."""


@dataclass(frozen=True)
class RunConfig:
    """Lengths in optimizer steps. `decay`: the last fraction of the steps, with a rate falling to zero."""

    out: Path
    steps: int = 10_000
    batch_size: int = 16
    seed: int = 0
    warmup: int = 100
    decay: float = 0.4
    ema: float = 0.999
    save_every: int = 200
    grid_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "grid_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.decay <= 1 or not 0 <= self.ema < 1:
            raise ValueError(f"expected decay in [0, 1] and ema in [0, 1), got {self.decay} and {self.ema}")


def rate_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warmup, a plateau, and a half cosine to zero over the last `decay` of the steps.

    The plateau does not depend on `steps`: a run can be continued with another length.
    """
    up = min(1.0, (step + 1) / max(warmup, 1))
    start = steps * (1 - decay)
    if step <= start:
        return up
    progress = min(1.0, (step - start) / max(steps - start, 1))
    return up * 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def batch_indices(count: int, batch_size: int, step: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """The examples of one step, a pure function of (seed, step). Weighted: drawn with replacement."""
    if weights is not None:
        return torch.multinomial(weights, batch_size, replacement=True, generator=generator_for(seed, step))
    first = step * batch_size
    positions = torch.arange(first, first + batch_size)
    picked = []
    for epoch in range(first // count, (first + batch_size - 1) // count + 1):
        order = torch.randperm(count, generator=generator_for(seed, epoch))
        picked.append(order[positions[positions // count == epoch] % count])
    return torch.cat(picked)


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) model with d rising from 0.1 to `decay`; buffers are copied."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        mine.copy_(theirs)


def bfloat16(enabled: bool) -> torch.autocast:
    """Autocast of matrix products and convolutions to bfloat16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def start_processes() -> tuple[int, int]:
    """(rank, number of processes) of this run; joins the group that torchrun describes in the environment."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_process() -> bool:
    """True in the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others do, who find what it left on disk."""
    rank, processes = start_processes()
    if processes > 1 and rank > 0:
        dist.barrier()
    yield
    if processes > 1 and rank == 0:
        dist.barrier()


def descend(optimizers: Iterable[torch.optim.Optimizer], clip: float = 1.0) -> None:
    """Steps on the parameters' gradients, averaged over the processes and clipped in norm."""
    optimizers = list(optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    for optimizer in optimizers:
        optimizer.step()


class Checkpoint:
    """One file that is replaced atomically, so a kill at any moment leaves the last complete state."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"

    def save(self, task: Task, ema: nn.Module, step: int) -> None:
        state = {
            "step": step,
            "ema": ema.state_dict(),
            "modules": {k: m.state_dict() for k, m in task.modules.items()},
            "optimizers": {k: o.state_dict() for k, o in task.optimizers.items()},
        }
        save_whole(state, self.path)

    def restore(self, task: Task, ema: nn.Module) -> int:
        """Loads the state into `task` and `ema`; returns the number of steps done, 0 without a checkpoint."""
        if not self.path.exists():
            return 0
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        try:
            ema.load_state_dict(state["ema"])
            for name, module in task.modules.items():
                module.load_state_dict(state["modules"][name])
            for name, optimizer in task.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            first = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path} was written by a run with other settings: {first}") from error
        return int(state["step"])


def fit(task: Task, config: RunConfig, settings: dict[str, Any] | None = None) -> nn.Module:
    """Trains until `config.steps`, continuing a run found in `config.out`; returns the EMA model."""
    config.out.mkdir(parents=True, exist_ok=True)
    rank, processes = start_processes()
    ema = copy.deepcopy(task.modules["model"]).eval().requires_grad_(False)
    checkpoint = Checkpoint(config.out)
    done = checkpoint.restore(task, ema)
    record = {
        "run": {k: str(v) for k, v in asdict(config).items()},
        "settings": settings or {},
        "from_step": done,
    }
    if rank == 0:
        _log(config.out, record)
    base_rates = {
        name: [g.setdefault("base_lr", g["lr"]) for g in o.param_groups]
        for name, o in task.optimizers.items()
    }
    weights = task.weights()
    shown: dict[str, float] = {}
    started = time.monotonic()
    bar = tqdm(
        range(done, config.steps),
        initial=done,
        total=config.steps,
        unit="step",
        mininterval=5.0,
        disable=rank > 0,
    )
    for step in bar:
        factor = rate_factor(step, config.steps, config.warmup, config.decay)
        for name, optimizer in task.optimizers.items():
            for group, rate in zip(optimizer.param_groups, base_rates[name]):
                group["lr"] = rate * factor
        torch.manual_seed(config.seed * 1_000_003 + step * processes + rank)
        indices = batch_indices(len(task), config.batch_size, step, config.seed, weights)
        values = task.step(indices[rank::processes], step)
        update_ema(ema, task.modules["model"], config.ema, step)
        for key, value in values.items():
            shown[key] = value if key not in shown else 0.98 * shown[key] + 0.02 * value
        finished = step + 1
        if rank > 0:
            continue
        if finished % 20 == 0:
            speed = (finished - done) * config.batch_size / (time.monotonic() - started)
            bar.set_postfix(
                {**{k: f"{v:.4f}" for k, v in shown.items()}, "img/s": f"{speed:.0f}"}, refresh=False
            )
        if finished % 100 == 0:
            speed = (finished - done) * config.batch_size / (time.monotonic() - started)
            _log(
                config.out, {"step": finished, "seconds": time.monotonic() - started, "img/s": speed, **shown}
            )
        if finished % config.grid_every == 0 or finished == config.steps:
            save_png(task.grid(ema), config.out / f"grid-{finished:06d}.png")
        if finished % config.save_every == 0 or finished == config.steps:
            checkpoint.save(task, ema, finished)
    return ema


def _log(folder: Path, record: dict[str, Any]) -> None:
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
