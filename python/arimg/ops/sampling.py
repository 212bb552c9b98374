"""Public operations of the sampling family."""

from arimg.reference.sampling import philox_uniform, sample

__all__ = ["philox_uniform", "sample"]
