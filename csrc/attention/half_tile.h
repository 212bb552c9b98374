// The two tensor core products of the half-precision attention kernels. A warp owns 16 rows of a tile in
// shared memory; fragments are described in core/mma.h.
#pragma once

#include "attention/rows.h"

namespace arimg::cuda {

// Lane addresses of a 16-row tile, as ldmatrix wants them.
__device__ __forceinline__ int fragment_row() {
  return lane_in_warp() % 16;
}
__device__ __forceinline__ int fragment_column() {
  return lane_in_warp() / 16 * 8;
}

// score[i] += A B^T for channels [16 step, 16 step + 16): a is the warp's fragment, tile B holds rows of
// `stride`.
template <int stride, typename T, int tiles>
__device__ __forceinline__ void multiply_rows(float (&score)[tiles][4], const uint32_t (&a)[4],
                                              Shared<T> b_tile, int step) {
  // Rows of the tile are columns of B: matrices (rows 0-7 | 8-15) x (channels 0-7 | 8-15), channels first.
  const int row = lane_in_warp() / 16 * 8 + lane_in_warp() % 8, column = lane_in_warp() / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < tiles; i += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, b_tile.data() + (i * 8 + row) * stride + step * 16 + column);
    mma_m16n8k16<T>(score[i], a, {b[0], b[1]});
    mma_m16n8k16<T>(score[i + 1], a, {b[2], b[3]});
  }
}

// score = A B^T over D channels; rows [first, first + 16) of the tile A are the warp's.
template <int D, int stride, typename T, int tiles>
__device__ __forceinline__ void multiply_transposed(float (&score)[tiles][4], Shared<T> a_tile, int first,
                                                    Shared<T> b_tile) {
#pragma unroll
  for (int i = 0; i < tiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) score[i][j] = 0.f;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    ldmatrix_x4(a, a_tile.data() + (first + fragment_row()) * stride + step * 16 + fragment_column());
    multiply_rows<stride>(score, a, b_tile, step);
  }
}

// sum += weight B, the weights rounded to T; tile B holds a row for each column of the weights.
template <int D, int stride, typename T, int tiles>
__device__ __forceinline__ void accumulate(float (&sum)[D / 8][4], const float (&weight)[tiles][4],
                                           Shared<T> b_tile) {
#pragma unroll
  for (int step = 0; step < tiles / 2; ++step) {
    const float (&low)[4] = weight[step * 2];
    const float (&high)[4] = weight[step * 2 + 1];
    const uint32_t a[4] = {pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]),
                           pack2<T>(high[2], high[3])};
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, b_tile.data() + (step * 16 + fragment_row()) * stride + i * 8 + fragment_column());
      mma_m16n8k16<T>(sum[i], a, {b[0], b[1]});
      mma_m16n8k16<T>(sum[i + 1], a, {b[2], b[3]});
    }
  }
}

// Row `row` (of this lane: half 0 or 1 of its fragments) of a result, times factor.
template <int D, typename T>
__device__ __forceinline__ void store_fragment_row(T* to, const float (&sum)[D / 8][4], int half,
                                                   float factor, int dim) {
  const int t = lane_in_warp() % 4;
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
    if (i * 8 < dim)
      *reinterpret_cast<uint32_t*>(to + i * 8 + t * 2) =
          pack2<T>(sum[i][half * 2] * factor, sum[i][half * 2 + 1] * factor);
}

}  // namespace arimg::cuda
