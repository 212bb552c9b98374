"""Class labels; see `arimg.nn.labels`."""

from arimg.nn.labels import class_labels

__all__ = ["class_labels"]
