"""A GPU for machines without one: tensors that say they are on `cuda`, with their values on the CPU.

Within `pretend_cuda()` the code takes every path that it takes for a GPU; the operators of arimg run their
CUDA kernels in the emulator and all others run on the CPU. What a GPU would refuse is refused: tensors of two
devices in one call, and host memory in a kernel of arimg. What would make the host wait is counted.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from arimg import _library
from guarded import GuardInputs

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default}  # may take tensors of two devices
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}


class OnCuda(torch.Tensor):
    """A tensor that says it is on the GPU; `value` is where it really is."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), value.stride(), value.storage_offset(), dtype=value.dtype, device=CUDA
        )
        made.value = value
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"OnCuda({self.value})"

    def tolist(self) -> Any:  # torch refuses these for wrappers
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended tensor outside `pretend_cuda()`")


class PretendCuda(TorchDispatchMode):
    """Runs operators on the values. waits: how often which of them would have made the host wait; kernels and
    on_host: how often which operator of arimg ran on tensors of the GPU, and on none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: list[torch.Tensor] = []
        known: dict[int, OnCuda] = {}

        def value(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            given.append(x)
            if isinstance(x, OnCuda):
                known[id(x.value)] = x
                return x.value
            return x

        inner = tree_map(value, (args, dict(kwargs)))
        on_gpu = self._device(func, given, kwargs)
        if func.namespace == "arimg_emulated":
            (self.kernels if on_gpu else self.on_host)[func._opname] += 1
        if func is aten._fused_sdp_choice.default:
            return 0  # plain matrix products: the fused ones of the CPU have other operators
        if kwargs.get("device") is not None:
            inner[1]["device"] = torch.device("cpu")
        inner[1].pop("pin_memory", None)
        out = func(*inner[0], **inner[1])
        if not on_gpu:
            return out

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else OnCuda(x)

        return tree_map(wrapped, out)

    def _device(self, func: Any, given: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether the results are on the GPU. Raises RuntimeError where a GPU would."""
        wanted = kwargs.get("device")
        on_gpu = [isinstance(x, OnCuda) for x in given]
        if func in WAITS and any(on_gpu):
            self.waits[str(func)] += 1
        if func in ACROSS:
            target = torch.device(wanted).type == "cuda" if wanted is not None else on_gpu[0]
            if any(on_gpu) and not target:
                self.waits["to the host"] += 1
            return target
        if func in INDEXED:
            if on_gpu[0] and any(x.dtype == torch.bool for x in given[1:]):
                self.waits["index by a mask"] += 1
            given, on_gpu = given[:1], on_gpu[:1]  # indices may lie on the host
        if wanted is not None:
            return torch.device(wanted).type == "cuda"
        ours = func.namespace.startswith("arimg")
        sides = {gpu for x, gpu in zip(given, on_gpu, strict=True) if ours or x.dim() or gpu}
        if len(sides) > 1:
            what = [f"{x.dtype}{list(x.shape)} on {x.device}" for x in given]
            raise RuntimeError(f"expected all tensors of {func} on one device, got {', '.join(what)}")
        return sides == {True}


@contextlib.contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """`device="cuda"` works within it, on the emulated kernels, which get guarded copies of their inputs."""
    with (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        _library.emulated_cuda(),
        GuardInputs("arimg_emulated"),
        _settings_of_wrappers(),
        _device_without_driver(),
        PretendCuda() as mode,
    ):
        yield mode


@contextlib.contextmanager
def _settings_of_wrappers() -> Iterator[None]:
    """`torch.tensor(values, device=...)` makes a tensor on the host and moves it by an operator; a module
    that moves gets other parameters, not other data.
    """
    lifts, swaps = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextlib.contextmanager
def _device_without_driver() -> Iterator[None]:
    """What torch asks to make a device the current one: for `cuda` that of `meta`, which does nothing.

    A build of torch without CUDA has none for `cuda` and would refuse views of the tensors above.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before
