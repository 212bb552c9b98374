"""Every operation of `arimg.ops` in plain torch, with the same signature: oracle, fallback and baseline."""

from arimg.reference.attention import cached_attention, row_interval_attention, visible
from arimg.reference.attention_linear import gated_linear_attention
from arimg.reference.attention_ssd import causal_conv1d, ssd_scan
from arimg.reference.block import gated_residual, gated_residual_norm, norm_modulate
from arimg.reference.block_conv import conv3x3, group_norm_affine
from arimg.reference.block_linear import (
    QuantizedWeight,
    activate,
    dequantize_weight,
    gated_linear_rows,
    linear_rows,
    quantize_weight,
)
from arimg.reference.kv_cache import (
    Rope,
    append_,
    append_qk_norm_,
    decode_vectors,
    encode_vectors,
    read_cache,
    rotate,
)
from arimg.reference.pyramid import accumulate_, encode, features
from arimg.reference.pyramid_bands import band_masks, frequency_bands
from arimg.reference.pyramid_resize import area_down, bicubic_up, bilinear_up, pool_tokens, resize
from arimg.reference.pyramid_tokens import (
    merge_two_levels,
    pack_two_levels,
    token_shuffle,
    token_unshuffle,
    unpack_two_levels,
)
from arimg.reference.quantize import lookup, nearest_code, quantize
from arimg.reference.quantize_codes import (
    bernoulli_bits,
    fsq,
    fsq_codes,
    pack_bits,
    sign_codes,
    unpack_bits,
    unpack_signs,
)
from arimg.reference.quantize_flow import codebook_softmax_mean
from arimg.reference.quantize_search import nearest_code_dual, nearest_codes, residual_nearest_code
from arimg.reference.quantize_statistics import code_statistics, code_usage, kmeans
from arimg.reference.sampling import frequency_factor, philox_uniform, sample
from arimg.reference.sampling_accept import Accepted, Law, shared_noise_draw, speculative_accept, token_law
from arimg.reference.sampling_accept_gaussian import AcceptedValues, gaussian_accept
from arimg.reference.sampling_accept_grouped import codebook_groups, group_masses, grouped_accept, rank_masses
from arimg.reference.sampling_bits import sample_bits
from arimg.reference.sampling_confident import keep_most_confident

__all__ = [
    "Accepted",
    "AcceptedValues",
    "Law",
    "QuantizedWeight",
    "Rope",
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
    "code_statistics",
    "code_usage",
    "codebook_groups",
    "codebook_softmax_mean",
    "conv3x3",
    "decode_vectors",
    "dequantize_weight",
    "encode",
    "encode_vectors",
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
    "group_masses",
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
    "rank_masses",
    "read_cache",
    "residual_nearest_code",
    "resize",
    "rotate",
    "row_interval_attention",
    "sample",
    "sample_bits",
    "shared_noise_draw",
    "sign_codes",
    "speculative_accept",
    "ssd_scan",
    "token_law",
    "token_shuffle",
    "token_unshuffle",
    "unpack_bits",
    "unpack_signs",
    "unpack_two_levels",
    "visible",
]
