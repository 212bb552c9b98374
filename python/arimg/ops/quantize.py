"""Public operations of the quantize family."""

from arimg.reference.quantize import lookup, nearest_code, quantize

__all__ = ["lookup", "nearest_code", "quantize"]
