"""Public operations of the pyramid family."""

from arimg.reference.pyramid import accumulate_, area_down, bicubic_up, encode

__all__ = ["accumulate_", "area_down", "bicubic_up", "encode"]
