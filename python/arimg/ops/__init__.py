"""Public operations: validated, differentiable where that makes sense, run by the compiled kernels."""

from arimg.ops.attention import TilePlan, row_interval_attention
from arimg.ops.attention_cached import cached_attention, causal_intervals
from arimg.ops.attention_linear import gated_linear_attention
from arimg.ops.attention_ssd import causal_conv1d, ssd_scan
from arimg.ops.block import gated_residual, gated_residual_norm, norm_modulate
from arimg.ops.block_conv import conv3x3, group_norm_affine
from arimg.ops.block_linear import (
    activate,
    dequantize_weight,
    gated_linear_rows,
    linear_rows,
    quantize_weight,
)
from arimg.ops.kv_cache import Rope, append_, append_qk_norm_, read_cache
from arimg.ops.pyramid import accumulate_, encode, encode_bands, encode_parts, features
from arimg.ops.pyramid_bands import band_masks, frequency_bands
from arimg.ops.pyramid_resize import area_down, bicubic_up, bilinear_up, pool_tokens, resize
from arimg.ops.pyramid_tokens import (
    merge_two_levels,
    pack_two_levels,
    token_shuffle,
    token_unshuffle,
    unpack_two_levels,
)
from arimg.ops.quantize import lookup, nearest_code, quantize
from arimg.ops.quantize_codes import (
    bernoulli_bits,
    fsq,
    fsq_codes,
    pack_bits,
    sign_codes,
    unpack_bits,
    unpack_signs,
)
from arimg.ops.quantize_flow import codebook_flow, codebook_score, codebook_softmax_mean, codebook_velocity
from arimg.ops.quantize_search import nearest_code_dual, nearest_codes, residual_nearest_code
from arimg.ops.quantize_statistics import code_statistics, code_usage, kmeans
from arimg.ops.sampling import Drawn, philox_uniform, sample
from arimg.ops.sampling_accept import Accepted, Law, speculative_accept, token_law
from arimg.ops.sampling_accept_gaussian import AcceptedValues, gaussian_accept
from arimg.ops.sampling_accept_grouped import codebook_groups, grouped_accept
from arimg.ops.sampling_bits import sample_bits
from arimg.ops.sampling_confident import keep_most_confident
from arimg.reference.block_linear import QuantizedWeight
from arimg.reference.sampling import frequency_factor

__all__ = [
    "Accepted",
    "AcceptedValues",
    "Drawn",
    "Law",
    "QuantizedWeight",
    "Rope",
    "TilePlan",
    "accumulate_",
    "activate",
    "append_",
    "append_qk_norm_",
    "area_down",
    "band_masks",
    "bernoulli_bits",
    "bicubic_up",
    "bilinear_up",
    "cached_attention",
    "causal_conv1d",
    "causal_intervals",
    "code_statistics",
    "code_usage",
    "codebook_flow",
    "codebook_groups",
    "codebook_score",
    "codebook_softmax_mean",
    "codebook_velocity",
    "conv3x3",
    "dequantize_weight",
    "encode",
    "encode_bands",
    "encode_parts",
    "features",
    "frequency_bands",
    "frequency_factor",
    "fsq",
    "fsq_codes",
    "gated_linear_attention",
    "gated_linear_rows",
    "gated_residual",
    "gated_residual_norm",
    "gaussian_accept",
    "group_norm_affine",
    "grouped_accept",
    "keep_most_confident",
    "kmeans",
    "linear_rows",
    "lookup",
    "merge_two_levels",
    "nearest_code",
    "nearest_code_dual",
    "nearest_codes",
    "norm_modulate",
    "pack_bits",
    "pack_two_levels",
    "philox_uniform",
    "pool_tokens",
    "quantize",
    "quantize_weight",
    "read_cache",
    "residual_nearest_code",
    "resize",
    "row_interval_attention",
    "sample",
    "sample_bits",
    "sign_codes",
    "speculative_accept",
    "ssd_scan",
    "token_law",
    "token_shuffle",
    "token_unshuffle",
    "unpack_bits",
    "unpack_signs",
    "unpack_two_levels",
]
