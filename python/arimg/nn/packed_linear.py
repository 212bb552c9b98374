"""A linear layer whose weight is stored as few bytes as wanted, for generation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.reference.block_linear import QuantizedWeight

_FLOAT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"int8": 8, "int4": 4}
CODES = tuple(BITS)


def pack_weight(weight: Tensor, storage: str, group: int | None = None) -> Tensor | QuantizedWeight:
    """The weight [O, I] stored as float32, bfloat16, float16, int8 or int4.

    group: inputs under one scale, for int8 and int4 (see `ops.quantize_weight`).
    """
    if storage in BITS:
        return ops.quantize_weight(weight, BITS[storage], group)
    if storage not in _FLOAT:
        raise ValueError(f"expected a storage of {[*_FLOAT, *BITS]}, got {storage!r}")
    if group is not None:
        raise ValueError(f"expected no group for {storage}, got {group}")
    return weight.to(_FLOAT[storage])


def pack_linears(module: nn.Module, storage: str, group: int | None = None) -> None:
    """Puts a PackedLinear in the place of every `nn.Linear` below the module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear.from_linear(child, storage, group=group))


class PackedLinear(nn.Module):
    """A linear layer without gradients to its weight; made by `from_linear`.

    It computes `ops.linear_rows`: at the speed of reading the weight up to 16 rows, through torch beyond.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if isinstance(weight, QuantizedWeight):
            self.group, stored, scales = weight.group, weight.codes, weight.scales
        else:
            self.group, stored, scales = 0, weight, None
        self.register_buffer("weight", stored)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, storage: str = "int8", *, group: int | None = None
    ) -> PackedLinear:
        """The layer with its weight stored as `pack_weight` does; the bias is kept."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(pack_weight(linear.weight.detach(), storage, group), bias)

    @property
    def packed(self) -> Tensor | QuantizedWeight:
        """The weight as `ops.linear_rows` takes it."""
        if self.scales is None:
            return self.weight
        return QuantizedWeight(self.weight, self.scales, self.in_features, self.group)

    def forward(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """activation(x W^T + bias) + residual: x [..., I] -> [..., O], in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear_rows(x, self.packed, bias, activation, residual)

    def gated(self, up: PackedLinear, x: Tensor, activation: str | None = "silu") -> Tensor:
        """activation(this layer) * up, both in one pass over x (SwiGLU)."""
        gate_bias, up_bias = (None if t is None else t.to(x.dtype) for t in (self.bias, up.bias))
        return ops.gated_linear_rows(x, self.packed, up.packed, gate_bias, up_bias, activation)

    def extra_repr(self) -> str:
        kind = {torch.int8: "int8", torch.uint8: "int4"}.get(self.weight.dtype, str(self.weight.dtype))
        group = f", group={self.group}" if self.group else ""
        return f"{self.in_features}, {self.out_features}, {kind}{group}, bias={self.bias is not None}"
