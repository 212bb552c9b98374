"""How strongly each step of a generation follows its condition: a formula and a schedule, as data.

The same number means different strengths in different systems: a formula turns it into the s of
`ops.sample(guidance=s)`, which takes s c + (1 - s) u of the conditional and unconditional logits c and u.

    Guidance(7.5, linear)                                  # TokenFlow
    Guidance(1.5, linear, BeyondConditional())             # VAR
    Guidance(1.75, after(0.18))                            # GigaTok
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# (step, steps) -> the share of the strength that a step has, 0 to 1
Schedule = Callable[[int, int], float]


class Formula(Protocol):
    @property
    def none(self) -> float:
        """The strength that is the condition alone, from which schedules start."""
        ...

    def scale(self, strength: float) -> float:
        """The s of s c + (1 - s) u."""
        ...

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        """The formula as its system writes it."""
        ...


@dataclass(frozen=True)
class FromUnconditional:
    """u + s (c - u): LlamaGen, GigaTok, VAREdit. 1 is the condition alone, 0 ignores it."""

    none: float = 1.0

    def scale(self, strength: float) -> float:
        return strength

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        return uncond + strength * (cond - uncond)


@dataclass(frozen=True)
class BeyondConditional:
    """(1 + t) c - t u: VAR, STAR, FlexVAR, Show-o. 0 is the condition alone."""

    none: float = 0.0

    def scale(self, strength: float) -> float:
        return 1.0 + strength

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        return (1.0 + strength) * cond - strength * uncond


# --- schedules ---------------------------------------------------------------------------------------------
def constant(step: int, steps: int) -> float:
    """LlamaGen, NAR, DetailFlow, Lumina-mGPT."""
    return 1.0


def linear(step: int, steps: int) -> float:
    """step / (steps - 1): VAR, STAR, HMAR, TokenFlow, ELM, Hi-MAR."""
    return step / max(steps - 1, 1)


def linear_until(last: int) -> Schedule:
    """step / min(steps - 1, last), FlexVAR's, which goes on rising behind `last` where there are more
    steps.
    """
    return lambda step, steps: step / max(min(steps - 1, last), 1)


def after(share: float) -> Schedule:
    """Nothing for the first share of the steps, then everything: GigaTok's "step" (0.18)."""
    return lambda step, steps: float(step >= share * steps)


def half_linear(step: int, steps: int) -> float:
    """Linear over the first half, then constant: Token-Shuffle."""
    return min(1.0, 2 * step / max(steps, 1))


def power_cosine(power: float) -> Schedule:
    """(1 - cos(pi (step / steps)^p)) / 2: RAR, RobusTok."""
    return lambda step, steps: (1 - math.cos(math.pi * (step / max(steps, 1)) ** power)) / 2


def cosine(step: int, steps: int) -> float:
    """(1 - cos(pi step / (steps - 1))) / 2: ELM."""
    return (1 - math.cos(math.pi * linear(step, steps))) / 2


def square(step: int, steps: int) -> float:
    """linear squared: ELM."""
    return linear(step, steps) ** 2


def square_root(step: int, steps: int) -> float:
    """The root of linear: ELM."""
    return math.sqrt(linear(step, steps))


def logarithm(step: int, steps: int) -> float:
    """log(1 + step) / log(steps): ELM."""
    return math.log1p(step) / math.log(steps) if steps > 1 else 1.0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: a strength, its schedule over the steps and what the number means.

    until: from this step on there is none, and only conditional rows are computed (LlamaGen's cfg_interval).
    """

    strength: float
    schedule: Schedule = constant
    formula: Formula = FromUnconditional()
    until: int | None = None

    def scale(self, step: int, steps: int) -> float | None:
        """The s of a step for `ops.sample(guidance=s)`; None: conditional rows alone."""
        if self.until is not None and step >= self.until:
            return None
        rise = (self.strength - self.formula.none) * self.schedule(step, steps)
        return self.formula.scale(self.formula.none + rise)
