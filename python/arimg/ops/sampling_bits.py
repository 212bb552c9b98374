"""Bits drawn from pairs of logits (bitwise models). See docs/ops/sampling.md."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.ops._sampling_rows import (
    MAX_VOCABULARY,
    check_filters,
    check_guidance,
    check_integers,
    check_tensor,
    expect,
    number,
    per_token_float,
    per_token_set,
    tensor,
)
from arimg.ops.sampling import Drawn
from arimg.reference.sampling import wrap_int64

__all__ = ["sample_bits"]

MAX_PACKED = 64


@overload
def sample_bits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = ...,
    temperature: float | Tensor = ...,
    top_k: int | Tensor = ...,
    top_p: float | Tensor = ...,
    min_p: float | Tensor = ...,
    guidance: float | Tensor | None = ...,
    bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    forced: Tensor | None = ...,
    packed: bool = ...,
    return_logprob: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample_bits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = ...,
    temperature: float | Tensor = ...,
    top_k: int | Tensor = ...,
    top_p: float | Tensor = ...,
    min_p: float | Tensor = ...,
    guidance: float | Tensor | None = ...,
    bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    forced: Tensor | None = ...,
    packed: bool = ...,
    return_logprob: Literal[True],
) -> Drawn: ...


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
    """Draw each bit from its two logits (Infinity, VAREdit, NSARM): [R, ..., d, 2] -> bool [R, ..., d].

    Settings as for `sample`, to which each pair is a row of two logits. Of two outcomes the filters can only
    drop the less likely one (of equals 1): top_k=1 always, 0 or 2 and more never; top_p where the other has
    p >= top_p; min_p where it is less than min_p times as likely.
    bias (floats) and allowed (bool): [d, 2], [R, d, 2] or [R, ..., d, 2]. forced: int64 [R, ..., d], 0 or 1
    (or more), negative: drawn.
    packed: int64 [R, ...] instead, the first bit the most significant, d <= 64, as `pack_bits` does.
    return_logprob: gives Drawn(bits, logprob, entropy), both [R, ..., d]; a token's are their sums.

    Bit b of the j-th token of a row takes number b of position + j (docs/random-numbers.md). With a seed, two
    drafts of a bit differ as rarely as any coupling allows, which is what Gumbel noise is for in `sample`.
    There is no repetition penalty and no factor: both outcomes of a bit come up, and a bias gives any odds.
    """
    expect_floating("logits", logits)
    fits = logits.dim() >= 3 and logits.shape[-1] == 2 and logits.shape[-2] >= 1
    expect(fits, "logits [R, ..., d, 2] with d >= 1", list(logits.shape))
    d = logits.shape[-2]
    expect(2 * d <= MAX_VOCABULARY, f"at most {MAX_VOCABULARY // 2} bits per token", d)
    expect(not packed or d <= MAX_PACKED, f"at most {MAX_PACKED} bits to pack", d)
    rows = logits.shape[0]
    if guidance is not None:
        expect(rows % 2 == 0, "logits [2R, ..., d, 2] with guidance", list(logits.shape))
        rows //= 2
    check_guidance(guidance, logits, rows)
    check_filters(temperature, top_k, top_p, min_p, rows, logits)
    check_integers("seed", seed, rows, logits)
    check_integers("position", position, 1, logits)
    shape = torch.Size((rows, *logits.shape[1:-1]))
    if forced is not None:
        check_tensor("forced", forced, torch.int64, shape.numel(), logits)
    if allowed is not None and allowed.dtype != torch.bool:
        raise TypeError(f"expected allowed of bool, got {allowed.dtype}")
    flat = logits.detach().flatten(-2).reshape(-1, 2 * d)
    ops = kernels(flat)
    if ops is None or shape.numel() == 0:
        result = reference.sample_bits(
            logits.detach(),
            seed=seed,
            position=position,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            bias=bias,
            allowed=allowed,
            forced=forced,
            packed=packed,
            return_logprob=return_logprob,
        )
        assert isinstance(result, (Tensor, Drawn))
        return result
    tokens = math.prod(shape[1:-1])
    bits, facts = ops.sample_bits(
        _contiguous_rows(flat).unflatten(0, (rows * (1 if guidance is None else 2), tokens)),
        tensor(seed),
        0 if isinstance(seed, Tensor) else wrap_int64(seed),
        tensor(position),
        0 if isinstance(position, Tensor) else wrap_int64(position),
        number(temperature, 1.0),
        0 if isinstance(top_k, Tensor) else top_k,
        number(top_p, 1.0),
        number(min_p, 0.0),
        guidance if isinstance(guidance, (int, float)) else None,
        tensor(guidance),
        tensor(temperature),
        tensor(top_k),
        tensor(top_p),
        tensor(min_p),
        per_token_float("bias", _flat_pairs("bias", bias, d), shape[:-1], flat),
        per_token_set("allowed", _flat_pairs("allowed", allowed, d), shape[:-1], flat),
        tensor(forced),
        False,
        return_logprob,
    )
    bits = bits.reshape(shape)
    token = ops.pack_bits(bits.reshape(-1, d), True).reshape(shape[:-1]) if packed else bits
    if not return_logprob:
        return token
    logprob, entropy = facts.reshape(2, *shape)
    return Drawn(token, logprob, entropy)


def bits_of_odds(x: Tensor, seed: int | Tensor, position: int | Tensor) -> Tensor:
    """`sample_bits` of the pairs of logits (0, x): x [R, ..., d] -> bool [R, ..., d]."""
    x = x.detach()
    ops = kernels(x)
    if ops is None or x.numel() == 0:
        pairs = torch.stack((torch.zeros_like(x), x), -1)
        bits = reference.sample_bits(pairs, seed=seed, position=position)
        assert isinstance(bits, Tensor)
        return bits
    bits, _ = ops.sample_bits(
        x.reshape(x.shape[0], -1, x.shape[-1]).contiguous(),
        tensor(seed),
        0 if isinstance(seed, Tensor) else wrap_int64(seed),
        tensor(position),
        0 if isinstance(position, Tensor) else wrap_int64(position),
        *(1.0, 0, 1.0, 0.0),
        *[None] * 9,
        True,
        False,
    )
    return bits.reshape(x.shape)


def _contiguous_rows(flat: Tensor) -> Tensor:
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _flat_pairs(name: str, x: Tensor | None, d: int) -> Tensor | None:
    """[..., d, 2] -> [..., 2 d]."""
    if x is None:
        return None
    expect(x.dim() >= 2 and x.shape[-2:] == (d, 2), f"{name} [..., {d}, 2]", list(x.shape))
    return x.flatten(-2)


@fake("sample_bits")
def _sample_bits_fake(
    logits: Tensor,
    seeds: Tensor | None,
    first_seed: int,
    offset: Tensor | None,
    position: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    guidance: float | None,
    guidances: Tensor | None,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    forced: Tensor | None,
    odds: bool,
    facts: bool,
) -> tuple[Tensor, Tensor]:
    guided = guidance is not None or guidances is not None
    rows = logits.shape[0] // 2 if guided else logits.shape[0]
    shape = (rows, logits.shape[1], logits.shape[2] if odds else logits.shape[2] // 2)
    told = logits.new_empty((2 if facts else 0, *shape), dtype=torch.float32)
    return logits.new_empty(shape, dtype=torch.bool), told
