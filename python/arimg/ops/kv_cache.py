"""Public operations of the kv_cache family."""

from arimg.reference.kv_cache import append_qk_norm_

__all__ = ["append_qk_norm_"]
