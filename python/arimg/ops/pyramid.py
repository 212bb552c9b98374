"""Multi-scale residual pyramids: VAR's encode and decode in one call, and their variants as data.

float32, bfloat16 or float16; arithmetic in float32; results have the input's dtype. See docs/ops/pyramid.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, expect_like, fake, kernels
from arimg.ops.pyramid_resize import MODES, area_down
from arimg.ops.quantize import METRICS, lookup, nearest_code

__all__ = ["accumulate_", "encode", "encode_bands", "encode_parts", "features"]

Scales = Sequence[tuple[int, int]]
UP = MODES[1:]


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
    """In place f_hat += u and, where given, residual -= u, in one call.

    u = (1 - ratio) v + ratio (conv3x3(v) + bias) with v = h upsampled to (H, W) (VAR, arXiv 2404.02905,
    algorithms 1 and 2), or u = v without weight and bias. f_hat and residual [B, C, H, W], h [B, C, h, w],
    weight [C, C, 3, 3], bias [C], up "bicubic" or "bilinear".
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
    _expect_one_of("up", up, UP)
    if residual is not None:
        expect_like("residual", residual, "f_hat", f_hat)
        if residual.shape != f_hat.shape:
            raise ValueError(
                f"expected residual of f_hat's shape {list(f_hat.shape)}, got {list(residual.shape)}"
            )
    ops = kernels(f_hat, h, weight, bias, residual)
    if ops is None:
        return reference.accumulate_(f_hat, h, weight, bias, ratio, residual, up=up)
    into = f_hat.contiguous()
    rest = None if residual is None else residual.contiguous()
    filters = (_contiguous(weight), _contiguous(bias))
    ops.accumulate_(into, _evenly_spaced(h), *filters, ratio, rest, MODES.index(up))
    if not f_hat.is_contiguous():
        f_hat.copy_(into)
    if residual is not None and rest is not None and not residual.is_contiguous():
        residual.copy_(rest)
    return None


def encode(
    f: Tensor,
    codebook: Tensor | None,
    weights: Tensor | None = None,
    biases: Tensor | None = None,
    scales: Scales = (),
    phi: Sequence[int] | None = None,
    ratio: float = 0.5,
    *,
    up: str = "bicubic",
    residual: bool = True,
    metric: str = "l2",
    sign: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The whole multi-scale encode of VAR (arXiv 2404.02905, algorithm 1) in one call; no gradient.

    f [B, C, H, W], codebook [K, C], weights [P, C, C, 3, 3], biases [P, C], scales [(h, w), ...] from coarse
    to fine with (H, W) last, phi[k] = the convolution that scale k uses. Per scale: the residual, averaged to
    (h, w); its nearest codes; `accumulate_`. Returns the indices, int64 [B, h * w] per scale, and f_hat
    [B, C, H, W]. Residual and f_hat are carried in float32 whatever the dtype of f.

    Variants: no weights, biases and phi, no convolution. No codebook: signs (BSQ; Infinity, arXiv 2412.04431)
    with up="bilinear": bit c of an index says that channel c is positive, the code is +-sign in each channel,
    by default C ** -0.5; C <= 64. residual=False: every scale codes f itself, and f_hat is the last scale's
    codes (FlexVAR, arXiv 2502.20313). metric as in `nearest_code`; codes are added as the codebook has them.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("f", f)
    if f.dim() != 4 or f.shape[1] == 0 or f.shape[2] == 0 or f.shape[3] == 0:
        raise ValueError(f"expected f [B, C, H, W] with C, H, W > 0, got {list(f.shape)}")
    B, C, H, W = f.shape
    _expect_codes(codebook, C, f)
    _expect_filter(weights, biases, (_count(weights), C, C, 3, 3), f, plural=True)
    _expect_scales(scales, (H, W))
    _expect_phi(phi, _count(weights), len(scales), weights)
    _expect_one_of("up", up, UP)
    _expect_one_of("metric", metric, METRICS)
    given = [None if t is None else t.detach() for t in (f, codebook, weights, biases)]
    ops = kernels(*given)
    if ops is None:
        with torch.no_grad():
            return reference.encode(
                f, codebook, weights, biases, scales, phi, ratio,
                up=up, residual=residual, metric=metric, sign=sign,
            )  # fmt: skip
    arguments = [_contiguous(t) for t in given]
    numbers = (ratio, MODES.index(up), residual, METRICS.index(metric), _sign(sign, C))
    flat, f_hat = ops.encode(*arguments, [n for scale in scales for n in scale], list(phi or ()), *numbers)
    parts = flat.split([B * h * w for h, w in scales])
    return [part.reshape(B, h * w) for part, (h, w) in zip(parts, scales)], f_hat


def features(
    indices: Sequence[Tensor],
    codebook: Tensor | None,
    weights: Tensor | None = None,
    biases: Tensor | None = None,
    scales: Scales = (),
    phi: Sequence[int] | None = None,
    ratio: float = 0.5,
    *,
    up: str = "bicubic",
    residual: bool = True,
    sign: float | None = None,
    channels: int | None = None,
) -> Tensor:
    """f_hat [B, C, H, W] of indices, int64 [B, h * w] for each of the first scales, in one call.

    The other way of `encode`, with its arguments; (H, W) is the last of `scales`, also where indices end
    earlier. f_hat has the codebook's dtype (float32 for signs, which need `channels`) and is summed in
    float32. With residual=False it is the upsampled last map. A gradient of codebook, weights or biases goes
    through the reference formula.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    if not indices or len(indices) > len(scales):
        raise ValueError(f"expected indices of 1 to {len(scales)} scales, got {len(indices)}")
    _expect_scales(scales, scales[-1])
    C = channels if codebook is None else codebook.shape[-1]
    if C is None:
        raise ValueError("expected channels where there is no codebook, got None")
    B = indices[0].shape[0]
    for k, (index, (h, w)) in enumerate(zip(indices, scales)):
        if index.dtype != torch.int64:
            raise TypeError(f"expected indices of int64, got {index.dtype}")
        if index.dim() != 2 or index.shape[0] != B or index.shape[1] != h * w:
            raise ValueError(f"expected indices [{B}, {h * w}] at scale {k}, got {list(index.shape)}")
        if index.device != indices[0].device:
            raise ValueError(f"expected indices on one device, got {indices[0].device} and {index.device}")
    _expect_codes(codebook, C, indices[0])
    _expect_filter(weights, biases, (_count(weights), C, C, 3, 3), indices[0], plural=True)
    _expect_phi(phi, _count(weights), len(scales), weights)
    _expect_one_of("up", up, UP)
    ops = kernels(indices[0], codebook, weights, biases)
    if ops is None:
        return reference.features(
            indices, codebook, weights, biases, scales, phi, ratio,
            up=up, residual=residual, sign=sign, channels=channels,
        )  # fmt: skip
    first = 0 if residual else len(indices) - 1
    used = range(first, len(indices))
    flat = torch.cat([indices[k].reshape(-1) for k in used])
    arguments = [_contiguous(t) for t in (codebook, weights, biases)]
    sizes = [n for k in used for n in scales[k]]
    numbers = (ratio, MODES.index(up), _sign(sign, C), B, C, *scales[-1])
    return ops.features(flat, *arguments, sizes, [] if phi is None else [phi[k] for k in used], *numbers)


def encode_parts(
    f: Tensor,
    codebooks: Sequence[Tensor],
    scales: Scales,
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    up: str = "bicubic",
) -> tuple[list[Tensor], Tensor]:
    """`encode` with several codebooks that share one index (TokenFlow's two, arXiv 2412.03069); no gradient.

    The channels of f [B, C, H, W] are the parts one after the other, codebooks [K, C_i]. The index minimises
    the sum over parts of weights[i] |r_i - e_i|^2, one search over the parts scaled by the roots of their
    weights and concatenated; `normalize` divides each part of residual and code by its length first, and
    codes are then added normalised. Otherwise as `encode` without phi.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    expect_floating("f", f)
    widths = [c.shape[-1] for c in codebooks]
    if f.dim() != 4 or f.shape[1] != sum(widths):
        raise ValueError(f"expected f [B, {sum(widths)}, H, W], got {list(f.shape)}")
    for c in codebooks:
        _expect_codes(c, c.shape[-1], f)
        if c.shape[0] != codebooks[0].shape[0]:
            raise ValueError(f"expected {codebooks[0].shape[0]} codes in each codebook, got {c.shape[0]}")
    if weights is not None and (len(weights) != len(widths) or any(w < 0 for w in weights)):
        raise ValueError(f"expected {len(widths)} weights that are not negative, got {list(weights)}")
    roots = [1.0] * len(widths) if weights is None else [w**0.5 for w in weights]
    with torch.no_grad():
        parts = [c.detach().float() for c in codebooks]
        if normalize:
            parts = [F.normalize(c, dim=-1) for c in parts]
        codes, scaled = torch.cat(parts, 1), torch.cat([c * r for c, r in zip(parts, roots)], 1)

        def search(rows: Tensor) -> Tensor:
            split = rows.split(widths, 1)
            if normalize:
                split = tuple(F.normalize(r, dim=-1) for r in split)
            return nearest_code(torch.cat([r * w for r, w in zip(split, roots)], 1), scaled)

        indices, f_hat = _by_steps([f.detach()], search, codes, scales, up)
    return indices, f_hat.to(f.dtype)


def encode_bands(
    bands: Sequence[Tensor], codebook: Tensor, scales: Scales, *, metric: str = "l2", up: str = "bicubic"
) -> tuple[list[Tensor], Tensor]:
    """Next-frequency encode (NFIG, arXiv 2503.07076): band k joins the residual before scale k; no gradient.

    bands: one map [B, C, H, W] for each scale, such as `frequency_bands` gives. The codes of scale k are
    nearest to the residual of the bands so far, averaged to (h, w), and are subtracted upsampled, as in
    `encode` without phi. Returns the indices and f_hat, the sum of the upsampled codes.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    if len(bands) != len(scales):
        raise ValueError(f"expected a band for each of {len(scales)} scales, got {len(bands)}")
    for band in bands:
        expect_like("bands", band, "the first band", bands[0])
        if band.dim() != 4 or band.shape != bands[0].shape:
            raise ValueError(f"expected bands of one shape [B, C, H, W], got {list(band.shape)}")
    _expect_codes(codebook, bands[0].shape[1], bands[0])
    _expect_one_of("metric", metric, METRICS)
    with torch.no_grad():

        def search(rows: Tensor) -> Tensor:
            return nearest_code(rows, codebook, metric)

        found = _by_steps([b.detach() for b in bands], search, codebook.detach(), scales, up)
    return found[0], found[1].to(bands[0].dtype)


def _by_steps(
    targets: Sequence[Tensor], search: Callable[[Tensor], Tensor], codes: Tensor, scales: Scales, up: str
) -> tuple[list[Tensor], Tensor]:
    """Residual encode scale by scale; targets[k] joins the residual before scale k."""
    B, C, H, W = targets[0].shape
    _expect_scales(scales, (H, W))
    _expect_one_of("up", up, UP)
    residual, indices = torch.zeros_like(targets[0], dtype=torch.float32), []
    f_hat = torch.zeros_like(residual)
    for k, (h, w) in enumerate(scales):
        if k < len(targets):
            residual += targets[k]
        rows = area_down(residual, (h, w)).permute(0, 2, 3, 1).reshape(-1, C)
        index = search(rows).reshape(B, h * w)
        h_map = lookup(index, codes).view(B, h, w, C).permute(0, 3, 1, 2)
        accumulate_(f_hat, h_map, residual=residual, up=up)
        indices.append(index)
    return indices, f_hat


def _expect_map(name: str, t: Tensor, other: Tensor) -> None:
    expect_floating(name, t)
    if t.device != other.device:
        raise ValueError(f"expected {name} on device {other.device}, got {t.device}")
    if name == "h" and t.dim() != 4:
        raise ValueError(f"expected h [B, C, h, w], got {list(t.shape)}")


def _expect_codes(codebook: Tensor | None, channels: int, other: Tensor) -> None:
    if codebook is None:
        if channels > 64:
            raise ValueError(f"expected at most 64 channels for signs, got {channels}")
        return
    _expect_map("codebook", codebook, other)
    if codebook.dim() != 2 or codebook.shape[0] == 0 or codebook.shape[1] != channels:
        raise ValueError(f"expected codebook [K, {channels}] with K > 0, got {list(codebook.shape)}")


def _expect_filter(
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    other: Tensor,
    plural: bool = False,
) -> None:
    names = ("weights", "biases") if plural else ("weight", "bias")
    if weight is None or bias is None:
        if weight is not bias:
            raise ValueError(f"expected both {names[0]} and {names[1]}, or neither")
        return
    _expect_map(names[0], weight, other)
    expect_like(names[1], bias, names[0], weight)
    if tuple(weight.shape) != shape:
        raise ValueError(f"expected {names[0]} {list(shape)}, got {list(weight.shape)}")
    if tuple(bias.shape) != shape[:-3]:
        raise ValueError(f"expected {names[1]} {list(shape[:-3])}, got {list(bias.shape)}")


def _expect_scales(scales: Scales, size: tuple[int, int]) -> None:
    pairs = [tuple(s) for s in scales]
    fits = all(len(s) == 2 and 0 < s[0] <= size[0] and 0 < s[1] <= size[1] for s in pairs)
    if not pairs or not fits or pairs[-1] != tuple(size):
        raise ValueError(f"expected scales (h, w) within {tuple(size)} that end with it, got {pairs}")


def _expect_phi(phi: Sequence[int] | None, count: int, scales: int, weights: Tensor | None) -> None:
    if weights is None:
        if phi:
            raise ValueError(f"expected no phi without weights, got {list(phi)}")
    elif phi is None or len(phi) != scales or not all(0 <= i < count for i in phi):
        got = None if phi is None else list(phi)
        raise ValueError(f"expected a phi of 0..{count - 1} for each of {scales} scales, got {got}")


def _expect_one_of(name: str, value: str, values: Sequence[str]) -> None:
    if value not in values:
        raise ValueError(f"expected {name} to be one of {', '.join(values)}, got {value!r}")


def _count(weights: Tensor | None) -> int:
    return weights.shape[0] if isinstance(weights, Tensor) and weights.dim() > 0 else 0


def _sign(sign: float | None, channels: int) -> float:
    return channels**-0.5 if sign is None else sign


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _evenly_spaced(h: Tensor) -> Tensor:
    """h itself where its pixels lie at equal distances (planes, or rows of channels), else a copy."""
    even = h.shape[2] == 1 or h.shape[3] == 1 or h.stride(2) == h.shape[3] * h.stride(3)
    return h if even else h.contiguous()


@fake("accumulate_")
def _accumulate_fake(
    f_hat: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ratio: float,
    residual: Tensor | None,
    up: int,
) -> None:
    return None


@fake("encode")
def _encode_fake(
    f: Tensor,
    codebook: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    scales: Sequence[int],
    phi: Sequence[int],
    ratio: float,
    up: int,
    residual: bool,
    metric: int,
    sign: float,
) -> tuple[Tensor, Tensor]:
    pixels = sum(h * w for h, w in zip(scales[::2], scales[1::2]))
    return f.new_empty(f.shape[0] * pixels, dtype=torch.int64), torch.empty_like(f)


@fake("features")
def _features_fake(
    indices: Tensor,
    codebook: Tensor | None,
    weights: Tensor | None,
    biases: Tensor | None,
    scales: Sequence[int],
    phi: Sequence[int],
    ratio: float,
    up: int,
    sign: float,
    images: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    dtype = torch.float32 if codebook is None else codebook.dtype
    return indices.new_empty(images, channels, height, width, dtype=dtype)
