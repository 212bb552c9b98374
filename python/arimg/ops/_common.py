"""What the public operations share: when a kernel may run, the checks, and the registration of fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from arimg import _library

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
Fake = TypeVar("Fake", bound=Callable[..., Any])


def kernels(*tensors: Tensor | None) -> Any | None:
    """The operator namespace to call for these tensors, or None when the reference formula must run.

    None when a gradient is asked for (the reference is differentiable; operators with a backward of their own
    do not pass through here), when the tensors live on a device without kernels, or when the library could
    not load (a warning says so once).
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return None
    first = next(t for t in tensors if t is not None) if tensors[0] is None else tensors[0]
    kind = first.device.type
    if kind == "cpu" or (kind == "cuda" and _library.cuda_usable()):
        return _library.ops()
    return None


def cpu_kernels(*tensors: Tensor | None) -> Any | None:
    """As `kernels`, for an operator that exists on the CPU alone."""
    given = [t for t in tensors if t is not None]
    if given[0].device.type != "cpu" or _library.emulating():
        return None
    return kernels(*tensors)


def expect_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"expected {name} of float32, bfloat16 or float16, got {x.dtype}")


def expect_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x must have the dtype and the device of other."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(x).__name__}")
    if x.dtype != other.dtype:
        raise TypeError(f"expected {name} of {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"expected {name} on {other_name}'s device {other.device}, got {x.device}")


def fake(name: str) -> Callable[[Fake], Fake]:
    """Registers the decorated shape function as an operator's fake, in the real and the emulated library."""

    def register(function: Fake) -> Fake:
        def attach(namespace: str) -> None:
            try:
                torch.library.register_fake(f"{namespace}::{name}", function)
            except RuntimeError as error:
                raise ImportError(
                    f"the compiled library in {_library.library_dir()} is older than this Python code (no "
                    f"operator {namespace}::{name}): build again"
                ) from error

        _library.on_load(attach)
        return function

    return register


class StraightThrough(torch.autograd.Function):
    """apply(x, codes): the values of codes, whose gradient goes to x unchanged (in x's dtype)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
