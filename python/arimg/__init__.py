"""Fast kernels and composable parts for autoregressive image models."""

__version__ = "0.1.0"
