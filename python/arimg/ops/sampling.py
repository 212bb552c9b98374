"""Seeded sampling, one pass per row of logits: the same token on every backend and in any batch.

See docs/ops/sampling.md for the definition and docs/random-numbers.md for the random numbers.
"""

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
    check_penalty,
    check_tensor,
    expect,
    number,
    per_token_float,
    per_token_set,
    tensor,
)
from arimg.reference.sampling import Drawn, drawn, row_seeds, wrap_int64

__all__ = ["Drawn", "philox_uniform", "sample"]

Method = Literal["draw", "gumbel"]


@overload
def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = ...,
    temperature: float | Tensor = ...,
    top_k: int | Tensor = ...,
    top_p: float | Tensor = ...,
    min_p: float | Tensor = ...,
    guidance: float | Tensor | None = ...,
    seen: Tensor | None = ...,
    repetition_penalty: float = ...,
    factor: Tensor | None = ...,
    multiply_negative: bool = ...,
    bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    forced: Tensor | None = ...,
    method: Method = ...,
    return_logprob: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = ...,
    temperature: float | Tensor = ...,
    top_k: int | Tensor = ...,
    top_p: float | Tensor = ...,
    min_p: float | Tensor = ...,
    guidance: float | Tensor | None = ...,
    seen: Tensor | None = ...,
    repetition_penalty: float = ...,
    factor: Tensor | None = ...,
    multiply_negative: bool = ...,
    bias: Tensor | None = ...,
    allowed: Tensor | None = ...,
    forced: Tensor | None = ...,
    method: Method = ...,
    return_logprob: Literal[True],
) -> Drawn: ...


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    guidance: float | Tensor | None = None,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    factor: Tensor | None = None,
    multiply_negative: bool = False,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    forced: Tensor | None = None,
    method: Method = "draw",
    return_logprob: bool = False,
) -> Tensor | Drawn:
    """Draw one token per row: logits [R, ..., V] -> int64 [R, ...]; logits [V] -> a scalar.

    guidance s (a number, or float32 [R] on the logits' device): logits hold 2R leading rows, the conditional
    ones first, and l = s c + (1 - s) u. Then, in this order,
    seen         with repetition_penalty: positive l / penalty, negative l * penalty, of the tokens seen;
    factor       positive l * factor, negative l / factor, so that a factor below 1 always suppresses
                 (`frequency_factor`); multiply_negative=True multiplies both, as the released CoTyle does,
                 which raises negative logits;
    bias         l + bias;
    allowed      -inf for every other token;
    temperature  l / temperature;
    top_k        keep the k largest and every tie with the k-th (0 or >= V: all; 1: the first of the largest);
    top_p        ascending, drop while the cumulative probability <= 1 - p; of equals the lower index stays;
    min_p        drop what is less than min_p times as likely as the most likely token.
    factor and bias: floats [V], [R, V] or [R, ..., V]; seen and allowed: bool of such a shape, or bits, uint8
    [..., ceil(V / 8)], bit i % 8 of byte i / 8; seen also as the tokens, int64 [R, n], negative ones ignored.

    forced: int64 [R, ...], tokens to give as they are where they are not negative.
    method: "draw" inverts the cumulative distribution; "gumbel" takes the argmax of x + Gumbel noise,
    distributed alike; noise of (seed, position, token) alone: drafts of one position share it.
    return_logprob: gives Drawn(token, logprob, entropy), of the distribution after the filters.

    seed: an int s (row r uses s + r) or an int64 tensor [R]; the j-th token of a row uses position + j.
    position: an int or an int64 tensor of one element. temperature, top_p, min_p (float32) and top_k (int64)
    may be tensors [R]; there a temperature that is not above 0 is greedy. Tensors live on the logits' device
    and may change between replays of a CUDA graph.

    float32, bfloat16 or float16 logits; V up to 2^24. NaN is never drawn, +inf always is (several equally
    likely), a row without any value above -inf gives 0. Raises ValueError or TypeError for what does not fit.
    """
    expect_floating("logits", logits)
    expect(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits [..., V] with V >= 1", list(logits.shape))
    expect(logits.shape[-1] <= MAX_VOCABULARY, f"at most {MAX_VOCABULARY} logits per row", logits.shape[-1])
    shape = logits.shape[:-1]
    if guidance is not None:
        fits = logits.dim() >= 2 and logits.shape[0] % 2 == 0
        expect(fits, "logits [2R, ..., V] with guidance", list(logits.shape))
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    rows = shape[0] if shape else 1
    check_guidance(guidance, logits, rows)
    check_filters(temperature, top_k, top_p, min_p, rows, logits)
    check_integers("seed", seed, rows, logits)
    check_integers("position", position, 1, logits)
    check_penalty(repetition_penalty, seen)
    expect(method in ("draw", "gumbel"), "method 'draw' or 'gumbel'", repr(method))
    if repetition_penalty == 1.0:
        seen = None
    processors = (
        per_token_set("seen", seen, shape, logits),
        repetition_penalty,
        per_token_float("factor", factor, shape, logits),
        multiply_negative,
        per_token_float("bias", bias, shape, logits),
        per_token_set("allowed", allowed, shape, logits),
    )
    if forced is not None:
        check_tensor("forced", forced, torch.int64, shape.numel(), logits)

    logits = logits.detach()  # a draw has no gradient
    ops = kernels(logits)
    if ops is None or shape.numel() == 0:
        result = reference.sample(
            logits,
            seed=seed,
            position=position,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            seen=seen,
            repetition_penalty=repetition_penalty,
            factor=factor,
            multiply_negative=multiply_negative,
            bias=bias,
            allowed=allowed,
            forced=forced,
            method=method,
            return_logprob=return_logprob,
        )
        assert isinstance(result, (Tensor, Drawn))
        return result
    # Rows at one stride, so that logits[:, -1] needs no copy; then [leading, tokens, V].
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    arguments = (
        flat.unflatten(0, (rows * (1 if guidance is None else 2), math.prod(shape[1:]))),
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
    )
    per_row = (tensor(temperature), tensor(top_k), tensor(top_p), tensor(min_p))
    extras = (*per_row, seen, factor, bias, allowed, forced)
    if method == "draw" and not return_logprob and all(x is None for x in extras):
        token: Tensor = ops.sample(*arguments)
        return token.reshape(shape)
    token, facts = ops.sample_with(
        *arguments, *per_row, *processors, tensor(forced), method == "gumbel", return_logprob
    )
    if return_logprob:
        return drawn(token.reshape(shape), facts.reshape(*shape, 3))
    return token.reshape(shape)


def philox_uniform(seed: int | Tensor, position: int, n: int, *, draw: int = 0) -> Tensor:
    """Uniform numbers of a counter: float32 [R, n] in (0, 1), one row per seed (an int: one row, on the CPU).

    Number j of a row depends on (seed, position + j, draw) alone, draw in [0, 2^32). Philox4x32-10; see
    docs/random-numbers.md.
    """
    if isinstance(seed, Tensor):
        expect(seed.dim() == 1, "seed int64 [R]", list(seed.shape))
        check_tensor("seed", seed, torch.int64, len(seed), seed)
    elif not isinstance(seed, int):
        raise TypeError(f"expected seed to be an int or an int64 tensor, got {type(seed).__name__}")
    expect(n >= 0, "n >= 0", n)
    expect(0 <= draw < 2**32, "draw in [0, 2^32)", draw)
    seeds = seed.contiguous() if isinstance(seed, Tensor) else row_seeds(seed, 1, "cpu")
    ops = kernels(seeds)
    if ops is None:
        return reference.philox_uniform(seeds, position, n, draw=draw)
    result: Tensor = ops.philox_uniform(seeds, wrap_int64(position), n, draw)
    return result


@fake("sample")
def _sample_fake(
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
) -> Tensor:
    guided = guidance is not None or guidances is not None
    rows = logits.shape[0] // 2 if guided else logits.shape[0]
    return logits.new_empty((rows, logits.shape[1]), dtype=torch.int64)


@fake("sample_with")
def _sample_with_fake(
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
    seen: Tensor | None,
    penalty: float,
    factor: Tensor | None,
    multiply_negative: bool,
    bias: Tensor | None,
    allowed: Tensor | None,
    forced: Tensor | None,
    gumbel: bool,
    facts: bool,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0] // 2 if guidance is not None or guidances is not None else logits.shape[0]
    tokens = logits.shape[1]
    told = logits.new_empty((rows if facts else 0, tokens, 3), dtype=torch.int64)
    return logits.new_empty((rows, tokens), dtype=torch.int64), told


@fake("philox_uniform")
def _philox_uniform_fake(seeds: Tensor, position: int, n: int, draw: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], n), dtype=torch.float32)


@fake("exp_weights")
def _exp_weights_fake(d: Tensor) -> Tensor:
    return d.new_empty(d.shape, dtype=torch.int32)


@fake("exponentials")
def _exponentials_fake(words: Tensor) -> Tensor:
    return words.new_empty(words.shape, dtype=torch.float32)
