// A tile of query rows against keys: many rows share keys turned and converted once, few read them in place.
// Only for *_cpu.cpp files.
#pragma once

#include "attention/few_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

// Rows [row, row + R) against the transposed keys of one tile.
template <int R, typename T>
static __attribute__((noinline)) void attend(const Tile<T>& t, int64_t row, const Part& part, int64_t first,
                                             const float* values) {
  for (int n = part.from; n < part.to; n += kPanel)
    multiply_panel<R>(t.queries + row * t.padded, t.padded, 1, t.keys + n * t.dim, kPanel, t.dim, nullptr,
                      t.scores + n, kTile);
  if (!part.whole) mask_rows<kTile>(t, row, R, part, first);
  float decay[W];
  softmax_rows<R, kTile>(t.scores, part.from, part.to, t.highest + row, t.weight + row, decay);
  for (int64_t d = 0; d < t.dim; d += kPanel)
    multiply_panel<R>(t.scores + part.low, kTile, 1, values + part.low * t.padded + d, t.padded,
                      part.high - part.low, decay, t.sums + row * t.padded + d, t.padded);
}

// All rows of the tile against the keys [begin, end); begin is a multiple of the key tile.
template <typename T>
static void attend_tile(const Tile<T>& t, int64_t begin, int64_t end) {
  Span spans[kMaxGroups], all = span_of(t.visible, t.offset, t.rows, t.wrap);
  for (int64_t row = 0; row < t.rows; row += kGroup)
    spans[row / kGroup] =
        span_of(t.visible, t.offset + row, t.rows - row < kGroup ? t.rows - row : kGroup, t.wrap);
  const bool few = t.rows <= kFew && t.dim % W == 0;
  const int64_t sinks = t.visible.sinks;
  const int64_t step = few ? kFewTile : kTile;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = end - first < step ? end - first : step;
    const Part used(all, sinks, first, count);
    if (used.empty()) continue;
    if (few) {
      with_rows<kFew>(t.rows, [&](auto rows) { attend_few<rows.value>(t, used, first); });
      continue;
    }
    load_transposed(t.k, first + used.from, used.high - used.from, t.dim, t.keys + used.from * t.dim);
    // fp32 values are read in place, unless their rows are so far apart that they would evict each other.
    const float* values = t.values;
    if (sizeof(T) == 4 && t.dim == t.padded && t.v.stride == t.dim && t.v.run(first, count) != nullptr) {
      values = (const float*)t.v.at(first);
    } else {
      float factor[kTile];
      if constexpr (is_code<T>) t.v.factors(first + used.low, used.high - used.low, factor + used.low);
      t.v.runs(first + used.low, used.high - used.low,
               [&](int64_t index, int64_t some, const T* from, int64_t stride, int64_t) {
                 for (int64_t n = used.low + index; some > 0; ++n, --some, from += stride)
                   load_row(from, t.dim, t.padded, is_code<T> ? factor[n] : 1.f, t.values + n * t.padded);
               });
    }
    for (int64_t row = 0; row < t.rows; row += kGroup) {
      const Part part(spans[row / kGroup], sinks, first, count);
      if (part.empty()) continue;
      with_rows<kGroup>(t.rows - row < kGroup ? t.rows - row : kGroup,
                        [&](auto group) { attend<group.value>(t, row, part, first, values); });
    }
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
