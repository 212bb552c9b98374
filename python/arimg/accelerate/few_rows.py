"""Products of a few rows with the weights of linear layers: their own, or on the CPU copies of another type.

Copies are kept beside the module, made anew when a weight has changed, and given up by `release`. On a GPU
the products are torch's.
"""

from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import _library
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin
from arimg.accelerate.view import Storage, source_of
from arimg.nn.packed_linear import pack_weight
from arimg.ops._common import FLOATING, kernels
from arimg.ops.block_linear import MAX_ROWS
from arimg.reference.block_linear import ACTIVATIONS as _FORMULAS
from arimg.reference.block_linear import QuantizedWeight

ACTIVATIONS = list(_FORMULAS)

_copies: WeakKeyDictionary[nn.Module, tuple[Any, Tensor | QuantizedWeight]] = WeakKeyDictionary()


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module without gradients is calling its class's forward, and nothing more."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether x is a few rows, and `usual`."""
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1] and usual(x, *weights)


def usual(x: Tensor, *weights: Tensor) -> bool:
    """Whether x has the weights' type where there are kernels, and no gradient, graph or autocast is on."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if x.dtype not in FLOATING or kernels(x) is None:
        return False
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return False
    return all(w.dtype == x.dtype and w.device == x.device for w in weights)


def product(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    factor: Tensor | QuantizedWeight | None = None,
    factor_bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(x weight^T + bias) (x factor^T + factor_bias) + residual for rows x [M, I] that fit.

    The operator behind `arimg.ops.linear_rows` without its checks, which take as long as a small product; on
    a GPU torch's products.
    """
    if not x.is_cpu:
        assert isinstance(weight, Tensor) and not isinstance(factor, QuantizedWeight)
        y = _FORMULAS[activation](F.linear(x, weight, bias))
        y = y if factor is None else y.mul_(F.linear(x, factor, factor_bias))
        return y if residual is None else y.add_(residual)
    return cast(Tensor, _operators().linear_rows(
        x, *_stored(weight), bias, *_stored(factor), factor_bias, residual, ACTIVATIONS.index(activation),
        weight.group if isinstance(weight, QuantizedWeight) else x.shape[1],
    ))  # fmt: skip


def _stored(weight: Tensor | QuantizedWeight | None) -> tuple[Tensor | None, Tensor | None]:
    return (weight.codes, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) weight for rows x [M, C], rounded between the two as the originals do."""
    zero = _zero(x.shape[1], x.dtype, x.device)
    return cast(Tensor, _operators().norm_modulate(x[None], zero, zero, eps, True))[0].mul_(weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension of x [..., C]; weight and bias as they broadcast."""
    zero = _zero(x.shape[-1], x.dtype, x.device)
    n = _operators().norm_modulate(x.reshape(1, -1, x.shape[-1]), zero, zero, eps, False)
    return torch.addcmul(bias, n.view(x.shape), weight)


def _operators() -> Any:
    return _library.ops()


@cache
def _zero(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, 1, channels, dtype=dtype, device=device)


def copies(storage: Storage, x: Tensor) -> bool:
    """Whether products run on copies: codes, or another type of float32 weights. On the CPU alone."""
    wanted = isinstance(storage, str) or (storage is not None and x.dtype == torch.float32)
    return wanted and x.is_cpu


def weight_of(
    owner: nn.Module, storage: Storage, *weights: Any, turned: bool = False
) -> Tensor | QuantizedWeight:
    """The weights one below the other: the given one itself, or a copy of all of them in another storage.

    owner: the module that the copy is kept for. turned: the weights are [I, O], and so is what is given back
    without a copy.
    """
    if not copies(storage, weights[0]):
        only: Tensor = weights[0]
        return only
    source = (storage, *map(source_of, weights))
    kept = _copies.get(owner)
    if kept is None or kept[0] != source:
        whole = [(w.t() if turned else w).detach() for w in weights]
        kept = _copies[owner] = (source, _copy(whole, storage))
    return kept[1]


def _copy(weights: list[Tensor], storage: Storage) -> Tensor | QuantizedWeight:
    if isinstance(storage, str):
        return pack_weight(torch.cat(weights), storage)
    return torch.cat([w.to(storage) for w in weights]).contiguous()


def release(module: nn.Module) -> None:
    """Gives up the copies that are kept for a module and the modules in it."""
    for part in module.modules():
        _copies.pop(part, None)


class FewRows(Mixin):
    """A linear layer that reads its weight once for a few rows (arimg.ops.linear_rows), on the CPU."""

    weights_storage: Storage

    def forward(self, input: Tensor) -> Tensor:
        module: Any = self
        weight, bias = module.weight, module.bias
        held = (weight,) if bias is None else (weight, bias)
        if not input.is_cpu or not fits(input, *held):
            return super().forward(input)  # type: ignore[misc, no-any-return]
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        out = product(rows, weight_of(module, self.weights_storage, weight), bias)
        return out.view(*input.shape[:-1], -1)

    def _arimg_release(self) -> None:
        super()._arimg_release()
        release(self)  # type: ignore[arg-type]


def recognise_head(report: Report, path: str, module: nn.Module) -> bool:
    """Vocabulary heads by name, and what makes an embedding of a picture's token in Janus."""
    names = path.split(".")
    heads = names[-1] == "lm_head" or {"generation_head", "generation_aligner"} & set(names)
    if type(module) is not nn.Linear or not heads:
        return False
    replace_linear(report, path, module)
    return True


def replace_linear(report: Report, path: str, linear: nn.Linear) -> None:
    """By `FewRows`, where that is faster."""
    weight = linear.weight
    if weight.is_cpu:
        report.swap_copied(linear, FewRows, path, "products of a few rows read the weight once", [weight])
    else:
        report.keep(linear, path, f"expected weights on the CPU, got {weight.device.type}: torch's product")


_PROBE = torch.linspace(-4, 4, 65)
_KNOWN: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation_name(function: Any) -> str | None:
    """The name of an activation in `linear_rows`, found by its values."""
    with torch.no_grad():
        try:
            values = function(_PROBE.clone())
        except (RuntimeError, TypeError):
            return None
    for name, known in _KNOWN.items():
        if torch.allclose(values, known(_PROBE), atol=1e-6, rtol=0):
            return name
    return None
