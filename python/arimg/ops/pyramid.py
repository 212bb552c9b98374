"""Resampling of feature maps and VAR's multi-scale residual encode. See docs/ops/pyramid.md.

float32, bfloat16 or float16; arithmetic in float32; results have the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels

__all__ = ["accumulate_", "area_down", "bicubic_up", "encode"]


def area_down(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean over the cell of each output pixel: x [B, C, H, W] -> [B, C, h, w], as `F.interpolate`'s "area".

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    h, w = _check_resize(x, size)
    ops = kernels(x)
    return reference.area_down(x, (h, w)) if ops is None else ops.area_down(x.contiguous(), h, w)


def bicubic_up(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resampling: x [B, C, h, w] -> [B, C, H, W], as `F.interpolate(mode="bicubic")` (a = -0.75).

    Raises ValueError or TypeError for shapes or dtypes that do not fit.
    """
    h, w = _check_resize(x, size)
    ops = kernels(x)
    return reference.bicubic_up(x, (h, w)) if ops is None else ops.bicubic_up(x.contiguous(), h, w)


def accumulate_(
    f_hat: Tensor, h: Tensor, weight: Tensor, bias: Tensor, ratio: float = 0.5, residual: Tensor | None = None
) -> None:
    """In place f_hat += u and, where given, residual -= u, in one call.

    u = (1 - ratio) v + ratio (conv3x3(v) + bias) with v = bicubic_up(h, (H, W)) (VAR, arXiv 2404.02905,
    algorithms 1 and 2). f_hat and residual [B, C, H, W], h [B, C, h, w], weight [C, C, 3, 3], bias [C].
    Weight and bias share a dtype, which may differ from f_hat's. A transposed view of codes [B, h * w, C]
    serves as h without a copy.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("f_hat", f_hat)
    if f_hat.dim() != 4:
        raise ValueError(f"expected f_hat [B, C, H, W], got {list(f_hat.shape)}")
    B, C = f_hat.shape[0], f_hat.shape[1]
    _expect_map("h", h, f_hat)
    if not (h.shape[0] == B and h.shape[1] == C and h.shape[2] > 0 and h.shape[3] > 0):
        raise ValueError(f"expected h [{B}, {C}, h, w], got {list(h.shape)}")
    _expect_filter(weight, bias, (C, C, 3, 3), f_hat)
    if residual is not None:
        expect_like("residual", residual, "f_hat", f_hat)
        if residual.shape != f_hat.shape:
            raise ValueError(
                f"expected residual of f_hat's shape {list(f_hat.shape)}, got {list(residual.shape)}"
            )
    ops = kernels(f_hat, h, weight, bias, residual)
    if ops is None:
        return reference.accumulate_(f_hat, h, weight, bias, ratio, residual)
    into = f_hat.contiguous()
    rest = None if residual is None else residual.contiguous()
    ops.accumulate_(into, _evenly_spaced(h), weight.contiguous(), bias.contiguous(), ratio, rest)
    if not f_hat.is_contiguous():
        f_hat.copy_(into)
    if residual is not None and rest is not None and not residual.is_contiguous():
        residual.copy_(rest)
    return None


def encode(
    f: Tensor,
    codebook: Tensor,
    weights: Tensor,
    biases: Tensor,
    scales: Sequence[tuple[int, int]],
    phi: Sequence[int],
    ratio: float = 0.5,
) -> tuple[list[Tensor], Tensor]:
    """The whole multi-scale residual encode of VAR (arXiv 2404.02905, algorithm 1) in one call; no gradient.

    f [B, C, H, W], codebook [K, C], weights [P, C, C, 3, 3], biases [P, C], scales [(h, w), ...] from coarse
    to fine with (H, W) last, phi[k] = the convolution that scale k uses. Per scale: the residual, averaged to
    (h, w); its nearest codes (l2); `accumulate_`. Returns the indices, int64 [B, h * w] per scale, and f_hat
    [B, C, H, W]. Residual and f_hat are carried in float32 whatever the dtype of f.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("f", f)
    if f.dim() != 4 or f.shape[1] == 0 or f.shape[2] == 0 or f.shape[3] == 0:
        raise ValueError(f"expected f [B, C, H, W] with C, H, W > 0, got {list(f.shape)}")
    B, C, H, W = f.shape
    _expect_map("codebook", codebook, f)
    if codebook.dim() != 2 or codebook.shape[0] == 0 or codebook.shape[1] != C:
        raise ValueError(f"expected codebook [K, {C}] with K > 0, got {list(codebook.shape)}")
    count = weights.shape[0] if isinstance(weights, Tensor) and weights.dim() > 0 else 0
    _expect_filter(weights, biases, (count, C, C, 3, 3), f, plural=True)
    _check_scales([tuple(s) for s in scales], list(phi), (H, W), count)
    ops = kernels(*(t.detach() for t in (f, codebook, weights, biases)))
    if ops is None:
        with torch.no_grad():
            return reference.encode(f, codebook, weights, biases, scales, phi, ratio)
    arguments = [t.detach().contiguous() for t in (f, codebook, weights, biases)]
    flat, f_hat = ops.encode(*arguments, [n for scale in scales for n in scale], list(phi), ratio)
    parts = flat.split([B * h * w for h, w in scales])
    return [part.reshape(B, h * w) for part, (h, w) in zip(parts, scales)], f_hat


def _check_resize(x: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    expect_floating("x", x)
    if x.dim() != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"expected x [B, C, H, W] with H, W > 0, got {list(x.shape)}")
    if len(size) != 2 or size[0] <= 0 or size[1] <= 0:
        raise ValueError(f"expected a size of two positive numbers, got {tuple(size)}")
    return size[0], size[1]


def _expect_map(name: str, t: Tensor, other: Tensor) -> None:
    expect_floating(name, t)
    if t.device != other.device:
        raise ValueError(f"expected {name} on device {other.device}, got {t.device}")
    if name == "h" and t.dim() != 4:
        raise ValueError(f"expected h [B, C, h, w], got {list(t.shape)}")


def _expect_filter(
    weight: Tensor, bias: Tensor, shape: tuple[int, ...], other: Tensor, plural: bool = False
) -> None:
    names = ("weights", "biases") if plural else ("weight", "bias")
    _expect_map(names[0], weight, other)
    expect_like(names[1], bias, names[0], weight)
    if tuple(weight.shape) != shape:
        raise ValueError(f"expected {names[0]} {list(shape)}, got {list(weight.shape)}")
    if tuple(bias.shape) != shape[:-3]:
        raise ValueError(f"expected {names[1]} {list(shape[:-3])}, got {list(bias.shape)}")


def _check_scales(scales: list[tuple[int, ...]], phi: list[int], size: tuple[int, int], count: int) -> None:
    fits = all(len(s) == 2 and 0 < s[0] <= size[0] and 0 < s[1] <= size[1] for s in scales)
    if not scales or not fits or scales[-1] != size:
        raise ValueError(f"expected scales (h, w) within {size} that end with it, got {scales}")
    if len(phi) != len(scales) or not all(0 <= i < count for i in phi):
        raise ValueError(f"expected a phi of 0..{count - 1} for each of {len(scales)} scales, got {phi}")


def _evenly_spaced(h: Tensor) -> Tensor:
    """h itself where its pixels lie at equal distances (planes, or rows of channels), else a copy."""
    even = h.shape[2] == 1 or h.shape[3] == 1 or h.stride(2) == h.shape[3] * h.stride(3)
    return h if even else h.contiguous()


@fake("area_down")
def _area_down_fake(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], height, width)


@fake("bicubic_up")
def _bicubic_up_fake(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], height, width)


@fake("accumulate_")
def _accumulate_fake(
    f_hat: Tensor, h: Tensor, weight: Tensor, bias: Tensor, ratio: float, residual: Tensor | None
) -> None:
    return None


@fake("encode")
def _encode_fake(
    f: Tensor,
    codebook: Tensor,
    weights: Tensor,
    biases: Tensor,
    scales: Sequence[int],
    phi: Sequence[int],
    ratio: float,
) -> tuple[Tensor, Tensor]:
    pixels = sum(h * w for h, w in zip(scales[::2], scales[1::2]))
    return f.new_empty(f.shape[0] * pixels, dtype=torch.int64), torch.empty_like(f)
