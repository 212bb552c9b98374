"""How strongly each step of a generation follows its condition: a formula and a schedule, as data.

The same number means different strengths in different systems: a formula turns it into the s of
`ops.sample(guidance=s)`, which takes s c + (1 - s) u of the conditional and unconditional logits c and u.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Formula(Protocol):
    def scale(self, strength: float) -> float:
        """The s of s c + (1 - s) u."""
        ...

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        """The formula as its system writes it."""
        ...


@dataclass(frozen=True)
class FromUnconditional:
    """u + s (c - u): LlamaGen, GigaTok, VAREdit. 1 is the condition alone, 0 ignores it."""

    def scale(self, strength: float) -> float:
        return strength

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        return uncond + strength * (cond - uncond)


@dataclass(frozen=True)
class BeyondConditional:
    """(1 + t) c - t u: VAR, STAR, FlexVAR, Show-o. 0 is the condition alone."""

    def scale(self, strength: float) -> float:
        return 1.0 + strength

    def mix(self, cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
        return (1.0 + strength) * cond - strength * uncond


@dataclass(frozen=True)
class LinearRamp:
    """Classifier-free guidance of VAR: its formula with t = strength * step / (steps - 1)."""

    strength: float
    formula: Formula = BeyondConditional()

    def scale(self, step: int, steps: int) -> float:
        """The s of a step for `ops.sample(guidance=s)`."""
        return self.formula.scale(self.strength * step / max(steps - 1, 1))
