"""When a proposed token becomes final, where many are proposed at once: how many stay masked after each step,
and which proposals are the most confident.

    masked = masked_after(tokens=256, steps=8, ratio=cosine)
    for step in range(8):
        drawn = ops.sample(logits, seed=seed, position=step * 256, return_logprob=True)
        confidence = gumbel_confidence(drawn.logprob, temperature, seed, step * 256)
        final |= ops.keep_most_confident(confidence, unknown - masked[step], ~final)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from arimg import ops

NOISE_DRAW, ORDER_DRAW = 2**32 - 1, 2**32 - 2  # draws of docs/random-numbers.md, apart from the tokens' own

Ratio = Callable[[float], float]


def cosine(progress: float) -> float:
    """The share that is still masked, cos(pi/2 r): MaskGIT, MAR, Hi-MAR, Meissonic, Show-o."""
    return math.cos(math.pi / 2 * progress)


def arccosine(progress: float) -> float:
    """2/pi arccos(r): STAR's refiner."""
    return math.acos(progress) * 2 / math.pi


def linear(progress: float) -> float:
    return 1.0 - progress


def masked_after(tokens: int, steps: int, ratio: Ratio = cosine) -> list[int]:
    """How many of the tokens are masked after each step: floor(tokens * ratio((k + 1) / steps)), at least one
    fewer than before, at least one before the last step (while there are tokens for it), none after it."""
    if tokens < 0 or steps < 1:
        raise ValueError(f"expected tokens >= 0 and steps >= 1, got {tokens} and {steps}")
    counts: list[int] = []
    left = tokens
    for step in range(steps - 1):
        wanted = math.floor(tokens * ratio((step + 1) / steps))
        left = min(left, max(1, min(left - 1, wanted)))
        counts.append(left)
    return [*counts, 0]


# --- confidence of proposals [R, L] ----------------------------------------------------------------
def probability_confidence(logprob: Tensor) -> Tensor:
    """The probability of the proposed token: HMAR's refinement, STAR's later steps."""
    return logprob.exp()


def random_confidence(seeds: Tensor, length: int, position: int = 0) -> Tensor:
    """A random order: MAR, Hi-MAR, STAR's first steps. seeds int64 [R] -> float32 [R, length]."""
    return ops.philox_uniform(seeds, position, length, draw=ORDER_DRAW)


def gumbel_confidence(logprob: Tensor, temperature: float, seeds: Tensor, position: int = 0) -> Tensor:
    """log p + T Gumbel: MaskGIT, Meissonic (T from 2 to 0), Show-o. logprob [R, L], seeds int64 [R]."""
    if temperature == 0:
        return logprob
    noise = ops.philox_uniform(seeds, position, logprob.shape[-1], draw=NOISE_DRAW)
    return logprob - temperature * (-noise.log()).log()


@dataclass(frozen=True)
class AnnealedNoise:
    """The temperature of `gumbel_confidence`, falling linearly to 0 at the last step."""

    start: float

    def temperature(self, step: int, steps: int) -> float:
        return self.start * (1.0 - (step + 1) / steps)
