"""Public operations of the attention family."""

from arimg.reference.attention import cached_attention, row_interval_attention

__all__ = ["cached_attention", "row_interval_attention"]
