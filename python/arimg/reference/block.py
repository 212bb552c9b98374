"""The arithmetic between linear layers in plain torch: the oracle of `arimg.ops.block`.

x, y are [B, L, C]; scale, shift and gate broadcast as [B, 1, C]. Arithmetic is float32, results have the type
of x. All functions are differentiable.
"""

import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, norm: str = "layer"
) -> Tensor:
    """LayerNorm or RMSNorm over C without parameters, then * (1 + scale) + shift (adaptive norm)."""
    normalise = F.rms_norm if norm == "rms" else F.layer_norm
    normed = normalise(wide(x), x.shape[-1:], eps=eps)
    return (normed * (1 + wide(scale)) + wide(shift)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    return (wide(x) + wide(gate) * wide(y)).to(x.dtype)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate * y and the next sub-layer's input: (x_new, norm_modulate(x_new, scale, shift))."""
    x_new = gated_residual(x, y, gate)
    return x_new, norm_modulate(x_new, scale, shift, eps=eps, norm=norm)
