// What the operators of this family share: a description of their tensors.
#pragma once

#include <optional>

#include "attention/contract.h"
#include "core/ops.h"

namespace arimg {

using MaybeTensor = std::optional<Tensor>;

inline AttentionStrides strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// The strides of a [B, L, H, D] tensor in the order batch, head, row.
inline AttentionStrides strides_of_rows(const Tensor& t) {
  return {t.stride(0), t.stride(2), t.stride(1)};
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// What q says, the dtype and the scale; `batched`: k and v have q's batch (pages do not);
// `codes`: they need not have its dtype.
inline Attention describe_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                    bool batched, bool codes = false) {
  const bool one_byte = k.scalar_type() == v.scalar_type() && codes;
  auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && (!batched || t.size(0) == q.size(0)) && t.size(3) == q.size(3) &&
           (t.numel() == 0 || t.stride(3) == 1) && (one_byte || t.scalar_type() == q.scalar_type()) &&
           same_device(t, q);
  };
  require(q.dim() == 4 && fits(q) && fits(k) && fits(v) && k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
              k.size(2) == v.size(2),
          "arimg: expected q, k, v [B, H, L, D] of one dtype with contiguous channels");
  require(q.size(3) > 0 && q.size(3) <= 256 && q.size(3) % 8 == 0 &&
              (k.size(1) == 0 ? q.size(1) == 0 : q.size(1) % k.size(1) == 0),
          "arimg: expected a head dim that is a multiple of 8 up to 256, and query heads a multiple of key "
          "heads");
  Attention p{};
  p.dtype = dtype_of(q);
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.dim = q.size(3);
  p.q_stride = strides(q);
  p.k_stride = strides(k);
  p.v_stride = strides(v);
  p.scale = float(scale);
  return p;
}

inline bool nothing_to_do(const Attention& p) {
  return p.batch == 0 || p.heads == 0 || p.queries == 0 || p.dim == 0;
}

// Intervals [L] for all batch entries, or [B, L].
inline void describe_intervals(Attention& p, const Tensor& q, const MaybeTensor& row_start,
                               const MaybeTensor& row_end) {
  require(row_start.has_value() == row_end.has_value(), "arimg: expected row_start and row_end together");
  if (!row_start.has_value()) return;
  auto values = [&](const Tensor& t) {
    require(same_device(t, q) && t.scalar_type() == ScalarType::Int && t.is_contiguous() &&
                t.dim() == row_start->dim() &&
                ((t.dim() == 1 && t.size(0) == p.queries) ||
                 (t.dim() == 2 && t.size(0) == p.batch && t.size(1) == p.queries)),
            "arimg: expected contiguous int32 intervals [L] or [B, L]");
    return (const int32_t*)t.const_data_ptr();
  };
  p.row_start = values(*row_start);
  p.row_end = values(*row_end);
  p.interval_stride = row_start->dim() == 2 ? p.queries : 0;
}

inline const float* head_factors(const Attention& p, const Tensor& q, const MaybeTensor& t) {
  if (!t.has_value()) return nullptr;
  require(same_device(*t, q) && t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
              t->dim() == 1 && t->size(0) == p.heads,
          "arimg: expected a contiguous float32 head_scale [H]");
  return (const float*)t->const_data_ptr();
}

}  // namespace arimg
