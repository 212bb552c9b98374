"""Class labels, as every class-conditional generator takes them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_labels(
    labels: int | Sequence[int] | Tensor, num_classes: int, device: torch.device | None = None
) -> Tensor:
    """Check class labels and put "no class" (-1) at num_classes: int64 [B] on the device."""
    out = torch.as_tensor(labels, device=device)
    if out.is_floating_point() or out.is_complex() or out.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {out.dtype}")
    out = out.long().reshape(1) if out.dim() == 0 else out.long()
    if out.dim() != 1 or not len(out):
        raise ValueError(f"expected labels [B] with B > 0, got shape {list(out.shape)}")
    wrong = (out < -1) | (out > num_classes)
    if wrong.any():
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, or -1 for no class, got {out[wrong][0].item()}"
        )
    return torch.where(out < 0, num_classes, out)


def drop_labels(labels: Tensor, num_classes: int, rate: float) -> Tensor:
    """Checked labels of which each becomes "no class" with probability `rate`, for training."""
    if rate == 0:
        return labels
    dropped = torch.rand(len(labels), device=labels.device) < rate
    return torch.where(dropped, num_classes, labels)


def with_unconditional(labels: Tensor, num_classes: int, guided: bool) -> Tensor:
    """Checked labels of all rows of a generation: where guidance is on, "no class" for each behind them."""
    return torch.cat((labels, torch.full_like(labels, num_classes))) if guided else labels
