"""How strongly each step of a generation follows its condition."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """Classifier-free guidance of VAR: logits (1 + t) c - t u with t = strength * step / (steps - 1)."""

    strength: float

    def scale(self, step: int, steps: int) -> float:
        """s = 1 + t for `ops.sample(guidance=s)`, which takes s c + (1 - s) u."""
        return 1.0 + self.strength * step / max(steps - 1, 1)
