"""When a proposed token becomes final, where many are proposed at once: a plan says, as data, how many each
step commits and in which order.

    plan = PUBLISHED["Meissonic"]
    for step, count in enumerate(plan.committed(tokens)):
        drawn = ops.sample(logits, seed=seeds, position=step * tokens, return_logprob=True)
        final |= plan.commit(step, drawn.logprob, final, seeds)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from arimg import ops

NOISE_DRAW, ORDER_DRAW = 2**32 - 1, 2**32 - 2  # draws of docs/random-numbers.md, apart from the tokens' own

Ratio = Callable[[float], float]
Rule = Literal["probability", "gumbel", "random"]


# --- how many --------------------------------------------------------------------------------------
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


class Amounts(Protocol):
    @property
    def steps(self) -> int: ...

    def committed(self, tokens: int) -> list[int]:
        """How many tokens each step commits; they sum to `tokens`."""
        ...


@dataclass(frozen=True)
class ByRatio:
    """`masked_after`, as differences."""

    steps: int
    ratio: Ratio = cosine

    def committed(self, tokens: int) -> list[int]:
        masked = masked_after(tokens, self.steps, self.ratio)
        return [before - after for before, after in zip([tokens, *masked], masked, strict=False)]


@dataclass(frozen=True)
class ByCounts:
    """So many at each step, for a map of that size alone."""

    counts: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.counts)

    def committed(self, tokens: int) -> list[int]:
        if sum(self.counts) != tokens or any(n < 0 for n in self.counts):
            raise ValueError(f"expected counts that sum to the {tokens} tokens, got {self.counts}")
        return list(self.counts)


# --- in which order: confidence of proposals [R, L] ------------------------------------------------
def probability_confidence(logprob: Tensor) -> Tensor:
    """The probability of the proposed token: HMAR's refinement, STAR's later steps."""
    return logprob.exp()


def random_confidence(seeds: Tensor, length: int, position: int = 0) -> Tensor:
    """A random order: MAR, Hi-MAR, STAR's first steps. seeds int64 [R] -> float32 [R, length]."""
    return ops.philox_uniform(seeds, position, length, draw=ORDER_DRAW)


def gumbel_confidence(logprob: Tensor, temperature: float, seeds: Tensor, position: int = 0) -> Tensor:
    """log p + T Gumbel: MaskGIT, Meissonic, Show-o. logprob [R, L], seeds int64 [R]."""
    if temperature == 0:
        return logprob
    noise = ops.philox_uniform(seeds, position, logprob.shape[-1], draw=NOISE_DRAW)
    return logprob - temperature * (-noise.log()).log()


class Noise(Protocol):
    """The temperature of `gumbel_confidence` at each step."""

    def temperature(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class AnnealedNoise:
    """start (1 - (k + 1) / steps), which is 0 at the last step: MaskGIT."""

    start: float

    def temperature(self, step: int, steps: int) -> float:
        return self.start * (1.0 - (step + 1) / steps)


@dataclass(frozen=True)
class LinearNoise:
    """From `start` at the first step to `end` at the last: Meissonic (2 to 0)."""

    start: float
    end: float = 0.0

    def temperature(self, step: int, steps: int) -> float:
        return self.start + (self.end - self.start) * (step / (steps - 1) if steps > 1 else 1.0)


@dataclass(frozen=True)
class CompoundingNoise:
    """start times the product of all (1 - (j + 1) / steps) up to this step, as PARM's released code on Show-o
    has it: a temperature meant to fall linearly that is overwritten at each step."""

    start: float

    def temperature(self, step: int, steps: int) -> float:
        return self.start * math.prod(1.0 - (j + 1) / steps for j in range(step + 1))


# --- both ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """How the proposals of one map become final.

    rule: the most probable first, the same with Gumbel noise, or a random order, which is one order for the
    whole map. The first `random_steps` go in random order whatever the rule is.
    """

    amounts: Amounts
    rule: Rule = "probability"
    random_steps: int = 0
    noise: Noise = AnnealedNoise(1.0)

    @property
    def steps(self) -> int:
        return self.amounts.steps

    def committed(self, tokens: int) -> list[int]:
        """How many tokens each step commits."""
        return self.amounts.committed(tokens)

    def confidence(self, step: int, logprob: Tensor, seeds: Tensor, position: int = 0) -> Tensor:
        """Of the proposals of a step: logprob [R, L], seeds int64 [R] -> [R, L]. `position`: where the random
        numbers of this map begin; noise takes L positions per step from there."""
        length = logprob.shape[-1]
        if self.rule == "random" or step < self.random_steps:
            return random_confidence(seeds, length, position)
        if self.rule == "gumbel":
            temperature = self.noise.temperature(step, self.steps)
            return gumbel_confidence(logprob, temperature, seeds, position + step * length)
        return probability_confidence(logprob)

    def commit(self, step: int, logprob: Tensor, final: Tensor, seeds: Tensor, position: int = 0) -> Tensor:
        """What a step adds to `final`, both bool [R, L]."""
        count = self.committed(logprob.shape[-1])[step]
        return ops.keep_most_confident(self.confidence(step, logprob, seeds, position), count, ~final)


def one_pass(tokens: int) -> Plan:
    """Everything at once, as a scale without refinement."""
    return Plan(ByCounts((tokens,)))


PUBLISHED: Mapping[str, Plan] = {
    "MaskGIT": Plan(ByRatio(8), "gumbel", noise=AnnealedNoise(4.5)),  # also the second stage of DiGIT
    "Meissonic": Plan(ByRatio(64), "gumbel", noise=LinearNoise(2.0)),
    "Show-o": Plan(ByRatio(18), "gumbel", noise=AnnealedNoise(1.0)),
    "Show-o in PARM": Plan(ByRatio(18), "gumbel", noise=CompoundingNoise(1.0)),
    "MAR": Plan(ByRatio(256), "random"),
    "Hi-MAR pivots": Plan(ByRatio(32), "random"),
    "Hi-MAR dense": Plan(ByRatio(4), "random"),  # 12 steps for the H model
    "STAR refiner": Plan(ByRatio(8, arccosine), random_steps=5),  # or 15 steps
}

# HMAR's refinement, a plan for each of the ten scales of VAR: 14 passes, the most probable first.
HMAR: tuple[Plan, ...] = (
    *(Plan(ByCounts(counts)) for counts in ((1,), (1, 3), (1, 1, 2, 5))),
    *(one_pass(side * side) for side in (4, 5, 6, 8, 10, 13, 16)),
)
