"""The most confident proposals and bits drawn from pairs of logits, composed of sorts and of `sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.reference.sampling import Drawn, sample


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


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., d <= 63] -> int64 [...], the first bit the most significant."""
    shift = torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits.long() << shift).sum(-1)


def sample_bits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """Each bit from its two logits: [R, ..., d, 2] -> bool [R, ..., d], or packed int64 [R, ...]."""
    d = logits.shape[-2]
    flat = logits.reshape(logits.shape[0], -1, 2)
    bits = sample(
        flat,
        seed=seed,
        position=position * d,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        guidance=guidance,
    )
    assert not isinstance(bits, Drawn)
    bits = bits.reshape(-1, *logits.shape[1:-1]).bool()
    return pack_bits(bits) if packed else bits
