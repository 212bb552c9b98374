"""The multi-scale residual pyramid in plain torch: the oracle of `arimg.ops.pyramid`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.reference.precision import wide
from arimg.reference.pyramid_resize import area_down, resize
from arimg.reference.quantize import lookup, nearest_code


def residual_map(
    h: Tensor,
    size: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ratio: float = 0.5,
    *,
    up: str = "bicubic",
) -> Tensor:
    """What one scale adds to f_hat: the upsampled codes, mixed with their 3x3 convolution (phi) if there is
    one. Differentiable.

    h [B, C, h, w], weight [C, C, 3, 3], bias [C] -> u = (1 - ratio) up(h) + ratio conv(up(h)) [B, C, H, W].
    """
    v = resize(h, size, up)
    if weight is None or bias is None:
        return v
    return torch.lerp(v, F.conv2d(v, weight.to(v.dtype), bias.to(v.dtype), padding=1), ratio)


def accumulate_(
    f_hat: Tensor,
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ratio: float = 0.5,
    residual: Tensor | None = None,
    *,
    up: str = "bicubic",
) -> None:
    """In place f_hat += u and, where given, residual -= u, with u = `residual_map(h, ...)` in float32."""
    size = (f_hat.shape[-2], f_hat.shape[-1])
    if weight is not None and bias is not None:
        weight, bias = wide(weight), wide(bias)
    u = residual_map(wide(h), size, weight, bias, ratio, up=up)
    f_hat.copy_(wide(f_hat) + u)
    if residual is not None:
        residual.copy_(wide(residual) - u)


def sign_bits(x: Tensor) -> Tensor:
    """x [..., C] with C <= 64 -> int64 [...]: bit c is set where channel c is positive."""
    shifts = torch.arange(x.shape[-1], device=x.device)
    return ((x > 0).long() << shifts).sum(-1)


def sign_codes(index: Tensor, channels: int, sign: float | None = None) -> Tensor:
    """int64 [...] -> [..., channels] in float32: +sign where the channel's bit is set, else -sign (by default
    channels ** -0.5, a code of length 1).
    """
    bits = index.unsqueeze(-1) >> torch.arange(channels, device=index.device) & 1
    return (2 * bits - 1).float() * (channels**-0.5 if sign is None else sign)


def encode(
    f: Tensor,
    codebook: Tensor | None,
    weights: Tensor | None = None,
    biases: Tensor | None = None,
    scales: Sequence[tuple[int, int]] = (),
    phi: Sequence[int] | None = None,
    ratio: float = 0.5,
    *,
    up: str = "bicubic",
    residual: bool = True,
    metric: str = "l2",
    sign: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Multi-scale residual encode (VAR, arXiv 2404.02905, algorithm 1) and its variants.

    f [B, C, H, W], codebook [K, C], weights [P, C, C, 3, 3], biases [P, C], scales [(h, w), ...] from coarse
    to fine, phi[k] = the convolution that scale k uses. Returns the indices, int64 [B, h * w] per scale, and
    f_hat [B, C, H, W]. The residual is area-averaged to each scale but the last; both are
    carried in float32 whatever the dtype of f. Without weights there is no convolution; without a codebook
    codes are signs (`sign_bits`); without `residual` each scale codes f itself and f_hat is the last one.
    """
    rest = wide(f.detach().clone())
    f_hat = torch.zeros_like(rest)
    indices = []
    for k, (h, w) in enumerate(scales):
        small = rest if k == len(scales) - 1 else area_down(rest, (h, w))
        rows = small.permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        index = sign_bits(rows) if codebook is None else nearest_code(rows, codebook, metric)
        indices.append(index.reshape(len(f), h * w))
        if residual or k == len(scales) - 1:
            filters = _filters(weights, biases, phi, k)
            h_map = code_map(indices[-1], codebook, (h, w), f.shape[1], sign)
            accumulate_(f_hat, h_map, *filters, ratio, rest if residual else None, up=up)
    return indices, f_hat.to(f.dtype)


def features(
    indices: Sequence[Tensor],
    codebook: Tensor | None,
    weights: Tensor | None = None,
    biases: Tensor | None = None,
    scales: Sequence[tuple[int, int]] = (),
    phi: Sequence[int] | None = None,
    ratio: float = 0.5,
    *,
    up: str = "bicubic",
    residual: bool = True,
    sign: float | None = None,
    channels: int | None = None,
) -> Tensor:
    """f_hat [B, C, H, W] of the indices of the first scales, or of all: what `encode` returns with them.
    Differentiable in the codebook, the weights and the biases.
    """
    C = channels if codebook is None else codebook.shape[1]
    assert C is not None
    dtype = torch.float32 if codebook is None else codebook.dtype
    size = scales[-1]
    f_hat = wide(torch.zeros(len(indices[0]), C, *size, device=indices[0].device, dtype=dtype))
    first = 0 if residual else len(indices) - 1
    for k in range(first, len(indices)):
        weight, bias = _filters(weights, biases, phi, k)
        if weight is not None and bias is not None:
            weight, bias = wide(weight), wide(bias)
        h_map = wide(code_map(indices[k], codebook, scales[k], C, sign))
        f_hat = f_hat + residual_map(h_map, size, weight, bias, ratio, up=up)
    return f_hat.to(dtype)


def code_map(
    index: Tensor, codebook: Tensor | None, scale: tuple[int, int], channels: int, sign: float | None
) -> Tensor:
    """The codes of one scale as a map: int64 [B, h * w] -> [B, C, h, w]."""
    codes = sign_codes(index, channels, sign) if codebook is None else lookup(index, codebook)
    return codes.transpose(1, 2).reshape(len(index), channels, *scale)


def _filters(
    weights: Tensor | None, biases: Tensor | None, phi: Sequence[int] | None, k: int
) -> tuple[Tensor | None, Tensor | None]:
    if weights is None or biases is None or phi is None:
        return None, None
    return weights[phi[k]], biases[phi[k]]
