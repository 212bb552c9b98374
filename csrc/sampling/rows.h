// Tensors -> Rows and Draws (contract.h) and Stream (stream.h), for the family's ops files.
#pragma once

#include <optional>

#include "core/ops.h"
#include "sampling/contract.h"
#include "sampling/stream.h"

namespace arimg {

// A few tens of microseconds of work per thread at least.
inline int64_t row_grain(int64_t vocabulary) {
  return 1 + 16384 / (vocabulary + 1);
}

template <typename T>
const T* values(const std::optional<Tensor>& t, const Tensor& like, ScalarType dtype, int64_t count,
                const char* message) {
  if (!t.has_value()) return nullptr;
  require(
      t->scalar_type() == dtype && t->is_contiguous() && t->numel() == count && t->device() == like.device(),
      message);
  return static_cast<const T*>(t->const_data_ptr());
}

// logits [entries, tokens, V] with contiguous rows at one stride, entries doubled by guidance.
inline Rows rows_of(const Tensor& logits, double temperature, int64_t top_k, double top_p, double min_p,
                    std::optional<double> guidance, const std::optional<Tensor>& guidances) {
  Rows p{};
  p.guided = guidance.has_value() || guidances.has_value();
  const int64_t halves = p.guided ? 2 : 1;
  require(logits.dim() == 3 && logits.size(0) % halves == 0 && (logits.stride(2) == 1 || logits.size(2) == 1),
          "arimg: expected logits [entries, tokens, V] with contiguous rows");
  const int64_t entries = logits.size(0) / halves, tokens = logits.size(1);
  require(entries * halves <= 1 || tokens <= 1 || logits.stride(0) == tokens * logits.stride(1),
          "arimg: expected logits whose rows lie at one stride");
  p.dtype = dtype_of(logits);
  p.logits = logits.const_data_ptr();
  p.row_stride = tokens == 1 ? logits.stride(0) : logits.stride(1);
  p.rows = entries * tokens;
  p.vocabulary = logits.size(2);
  p.tokens = tokens;
  p.guidance = float(guidance.value_or(1.0));
  p.guidances = values<float>(guidances, logits, ScalarType::Float, entries,
                              "arimg: expected float32 guidance, one per row");
  p.temperature = float(temperature);
  p.top_k = top_k;
  p.dropped = top_p < 1.0 ? 1.0 - top_p : 0.0;
  p.min_weight = int32_t(__builtin_ceil(min_p * double(1 << 30)));
  require(p.rows == 0 || (p.vocabulary >= 1 && p.vocabulary <= max_vocabulary),
          "arimg: expected 1 to 2^24 logits per row");
  return p;
}

// Settings of one per entry.
inline void set_each(Rows& p, const Tensor& logits, int64_t entries,
                     const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
                     const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps) {
  constexpr const char* one_each = "arimg: expected temperature, top_k, top_p and min_p of one per row";
  p.temperatures = values<float>(temperatures, logits, ScalarType::Float, entries, one_each);
  p.top_ks = values<int64_t>(top_ks, logits, ScalarType::Long, entries, one_each);
  p.top_ps = values<float>(top_ps, logits, ScalarType::Float, entries, one_each);
  p.min_ps = values<float>(min_ps, logits, ScalarType::Float, entries, one_each);
}

// [entries, tokens, width], strides of 0 where rows share it.
inline Plane plane_of(const std::optional<Tensor>& t, const Tensor& like, ScalarType dtype, int64_t entries,
                      int64_t tokens, int64_t width) {
  if (!t.has_value()) return {};
  require(t->scalar_type() == dtype && t->device() == like.device() && t->dim() == 3 &&
              t->size(0) == entries && t->size(1) == tokens && t->size(2) == width &&
              (t->stride(2) == 1 || width == 1),
          "arimg: expected processors [entries, tokens, V] with contiguous rows");
  return {t->const_data_ptr(), t->stride(0), t->stride(1)};
}

inline TokenSet set_of(const std::optional<Tensor>& t, const Tensor& like, int64_t entries, int64_t tokens,
                       int64_t vocabulary) {
  const bool bits = t.has_value() && t->scalar_type() == ScalarType::Byte;
  return {plane_of(t, like, bits ? ScalarType::Byte : ScalarType::Bool, entries, tokens,
                   bits ? (vocabulary + 7) / 8 : vocabulary),
          bits};
}

inline Draws draws_of(const Tensor& like, int64_t entries, const std::optional<Tensor>& seeds,
                      int64_t first_seed, const std::optional<Tensor>& offset, int64_t position) {
  return {values<int64_t>(seeds, like, ScalarType::Long, entries, "arimg: expected int64 seeds, one per row"),
          uint64_t(first_seed),
          values<int64_t>(offset, like, ScalarType::Long, 1, "arimg: expected an int64 position [1]"),
          uint64_t(position)};
}

inline Stream stream_of(const Tensor& like, int64_t rows, const std::optional<Tensor>& seeds,
                        int64_t first_seed, const std::optional<Tensor>& positions, int64_t position) {
  const bool one = positions.has_value() && positions->numel() == 1;
  return {values<int64_t>(seeds, like, ScalarType::Long, rows, "arimg: expected seeds int64 [R]"),
          uint64_t(first_seed),
          values<int64_t>(positions, like, ScalarType::Long, one ? 1 : rows,
                          "arimg: expected positions int64 [R] or [1]"),
          one, uint64_t(position)};
}

}  // namespace arimg
