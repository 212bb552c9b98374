"""Public operations of the block family."""

from arimg.reference.block import gated_residual, gated_residual_norm, norm_modulate

__all__ = ["gated_residual", "gated_residual_norm", "norm_modulate"]
