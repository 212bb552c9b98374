// Copies between rows and lanes: matrices turned in squares of W x W, the rest one by one.
#pragma once

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// square(row, column) for whole W x W squares of [rows, columns], single(row, column) for what they leave.
template <typename Square, typename Single>
static ARIMG_INLINE void for_squares(int64_t rows, int64_t columns, Square&& square, Single&& single) {
  int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
  for (int64_t r = 0; r < whole_rows; r += W) {
    for (int64_t c = 0; c < whole_columns; c += W) square(r, c);
    for (int64_t i = r; i < r + W; ++i)
      for (int64_t c = whole_columns; c < columns; ++c) single(i, c);
  }
  for (int64_t r = whole_rows; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) single(r, c);
}

// to[column * to_stride + i] = row(i)[column].
template <typename Row>
static void transposed_rows(Row&& row, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  auto square = [&](int64_t first, int64_t column) {
    F32 block[W];
    for (int i = 0; i < W; ++i) block[i] = F32::load(row(first + i) + column);
    transpose(block);
    for (int i = 0; i < W; ++i) block[i].store(to + (column + i) * to_stride + first);
  };
  auto single = [&](int64_t i, int64_t column) { to[column * to_stride + i] = to_float(row(i)[column]); };
  for_squares(rows, columns, square, single);
}

// to[column * to_stride + row] = from[row * stride + column].
template <typename T>
static void transposed_copy(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                            int64_t to_stride) {
  transposed_rows([=](int64_t row) { return from + row * stride; }, rows, columns, to, to_stride);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
