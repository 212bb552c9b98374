"""Linear layers. The one place that decides how a matrix product runs."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.ops.block_linear import MAX_ROWS
from arimg.reference.block_linear import QuantizedWeight

_FEW_ROWS = (
    8  # up to here a 16-bit product is bound by reading the weight, and its own type reads half as much
)
_LARGE = 2**18  # weights; below, a call takes longer than reading them


class Linear(nn.Linear):
    """`nn.Linear` that goes through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@cache
def _computes_16_bit() -> bool:
    """Whether this CPU multiplies 16-bit floats at full speed (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C], weight [N, C], bias [N] -> x weight^T + bias [..., N].

    On a CPU without 16-bit arithmetic, a bfloat16 or float16 product of more than a few rows converts its
    operands to float32: measured on Zen 3, 512 rows run at 19 GFLOP/s in bfloat16 and at 78 in float32. Up to
    MAX_ROWS rows over a large weight run at the speed of reading it (`ops.linear_rows`): measured on Zen 4,
    1.02 to 3.2 times as fast as torch.
    """
    large = x.device.type == "cpu" and weight.numel() >= _LARGE and weight.dtype == x.dtype
    if large and _reads_weight(x, weight) and (bias is None or bias.dtype == x.dtype):
        return ops.linear_rows(x, weight, bias)
    half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x.dtype
    if half and x.device.type == "cpu" and x.numel() > _FEW_ROWS * x.shape[-1] and not _computes_16_bit():
        out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return out.to(x.dtype)
    return F.linear(x, weight, bias)


def narrow_linear(x: Tensor, weight: Tensor | QuantizedWeight, residual: Tensor | None = None) -> Tensor:
    """x weight^T (+ residual) in x's dtype, for a float32 x and a weight of any floating type or of codes.

    Up to MAX_ROWS rows without gradients run at the speed of reading the weight (`ops.linear_rows`); others
    are products of torch in the weight's type. With codes, more rows run MAX_ROWS at a time.
    """
    if isinstance(weight, QuantizedWeight):
        return _few_at_a_time(lambda x, r: ops.linear_rows(x, weight, residual=r), x, residual)
    if _reads_weight(x, weight):
        return ops.linear_rows(x, weight, residual=residual)
    out = linear(x.to(weight.dtype), weight).to(x.dtype)
    return out if residual is None else out + residual


def narrow_swiglu(x: Tensor, gate: Tensor | QuantizedWeight, up: Tensor | QuantizedWeight) -> Tensor:
    """silu(x gate^T) * (x up^T), as `narrow_linear`; gate and up are stored alike."""
    if isinstance(gate, QuantizedWeight) or isinstance(up, QuantizedWeight):
        return _few_at_a_time(lambda x, _: ops.gated_linear_rows(x, gate, up), x, None)
    if _reads_weight(x, gate, up):
        return ops.gated_linear_rows(x, gate, up)
    narrow = x.to(gate.dtype)
    return ops.activate(linear(narrow, gate), "silu", linear(narrow, up)).to(x.dtype)


def _few_at_a_time(
    product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None
) -> Tensor:
    """product(x, residual), MAX_ROWS rows at a time: codes are never multiplied out, and a row's bits depend
    on nothing else.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= MAX_ROWS:
        return product(x, residual)
    parts = rows.split(MAX_ROWS)
    added = [None] * len(parts) if residual is None else residual.reshape(len(rows), -1).split(MAX_ROWS)
    return torch.cat([product(*pair) for pair in zip(parts, added)]).view(*x.shape[:-1], -1)


def _reads_weight(x: Tensor, *weights: Tensor) -> bool:
    """Whether the product takes its time from reading the weight and the kernel for it may run."""
    if x.numel() > MAX_ROWS * x.shape[-1] or torch.is_autocast_enabled(x.device.type):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)))
