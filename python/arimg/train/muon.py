"""Muon (Keller Jordan, 2024): momentum whose matrix is replaced by its nearest semi-orthogonal one.

torch.optim.Muon iterates in bfloat16, which a CPU without bfloat16 instructions emulates a hundred times
slower; here it is float32, and the processes of a run share the matrices among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic whose iteration carries (0, 1] near 1 in few steps


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration [M, N] -> about U V^T of its singular decomposition (values in 0.7 ... 1.2)."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """For matrices alone. An update's root mean square is 0.2 lr, about that of AdamW: their rates agree."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            if any(p.dim() != 2 for p in group["params"]):
                raise ValueError("expected matrices, got a parameter of other dimensions")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for p, update in zip(matrices, self._updates(matrices, group["momentum"])):
                scale = 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _updates(self, matrices: list[Tensor], momentum: float) -> list[Tensor]:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        updates = []
        for i, p in enumerate(matrices):
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            looked_ahead = p.grad.lerp(buffer, momentum)
            updates.append(orthogonalise(looked_ahead) if i % world == rank else torch.zeros_like(p))
        if world > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = [
                part.view_as(p) for part, p in zip(flat.split([p.numel() for p in matrices]), matrices)
            ]
        return updates
