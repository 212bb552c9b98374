"""Linear layers of a few rows in plain torch: the oracle of `arimg.ops.block_linear`, and its weights.

Sums and activations are float32 (float64 for float64 inputs); results have the type of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide

BLOCK = 32  # inputs; rows of codes are padded to whole blocks
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def activate(x: Tensor, activation: str | None, factor: Tensor | None = None) -> Tensor:
    """activation(x) * factor, x and factor of one shape."""
    y = ACTIVATIONS[activation](wide(x))
    return (y if factor is None else y * wide(factor)).to(x.dtype)


class QuantizedWeight(NamedTuple):
    """A weight [O, I] as codes times scales; made by `quantize_weight`."""

    codes: Tensor
    """int8 [O, I'] or uint8 [O, I' / 2] (int4), I' = I rounded up to a multiple of 32"""
    scales: Tensor
    """float32 [O, ceil(I / group)]"""
    in_features: int
    group: int
    """inputs under one scale"""

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features


def quantize_weight(weight: Tensor, bits: int = 8, group: int | None = None) -> QuantizedWeight:
    """Rounds weight [O, I] to codes of 8 or 4 bits with one scale for `group` inputs of an output.

    The scale is the least that reaches the group's largest and smallest weight, max(max w / 127,
    -min w / 128) for 8 bits, with 7 and 8 for 4 bits, so no weight is off by more than half a scale (and
    rounding). group: a multiple of 32, or None: all inputs of an output for 8 bits, 128 for 4 bits.
    """
    out, inputs = weight.shape
    group = group or (128 if bits == 4 else inputs)
    if group >= inputs:
        group = inputs
    top = 2 ** (bits - 1) - 1
    groups = -(-inputs // group)
    w = F.pad(wide(weight.detach()), (0, groups * group - inputs)).view(out, groups, group)
    scales = torch.maximum(w.amax(-1) / top, -w.amin(-1) / (top + 1)).float()
    steps = torch.where(scales > 0, scales, 1.0)
    codes = (w / steps[..., None]).round().clamp(-top - 1, top).view(out, -1)[:, :inputs]
    codes = F.pad(codes.to(torch.int8), (0, -inputs % BLOCK))
    return QuantizedWeight(codes if bits == 8 else _pack(codes), scales.contiguous(), inputs, group)


def _pack(codes: Tensor) -> Tensor:
    """Byte j of a block: input j in its low half, input 16 + j in its high half, as value + 8."""
    halves = (codes.to(torch.int16) + 8).view(len(codes), -1, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).to(torch.uint8).flatten(1)


def _unpack(codes: Tensor) -> Tensor:
    blocks = codes.view(len(codes), -1, 16)
    return (torch.stack((blocks & 15, blocks >> 4), 2).to(torch.int8) - 8).flatten(1)


def dequantize_weight(weight: QuantizedWeight) -> Tensor:
    """The weight [O, I] that the codes and scales stand for, float32."""
    codes = weight.codes if weight.bits == 8 else _unpack(weight.codes)
    scales = weight.scales.repeat_interleave(weight.group, dim=1)[:, : weight.in_features]
    return codes[:, : weight.in_features] * scales


def linear_rows(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual."""
    y = ACTIVATIONS[activation](_product(x, weight, bias))
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def gated_linear_rows(
    x: Tensor,
    gate: Tensor | QuantizedWeight,
    up: Tensor | QuantizedWeight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """activation(x G^T + its bias) * (x U^T + its bias)."""
    return (ACTIVATIONS[activation](_product(x, gate, gate_bias)) * _product(x, up, up_bias)).to(x.dtype)


def _product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    w = dequantize_weight(weight) if isinstance(weight, QuantizedWeight) else weight
    return F.linear(wide(x), w.to(wide(x).dtype), None if bias is None else wide(bias))
