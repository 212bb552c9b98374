"""Torch modules built from the operations."""

from arimg.nn.attention import RowIntervalAttention, sparse_is_faster
from arimg.nn.packed_linear import PackedLinear
from arimg.nn.residual_vq import ResidualVQ
from arimg.nn.scalar_quantize import BSQ, FSQ, LFQ
from arimg.nn.state_mixers import HybridLinearAttention, Mamba2
from arimg.nn.vector_quantize import VectorQuantize

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "HybridLinearAttention",
    "Mamba2",
    "PackedLinear",
    "ResidualVQ",
    "RowIntervalAttention",
    "VectorQuantize",
    "sparse_is_faster",
]
