// How the CPU kernels of this family walk over rows and packed codes. Only for *_cpu.cpp files.
#pragma once

#include "core/gemm_tile.h"
#include "quantize/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

static constexpr float INFINITE = __builtin_inff();

static ARIMG_INLINE int64_t at_most(int64_t x, int64_t limit) {
  return x < limit ? x : limit;
}

// Panels of a block of codes that stays in the first-level cache: 8 KiB.
static ARIMG_INLINE int64_t block_panels(int64_t dim) {
  int64_t panels = 8192 / (dim * PANEL * 4);
  return panels < 1 ? 1 : panels > 16 ? 16 : panels;
}

template <typename T>
static void widen(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) F32::load(from + i).store(to + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Rows [first, first + rows) of x in fp32, filled up with zeros to `padded` rows.
static ARIMG_INLINE void load_rows(DType dtype, const void* x, int64_t dim, int64_t first, int64_t rows,
                                   int64_t padded, float* to) {
  with_dtype(dtype, [&](auto t) { widen((const decltype(t)*)x + first * dim, to, rows * dim); });
  for (int64_t i = rows * dim; i < padded * dim; ++i) to[i] = 0.f;
}

// The scores of the tile's rows against one panel.
template <int R>
static ARIMG_INLINE void score_panel(Tile<R>& tile, const float* x, int64_t dim, const float* panel) {
  tile.start(F32::load(panel), F32::load(panel + W));
  tile.multiply(x, dim, panel + PANEL, dim);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
