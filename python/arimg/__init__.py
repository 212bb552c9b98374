"""Fast kernels and composable parts for autoregressive image models."""

__version__ = "0.1.0"

from arimg import ops, reference
from arimg._config import show_config
from arimg.accelerate import accelerate

__all__ = ["__version__", "accelerate", "ops", "reference", "show_config"]
