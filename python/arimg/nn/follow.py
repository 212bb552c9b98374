"""Modules that a model uses without owning them."""

from __future__ import annotations

from torch import device, nn


def follow(module: nn.Module, to: device) -> None:
    """Moves a module to the device of the model that uses it, in its own type. Meta tensors stay."""
    held = [*module.parameters(), *module.buffers()]
    if to.type != "meta" and not any(t.is_meta for t in held):
        module.to(to)
