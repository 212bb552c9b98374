"""Fast kernels and composable parts for autoregressive image models."""

__version__ = "0.1.0"

from arimg import ops, reference
from arimg._config import show_config
from arimg.accelerate import accelerate
from arimg.pipeline import pipelined

__all__ = ["__version__", "accelerate", "ops", "pipelined", "reference", "show_config"]
