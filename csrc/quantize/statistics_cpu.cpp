// See statistics.h. Sorted by code, a sum stays in registers and is written once, whatever the size of the
// codebook.
#include "quantize/statistics.h"

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

void sort_by_code(const CodeStatistics& p, int64_t* starts, int64_t* order) {
  for (int64_t k = 0; k <= p.count; ++k) starts[k] = 0;
  auto is_code = [&](int64_t k) { return uint64_t(k) < uint64_t(p.count); };
  for (int64_t row = 0; row < p.rows; ++row)
    if (is_code(p.index[row])) ++starts[p.index[row] + 1];
  for (int64_t k = 0; k < p.count; ++k) starts[k + 1] += starts[k];
  // The start of each code moves to its end, which is the start of the next: shifted back afterwards.
  for (int64_t row = 0; row < p.rows; ++row)
    if (is_code(p.index[row])) order[starts[p.index[row]]++] = row;
  for (int64_t k = p.count; k > 0; --k) starts[k] = starts[k - 1];
  starts[0] = 0;
}

// W values from column d of a row; lanes beyond the row may hold those of the next one.
template <typename T>
static ARIMG_INLINE F32 load_row(const CodeStatistics& p, int64_t row, int64_t d) {
  const int64_t at = row * p.dim + d, left = p.rows * p.dim - at;
  const T* from = (const T*)p.x + at;
  return left >= W ? F32::load(from) : F32::load_partial(from, int(left));
}

// Rows of one code are anywhere in memory, but those of the next codes are known: while a code's n rows are
// added up, as many of the next ones, none from `end` on, are fetched.
template <typename T, int VECTORS>
static ARIMG_INLINE void sum_columns(const CodeStatistics& p, const int64_t* rows, int64_t n,
                                     const int64_t* end, int64_t d, float* out) {
  F32 sum[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[v] = F32(0.f);
  for (int64_t i = 0; i < n; ++i) {
    const T* next = (const T*)p.x + (rows + n + i < end ? rows[n + i] : rows[i]) * p.dim + d;
    for (int v = 0; v < VECTORS; ++v) {
      __builtin_prefetch(next + v * W);
      sum[v] = sum[v] + load_row<T>(p, rows[i], d + v * W);
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t left = p.dim - (d + v * W);
    if (left >= W)
      sum[v].store(out + d + v * W);
    else
      sum[v].store_partial(out + d + v * W, int(left));
  }
}

template <typename T>
static void sum_codes(const CodeStatistics& p, const int64_t* starts, const int64_t* order, int64_t begin,
                      int64_t end) {
  const int64_t* last = order + starts[p.count];
  for (int64_t k = begin; k < end; ++k) {
    const int64_t* rows = order + starts[k];
    const int64_t n = p.counts[k] = starts[k + 1] - starts[k];
    float* out = p.sums + k * p.dim;
    if (n == 0) {
      for (int64_t d = 0; d < p.dim; ++d) out[d] = 0.f;
      continue;
    }
    int64_t d = 0;
    for (; d + 4 * W <= p.dim; d += 4 * W) sum_columns<T, 4>(p, rows, n, last, d, out);
    for (; d < p.dim; d += W) sum_columns<T, 1>(p, rows, n, last, d, out);
  }
}

void code_statistics(const CodeStatistics& p, const int64_t* starts, const int64_t* order, int64_t begin,
                     int64_t end) {
  with_dtype(p.dtype, [&](auto t) { sum_codes<decltype(t)>(p, starts, order, begin, end); });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
