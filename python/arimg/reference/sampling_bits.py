"""Bits drawn from pairs of logits: the oracle of `arimg.ops.sampling_bits`, equal to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.reference.sampling import _ONE, Drawn, _fma, _per_row, _values, exp_weight, numbers, row_seeds


def _least(
    top_k: float | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    temperature: float | Tensor,
    like: Tensor,
) -> Tensor:
    """From which weight on the less likely outcome stays: int64 [1, 1] or [rows, 1]."""

    def column(setting: float | Tensor, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(setting, device=like.device).to(dtype).reshape(-1, 1)

    p = column(top_p, torch.float64)
    dropping = torch.where(p < 1, 1.0 - p.clamp(min=0.0), 0.0)
    least = (column(min_p, torch.float64).nan_to_num(0.0).clamp(0.0, 1.0) * _ONE).ceil().long()
    share = dropping.clamp(max=0.5)
    least = torch.where(dropping > 0, torch.maximum(least, (share / (1 - share) * _ONE).long() + 1), least)
    alone = (column(top_k, torch.int64) == 1) | (dropping >= 0.5)
    if isinstance(temperature, Tensor):
        alone = alone | ~(column(temperature, torch.float32) > 0)
    return torch.where(alone, _ONE + 1, least)


def pair_weights(x: Tensor, least: Tensor) -> Tensor:
    """Integer weights of outcomes: x [N, d, 2] without NaN, least int64 [N or 1, 1] -> int64 [N, d, 2]."""
    top = x.amax(-1, keepdim=True)
    weight = torch.where(x == top, _ONE, exp_weight(x - top))
    lesser = (x[..., 1:] <= x[..., :1]).long()  # its index; of equals outcome 1
    gone = (weight.gather(-1, lesser) < least[..., None]) | (top == -torch.inf)
    return weight.scatter(-1, lesser, weight.gather(-1, lesser).masked_fill(gone, 0))


def _log_one_plus(r: Tensor) -> Tensor:
    """log(1 + r) for float32 0 <= r <= 1, as csrc/sampling/pairs.h computes it."""
    s = r / (2 + r)
    u, twice = s * s, s + s
    series = torch.full_like(u, float.fromhex("0x1.111112p-4"))
    for coefficient in ("3b13b2p-4", "745d18p-4", "c71c72p-4", "24924ap-3", "99999ap-3", "555556p-2"):
        series = _fma(u, series.double(), float.fromhex("0x1." + coefficient))
    return _fma(twice * u, series.double(), twice)


def _facts(x: Tensor, weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the bits and entropies of their laws: x, weight [N, d, 2] -> [N, d]."""
    lesser = weight.amin(-1)
    some = lesser > 0
    r = lesser.float() * 2.0**-30
    log = _log_one_plus(r)
    apart = some & (x[..., 0] != x[..., 1])  # two infinities have no difference
    below = torch.where(apart, x.amax(-1) - x.amin(-1), 0.0)
    own = torch.where(bits == (x[..., 1] > x[..., 0]), log, torch.where(some, below + log, torch.inf))
    return 0.0 - own, log + r * below / (r + 1.0)


def _packed(bits: Tensor) -> Tensor:
    """bool [..., d <= 64] -> int64 [...], the first bit the most significant."""
    shift = torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits.long() << shift).sum(-1)


def sample_bits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    forced: Tensor | None = None,
    packed: bool = False,
    return_logprob: bool = False,
) -> Tensor | Drawn:
    """Each bit from its two logits: [R, ..., d, 2] -> bool [R, ..., d], or packed int64 [R, ...].

    The settings are those of `sample`, each pair a row of two; bit b of the j-th token of a row is set where
    floor(number b of position + j * sum of weights / 2^32) >= the weight of outcome 0.
    """
    rows = logits.shape[0] // (1 if guidance is None else 2)
    shape, d = torch.Size((rows, *logits.shape[1:-1])), logits.shape[-2]
    if shape.numel() == 0:
        bits = torch.empty(shape, dtype=torch.bool, device=logits.device)
        token = torch.empty(shape[:-1], dtype=torch.int64, device=logits.device) if packed else bits
        return Drawn(token, bits.float(), bits.float()) if return_logprob else token
    tokens = shape[:-1].numel() // rows

    def repeated(setting: float | Tensor) -> float | Tensor:
        return setting.reshape(-1).repeat_interleave(tokens) if isinstance(setting, Tensor) else setting

    def per_token(given: Tensor | None) -> Tensor | None:
        return None if given is None else _per_row(given.flatten(-2), shape[:-1], rows)

    temperature = repeated(temperature)
    x = _values(
        logits.reshape(-1, 2 * d),
        temperature,
        None if guidance is None else repeated(guidance),
        bias=per_token(bias),
        allowed=per_token(allowed),
    ).reshape(-1, d, 2)
    least = _least(repeated(top_k), repeated(top_p), repeated(min_p), temperature, x)
    weight = pair_weights(x, least)
    words = numbers(row_seeds(seed, rows, logits.device), position, tokens, 0, d).reshape(-1, d)
    bits = (words * weight.sum(-1) >> 32) >= weight[..., 0]
    if forced is not None:
        forced = forced.reshape(bits.shape)
        bits = torch.where(forced >= 0, forced > 0, bits)
    logprob, entropy = _facts(x, weight, bits)
    bits = bits.reshape(shape)
    token = _packed(bits) if packed else bits
    return Drawn(token, logprob.reshape(shape), entropy.reshape(shape)) if return_logprob else token
