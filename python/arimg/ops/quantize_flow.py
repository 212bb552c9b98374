"""The softmax over a codebook and flows through it (Distilled Decoding 1, 2). See docs/ops/quantize.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import fake, kernels
from arimg.ops.quantize import expect_rows_and_codebook

__all__ = ["codebook_flow", "codebook_score", "codebook_softmax_mean", "codebook_velocity"]


def codebook_softmax_mean(
    x: Tensor, codebook: Tensor, logits: Tensor, scale: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """The mean of the codes under a prior and a Gaussian: x [N, D], codebook [K, D] -> [N, D], float32.

    sum_j w_j c_j with w = softmax_j(logits_j - |x - s c_j|^2 / (2 sigma^2)), without an N x K matrix but the
    logits. logits [K], [1, K] or [N, K] (log p of a prior, up to a constant; -inf excludes a code), scale s
    and sigma > 0 numbers or float32 [N]. A row whose exponents are all -inf gives 0, one with a NaN or +inf
    gives NaN.
    A row's result does not depend on the others. The gradient goes through the reference.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_rows_and_codebook(x, codebook)
    count, rows = codebook.shape[0], x.shape[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"expected floating logits, got {getattr(logits, 'dtype', type(logits).__name__)}")
    logits = logits[None] if logits.dim() == 1 else logits
    if logits.dim() != 2 or logits.shape[1] != count or logits.shape[0] not in (1, rows):
        raise ValueError(f"expected logits [1, {count}] or [{rows}, {count}], got {list(logits.shape)}")
    if logits.device != x.device:
        raise ValueError(f"expected logits on x's device {x.device}, got {logits.device}")
    s, width = _per_row("scale", scale, x), _per_row("sigma", sigma, x)
    x, codebook = x.float(), codebook.float()
    ops = kernels(x, codebook, logits, s, width)
    if ops is None:
        return reference.codebook_softmax_mean(x, codebook, logits, s, width)
    return ops.codebook_softmax_mean(
        x.detach().contiguous(), codebook.detach().contiguous(), logits.detach().contiguous(), s, width
    )


def codebook_velocity(x: Tensor, codebook: Tensor, logits: Tensor, t: float) -> Tensor:
    """dx/dt at 0 <= t < 1 of the flow from noise (t = 0) to a code drawn by the prior (t = 1): [N, D].

    x_t = (1 - t) noise + t c, so v = (E[c | x_t] - x) / (1 - t) (Distilled Decoding 1, arXiv 2412.17153).
    """
    if not 0 <= t < 1:
        raise ValueError(f"expected t in [0, 1), got {t}")
    return (codebook_softmax_mean(x, codebook, logits, t, 1 - t) - x.float()) / (1 - t)


def codebook_flow(
    noise: Tensor, codebook: Tensor, logits: Tensor, steps: int = 10, method: str = "heun"
) -> Tensor:
    """Carries noise [N, D] to codes by the flow of `codebook_velocity`: [N, D], float32.

    A deterministic map whose law over standard normal noise is the prior. `steps` equal steps of Heun (second
    order) or "euler"; the last is Euler's in both, which is the conditional mean E[c | x]. The nearest code
    of the result is the drawn one.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if method not in ("heun", "euler"):
        raise ValueError(f"expected the method heun or euler, got {method!r}")
    x, dt = noise.float(), 1 / steps
    for i in range(steps):
        v = codebook_velocity(x, codebook, logits, i / steps)
        if method == "heun" and i + 1 < steps:
            v = 0.5 * (v + codebook_velocity(x + dt * v, codebook, logits, (i + 1) / steps))
        x = x + dt * v
    return x


def codebook_score(x: Tensor, codebook: Tensor, logits: Tensor, t: float) -> Tensor:
    """The score of x_t = (1 - t) c + t noise, c drawn by the prior, 0 < t <= 1: gradient of log p, [N, D].

    ((1 - t) E[c | x_t] - x) / t^2 (Distilled Decoding 2; its time runs against that of DD1).
    """
    if not 0 < t <= 1:
        raise ValueError(f"expected t in (0, 1], got {t}")
    return ((1 - t) * codebook_softmax_mean(x, codebook, logits, 1 - t, t) - x.float()) / t**2


def _per_row(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.shape != (x.shape[0],) or value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"expected {name} a number or float32 [{x.shape[0]}] on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        return value.contiguous()
    if not math.isfinite(value) or (name == "sigma" and value <= 0):
        raise ValueError(f"expected a finite {name}{' above 0' if name == 'sigma' else ''}, got {value}")
    return torch.full((x.shape[0],), float(value), device=x.device)


@fake("codebook_softmax_mean")
def _softmax_mean_fake(x: Tensor, codebook: Tensor, logits: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
    return torch.empty_like(x)
