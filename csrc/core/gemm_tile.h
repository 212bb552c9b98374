// The register tile that the small products here share: R rows of `a` against one panel of 2 * W columns.
//
// A panel is [depth][2 * W] floats. Every element of the product is one chain of multiply-adds in increasing
// depth, whatever R is, so a result does not depend on how rows are grouped into tiles.
#pragma once

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int PANEL = 2 * W;

// Rows that, with two vectors of a panel and one broadcast, fill the 16 (or 32) vector registers.
constexpr int TILE_ROWS = W == 16 ? 12 : W == 8 ? 6 : 4;

template <int R>
struct Tile {
  F32 sum[R][2];

  ARIMG_INLINE void start(F32 left, F32 right) {
    for (int r = 0; r < R; ++r) {
      sum[r][0] = left;
      sum[r][1] = right;
    }
  }

  // sum[r] += a[r * stride + k] * panel[k] for k in [0, depth).
  ARIMG_INLINE void multiply(const float* a, int64_t stride, const float* panel, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      F32 left = F32::load(panel + k * PANEL), right = F32::load(panel + k * PANEL + W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        F32 x(a[r * stride + k]);
        sum[r][0] = mul_add(x, left, sum[r][0]);
        sum[r][1] = mul_add(x, right, sum[r][1]);
      }
    }
  }
};

}  // namespace ARIMG_SIMD
}  // namespace arimg
