"""Tensors that end at a forbidden page, so that a kernel that reads or writes past them is stopped."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor, same strides, whose last element lies within 16 bytes of a forbidden page.

    The copy starts at a multiple of 16 bytes like any tensor, hence the slack.
    """
    if x.numel() == 0:
        return x.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    room = -(-extent * x.element_size() // 16) * 16
    pages = -(-room // PAGE) + 1
    region = mmap.mmap(-1, pages * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    guard = base + (pages - 1) * PAGE
    if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(region, dtype=x.dtype, count=extent, offset=(pages - 1) * PAGE - room)
    flat.copy_(x.detach().as_strided((extent,), (1,)))
    return flat.as_strided(x.shape, x.stride())


class GuardInputs(TorchDispatchMode):
    """Within it, operators of one namespace get guarded copies of their CPU tensors.

    What an operator writes into its arguments is copied back.
    """

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != self.namespace:
            return func(*args, **kwargs)
        written: list[tuple[torch.Tensor, torch.Tensor]] = []

        def guard(value: Any, writes: bool) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(guard(v, writes) for v in value)
            if type(value) is not torch.Tensor or value.device.type != "cpu":
                return value
            copy = guarded(value)
            if writes:
                written.append((value, copy))
            return copy

        schema = func._schema.arguments
        writes = {a.name: a.alias_info is not None and a.alias_info.is_write for a in schema}
        new_args = [guard(value, writes[a.name]) for a, value in zip(schema, args, strict=False)]
        new_kwargs = {name: guard(value, writes[name]) for name, value in kwargs.items()}
        out = func(*new_args, **new_kwargs)
        for value, copy in written:
            value.copy_(copy)
        return out
