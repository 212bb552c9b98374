"""Torch modules built from the operations."""
