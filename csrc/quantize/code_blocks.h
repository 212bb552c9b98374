// How the CPU kernels of this family walk over rows and packed codes. Only for *_cpu.cpp files.
#pragma once

#include "core/gemm_tile.h"
#include "core/lanes.h"
#include "quantize/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

static constexpr float INFINITE = __builtin_inff();

// Panels of a block of codes that stays in the first-level cache: 8 KiB.
static ARIMG_INLINE int64_t block_panels(int64_t dim) {
  int64_t panels = 8192 / (dim * PANEL * 4);
  return panels < 1 ? 1 : panels > 16 ? 16 : panels;
}

// Floats between two rows of a chunk. The rows of a tile are read side by side: at a power of two they would
// fall into few sets of the first-level cache, so long rows are a cache line longer than they need.
static ARIMG_INLINE int64_t chunk_stride(int64_t dim) {
  return dim < 256 ? dim : (dim + 15) / 16 * 16 + 16;
}

template <typename T>
static void negate(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) (F32(-1.f) * F32::load(from + i)).store(to + i);
  for (; i < n; ++i) to[i] = -to_float(from[i]);
}

// Rows [first, first + rows) of -x in fp32, chunk_stride(dim) apart, then zeros up to `padded` rows. A score
// is offset - x . c: changing the sign here rather than in the codes gives the same bits for less.
static ARIMG_INLINE void load_rows(DType dtype, const void* x, int64_t dim, int64_t first, int64_t rows,
                                   int64_t padded, float* to) {
  const int64_t stride = chunk_stride(dim);
  with_dtype(dtype, [&](auto t) {
    const auto* from = (const decltype(t)*)x + first * dim;
    if (stride == dim)
      negate(from, to, rows * dim);
    else
      for (int64_t row = 0; row < rows; ++row) negate(from + row * dim, to + row * stride, dim);
  });
  for (int64_t i = rows * stride; i < padded * stride; ++i) to[i] = 0.f;
}

// The scores of the tile's rows, of which x holds the negated values, against one panel.
template <int R>
static ARIMG_INLINE void score_panel(Tile<R>& tile, const float* x, int64_t stride, int64_t dim,
                                     const float* panel) {
  tile.start(F32::load(panel), F32::load(panel + W));
  tile.multiply(x, stride, panel + PANEL, dim);
}

// A tile for the last rows of a chunk, which may be fewer: f(number of rows as a constant).
template <int R>
struct Rows {
  static constexpr int count = R;
};
template <typename F>
static ARIMG_INLINE void with_tile_rows(int64_t rows, F&& f) {
  constexpr int part = W == 16 ? 4 : 2;
  if (rows <= part)
    f(Rows<part>{});
  else if (rows <= 2 * part)
    f(Rows<2 * part>{});
  else
    f(Rows<TILE_ROWS>{});
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
