"""The most confident proposals of a step, by a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_most_confident(confidence: Tensor, count: int | Tensor, candidates: Tensor | None = None) -> Tensor:
    """bool [R, L]: the `count` (int, or int64 [R]) largest of each row, of equals the lower index.

    candidates bool [R, L]: nothing else is kept, and all of them where count exceeds them. A NaN is -inf.
    """
    value = torch.where(confidence.isnan(), -torch.inf, confidence.float())
    order = value.sort(dim=-1, descending=True, stable=True).indices
    left = torch.as_tensor(count, dtype=torch.int64, device=value.device).reshape(-1, 1)
    if candidates is not None:
        possible = candidates.gather(-1, order)
        chosen = possible & (possible.cumsum(-1) <= left)
    else:
        chosen = (torch.arange(value.shape[-1], device=value.device) < left).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, chosen)
