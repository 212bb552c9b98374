"""Seeded sampling, one pass per row of logits: the same token on every backend and in any batch.

See docs/ops/sampling.md for the definition and docs/random-numbers.md for the random numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg import reference
from arimg.ops._common import expect_floating, fake, kernels
from arimg.reference.sampling import row_seeds, wrap_int64

__all__ = ["philox_uniform", "sample"]

MAX_VOCABULARY = 2**24
_SMALLEST, _LARGEST = 2.0**-126, 3.4028234663852886e38  # normal float32 numbers


def sample(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance: float | Tensor | None = None,
) -> Tensor:
    """Draw one token per row: logits [R, ..., V] -> int64 [R, ...]; logits [V] -> a scalar.

    guidance s (a number, or float32 [R] on the logits' device): logits hold 2R leading rows, the conditional
    ones first, and l = s c + (1 - s) u. Then, in this order,
    temperature  l / temperature;
    top_k        keep the k largest and every tie with the k-th (0 or >= V: all; 1: the first of the largest);
    top_p        ascending, drop while the cumulative probability <= 1 - p; of equals the lower index stays;
    min_p        drop what is less than min_p times as likely as the most likely token.
    seed: an int s (row r uses s + r) or an int64 tensor [R]; the j-th token of a row uses position + j.
    position: an int or an int64 tensor of one element; tensors live on the logits' device and may change
    between replays of a CUDA graph.

    float32, bfloat16 or float16 logits; V up to 2^24. NaN is never drawn, +inf always is (several equally
    likely), a row without any value above -inf gives 0. Raises ValueError or TypeError for what does not fit.
    """
    expect_floating("logits", logits)
    _expect(logits.dim() >= 1 and logits.shape[-1] >= 1, "logits [..., V] with V >= 1", list(logits.shape))
    _expect(logits.shape[-1] <= MAX_VOCABULARY, f"at most {MAX_VOCABULARY} logits per row", logits.shape[-1])
    _check_filters(temperature, top_k, top_p, min_p)
    shape = logits.shape[:-1]
    if guidance is not None:
        fits = logits.dim() >= 2 and logits.shape[0] % 2 == 0
        _expect(fits, "logits [2R, ..., V] with guidance", list(logits.shape))
        shape = torch.Size((shape[0] // 2, *shape[1:]))
    rows = shape[0] if shape else 1
    if isinstance(guidance, Tensor):
        _check_tensor("guidance", guidance, torch.float32, rows, logits)
    elif guidance is not None:
        _expect(math.isfinite(guidance), "a finite guidance", guidance)
    _check_integers("seed", seed, rows, logits)
    _check_integers("position", position, 1, logits)

    ops = kernels(logits.detach())  # a draw has no gradient
    if shape.numel() == 0:
        return torch.empty(shape, dtype=torch.int64, device=logits.device)
    if ops is None:
        return reference.sample(
            logits.detach(),
            seed=seed,
            position=position,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
        )
    # Rows at one stride, so that logits[:, -1] needs no copy; then [leading, tokens, V].
    flat = logits.detach().reshape(-1, logits.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return ops.sample(
        flat.unflatten(0, (rows * (1 if guidance is None else 2), math.prod(shape[1:]))),
        seed.contiguous() if isinstance(seed, Tensor) else None,
        0 if isinstance(seed, Tensor) else wrap_int64(seed),
        position if isinstance(position, Tensor) else None,
        0 if isinstance(position, Tensor) else wrap_int64(position),
        temperature,
        top_k,
        top_p,
        min_p,
        guidance if isinstance(guidance, (int, float)) else None,
        guidance.contiguous() if isinstance(guidance, Tensor) else None,
    ).reshape(shape)


def philox_uniform(seed: int | Tensor, position: int, n: int, *, draw: int = 0) -> Tensor:
    """Uniform numbers of a counter: float32 [R, n] in (0, 1), one row per seed (an int: one row, on the CPU).

    Number j of a row depends on (seed, position + j, draw) alone, draw in [0, 2^32). Philox4x32-10; see
    docs/random-numbers.md.
    """
    if isinstance(seed, Tensor):
        _expect(seed.dim() == 1, "seed int64 [R]", list(seed.shape))
        _check_tensor("seed", seed, torch.int64, len(seed), seed)
    elif not isinstance(seed, int):
        raise TypeError(f"expected seed to be an int or an int64 tensor, got {type(seed).__name__}")
    _expect(n >= 0, "n >= 0", n)
    _expect(0 <= draw < 2**32, "draw in [0, 2^32)", draw)
    seeds = seed.contiguous() if isinstance(seed, Tensor) else row_seeds(seed, 1, "cpu")
    ops = kernels(seeds)
    if ops is None:
        return reference.philox_uniform(seeds, position, n, draw=draw)
    return ops.philox_uniform(seeds, wrap_int64(position), n, draw)


def _expect(condition: bool, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {wanted}, got {got}")


def _check_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    _expect(_SMALLEST <= temperature <= _LARGEST, "temperature > 0 (a normal float32 number)", temperature)
    _expect(top_k >= 0, "top_k >= 0", top_k)
    _expect(0.0 < top_p <= 1.0, "top_p in (0, 1]", top_p)
    _expect(0.0 <= min_p <= 1.0, "min_p in [0, 1]", min_p)


def _check_integers(name: str, x: int | Tensor, count: int, logits: Tensor) -> None:
    if isinstance(x, Tensor):
        _check_tensor(name, x, torch.int64, count, logits)
    elif not isinstance(x, int):
        raise TypeError(f"expected {name} to be an int or an int64 tensor, got {type(x).__name__}")


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype, count: int, logits: Tensor) -> None:
    if x.dtype != dtype:
        raise TypeError(f"expected {name} of {dtype}, got {x.dtype}")
    _expect(x.device == logits.device, f"{name} on the logits' device {logits.device}", x.device)
    if x.numel() != count:  # text with a symbolic size is made only when needed: it would fix the size
        raise ValueError(f"expected {name} [{count}], one per row, got {list(x.shape)}")


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


@fake("philox_uniform")
def _philox_uniform_fake(seeds: Tensor, position: int, n: int, draw: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], n), dtype=torch.float32)


@fake("exp_weights")
def _exp_weights_fake(d: Tensor) -> Tensor:
    return d.new_empty(d.shape, dtype=torch.int32)
