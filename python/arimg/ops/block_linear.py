"""Linear layers of a few rows, at the speed of reading their weights once. See docs/ops/block.md.

Up to MAX_ROWS rows run in the kernel; more rows, and calls that need a gradient, in torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import reference
from arimg.ops._common import FLOATING, expect_floating, expect_like, fake, kernels
from arimg.reference.block_linear import ACTIVATIONS, BLOCK, QuantizedWeight

__all__ = ["MAX_ROWS", "activate", "dequantize_weight", "gated_linear_rows", "linear_rows", "quantize_weight"]

MAX_ROWS = 16
_NAMES = list(ACTIVATIONS)  # the order of the enum Activation in csrc/block/linear_rows.h

dequantize_weight = reference.dequantize_weight


def quantize_weight(weight: Tensor, bits: int = 8, group: int | None = None) -> QuantizedWeight:
    """Rounds weight [O, I] to codes of 8 or 4 bits with one scale for `group` inputs of an output.

    group: a multiple of 32, or None: all inputs of an output for 8 bits, 128 for 4 bits. No weight is off by
    more than half its scale, so row x of a product by at most the sum of |x_i| scale_i / 2. Raises ValueError
    or TypeError for what does not fit, and for weights that are not finite.
    """
    expect_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"expected weight [O, I > 0], got {list(weight.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"expected 4 or 8 bits, got {bits}")
    if group is not None and (group <= 0 or group % BLOCK):
        raise ValueError(f"expected a group that is a multiple of {BLOCK}, got {group}")
    if weight.device.type != "meta" and not bool(weight.isfinite().all()):
        raise ValueError("expected finite weights, got NaN or infinity")
    return reference.quantize_weight(weight, bits, group)


def activate(x: Tensor, activation: str | None, factor: Tensor | None = None) -> Tensor:
    """activation(x) * factor, one pass: x and factor of one shape. Arithmetic is float32.

    activation: None, "gelu", "gelu_tanh", "silu" or "relu". With a factor it is the gated pair of SwiGLU.
    float64 runs the formula in torch. Raises ValueError or TypeError for shapes, dtypes or devices that do
    not fit.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        expect_floating("x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {_NAMES}, got {activation!r}")
    if factor is not None:
        expect_like("factor", factor, "x", x)
        if factor.shape != x.shape:
            raise ValueError(f"expected factor {list(x.shape)}, got {list(factor.shape)}")
    ops = None if x.dtype == torch.float64 else kernels(x, factor)
    if ops is None:
        return reference.activate(x, activation, factor)
    out: Tensor = ops.activate(
        x.contiguous(), None if factor is None else factor.contiguous(), _NAMES.index(activation)
    )
    return out


def linear_rows(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual: x [..., I], W [O, I], bias [O], residual [..., O] -> [..., O].

    weight: float32, bfloat16 or float16, or from `quantize_weight`. activation: None, "gelu", "gelu_tanh",
    "silu" or "relu". Sums are float32; bias, residual and the result have x's dtype. A row's bits do not
    depend on the other rows, up to MAX_ROWS of them; beyond, and where a gradient is needed, torch's product
    runs. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    outputs = _check(x, activation, weight=weight, bias=bias)
    if residual is not None:
        expect_like("residual", residual, "x", x)
        if residual.shape != (*x.shape[:-1], outputs):
            raise ValueError(f"expected residual {[*x.shape[:-1], outputs]}, got {list(residual.shape)}")
    if _rows(x) > MAX_ROWS:
        y = (
            activate(_torch_product(x, weight, bias), activation)
            if activation
            else _torch_product(x, weight, bias)
        )
        return y if residual is None else y + residual
    ops = kernels(x, *_tensors(weight), bias, residual)
    if ops is None:
        return reference.linear_rows(x, weight, bias, activation, residual)
    return _run(ops, x, weight, bias, None, None, residual, activation)


def gated_linear_rows(
    x: Tensor,
    gate: Tensor | QuantizedWeight,
    up: Tensor | QuantizedWeight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """activation(x G^T + gate_bias) * (x U^T + up_bias), the gated pair of SwiGLU in one pass: [..., O].

    gate and up have one shape and storage (both may be halves of one tensor); otherwise as `linear_rows`.
    """
    outputs = _check(x, activation, gate=gate, gate_bias=gate_bias)
    if _check(x, activation, up=up, up_bias=up_bias) != outputs or not _alike(gate, up):
        raise ValueError(f"expected gate and up of one shape and storage, got {_text(gate)} and {_text(up)}")
    if _rows(x) > MAX_ROWS:
        return activate(_torch_product(x, gate, gate_bias), activation, _torch_product(x, up, up_bias))
    ops = kernels(x, *_tensors(gate), *_tensors(up), gate_bias, up_bias)
    if ops is None:
        return reference.gated_linear_rows(x, gate, up, gate_bias, up_bias, activation)
    return _run(ops, x, gate, gate_bias, up, up_bias, None, activation)


def _run(
    ops: Any,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    factor: Tensor | QuantizedWeight | None,
    factor_bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The operator on rows; a 16-bit x with float weights of another type is computed in float32."""
    dtype = x.dtype
    if isinstance(weight, Tensor) and weight.dtype != dtype and dtype != torch.float32:
        x = x.float()
        bias, factor_bias, residual = (
            None if t is None else t.float() for t in (bias, factor_bias, residual)
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    codes, scales = _codes_and_scales(weight)
    factor_codes, factor_scales = _codes_and_scales(factor)
    group = weight.group if isinstance(weight, QuantizedWeight) else x.shape[-1]
    flat = None if residual is None else residual.reshape(-1, residual.shape[-1]).contiguous()
    out = ops.linear_rows(
        rows,
        codes,
        scales,
        None if bias is None else bias.contiguous(),
        factor_codes,
        factor_scales,
        None if factor_bias is None else factor_bias.contiguous(),
        flat,
        _NAMES.index(activation),
        group,
    )
    result: Tensor = out.reshape(*x.shape[:-1], out.shape[-1]).to(dtype)
    return result


def _codes_and_scales(weight: Tensor | QuantizedWeight | None) -> tuple[Tensor | None, Tensor | None]:
    if weight is None:
        return None, None
    data, scales = (weight.codes, weight.scales) if isinstance(weight, QuantizedWeight) else (weight, None)
    return data if data.stride(1) == 1 else data.contiguous(), scales


def _torch_product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    w = dequantize_weight(weight) if isinstance(weight, QuantizedWeight) else weight
    return F.linear(x, w.to(x.dtype), bias)


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _tensors(weight: Tensor | QuantizedWeight) -> tuple[Tensor, ...]:
    return (weight.codes, weight.scales) if isinstance(weight, QuantizedWeight) else (weight,)


def _storage(weight: Tensor | QuantizedWeight) -> tuple[torch.dtype, tuple[int, ...], int]:
    if isinstance(weight, QuantizedWeight):
        return weight.codes.dtype, tuple(weight.shape), weight.group
    return weight.dtype, tuple(weight.shape), 0


def _alike(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    return _storage(a) == _storage(b)


def _text(weight: Tensor | QuantizedWeight) -> str:
    dtype, shape, group = _storage(weight)
    return f"{dtype} {list(shape)}" + (f" with groups of {group}" if group else "")


def _check(x: Tensor, activation: str | None, **named: Tensor | QuantizedWeight | None) -> int:
    """Checks x, then weight and bias as named; gives the number of outputs."""
    expect_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"expected x [..., I > 0], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {_NAMES}, got {activation!r}")
    (name, weight), (bias_name, bias) = named.items()
    if isinstance(weight, QuantizedWeight):
        _check_quantized(name, weight)
    elif not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"expected {name} of float32, bfloat16 or float16 or from quantize_weight, got {what}"
        )
    assert weight is not None
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"expected {name} [O, {x.shape[-1]}], got {list(weight.shape)}")
    for t in _tensors(weight):
        if t.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {t.device}")
    outputs = int(weight.shape[0])
    if bias is not None:
        assert not isinstance(bias, QuantizedWeight)
        expect_like(bias_name, bias, "x", x)
        if bias.shape != (outputs,):
            raise ValueError(f"expected {bias_name} [{outputs}], got {list(bias.shape)}")
    return outputs


def _check_quantized(name: str, weight: QuantizedWeight) -> None:
    codes, scales, inputs, group = weight
    if codes.dtype not in (torch.int8, torch.uint8) or scales.dtype != torch.float32:
        raise TypeError(
            f"expected {name} of int8 or uint8 codes and float32 scales, got {codes.dtype} and {scales.dtype}"
        )
    columns = -(-inputs // BLOCK) * BLOCK // (1 if codes.dtype == torch.int8 else 2)
    if codes.dim() != 2 or codes.shape[1] != columns:
        raise ValueError(f"expected codes of {name} [O, {columns}], got {list(codes.shape)}")
    if group <= 0 or (group < inputs and group % BLOCK):
        raise ValueError(f"expected a group of {name} that is a multiple of {BLOCK}, got {group}")
    groups = -(-inputs // group)
    if scales.shape != (codes.shape[0], groups):
        raise ValueError(f"expected scales of {name} [{codes.shape[0]}, {groups}], got {list(scales.shape)}")


@fake("activate")
def _activate_fake(x: Tensor, factor: Tensor | None, activation: int) -> Tensor:
    return torch.empty_like(x)


@fake("linear_rows")
def _linear_rows_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    factor_scale: Tensor | None,
    factor_bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
