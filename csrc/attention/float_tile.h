// The two products of the fp32 attention kernels, with ordinary multiply-adds. A warp owns 16 rows of a tile:
// eight lanes share four of them, each lane with every eighth row of the other tile and D / 8 channels of a
// sum.
#pragma once

#include "attention/rows.h"

namespace arimg::cuda {

// The first of the four rows of this lane.
__device__ __forceinline__ int float_row() {
  return warp_in_block() * warp_rows + lane_in_warp() / 8 * 4;
}

// score[r][i] = the product over D channels of row float_row() + r of `a` and row 8 i + lane % 8 of `b`.
template <int D, int stride, int own>
__device__ __forceinline__ void multiply_floats(float (&score)[4][own], Shared<float> a, Shared<float> b) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int i = 0; i < own; ++i) score[r][i] = 0.f;
#pragma unroll 4
  for (int d = 0; d < D; d += 4) {
    float4 x[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) x[r] = a.vec<float4>((float_row() + r) * stride + d);
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const float4 y = b.vec<float4>((i * 8 + lane_in_warp() % 8) * stride + d);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float s = __fmaf_rn(x[r].x, y.x, score[r][i]);
        s = __fmaf_rn(x[r].y, y.y, s);
        s = __fmaf_rn(x[r].z, y.z, s);
        score[r][i] = __fmaf_rn(x[r].w, y.w, s);
      }
    }
  }
}

// sum += weights times the `rows` rows of b; the warp's rows of weights are in shared memory.
template <int D, int stride, int rows, int weight_stride>
__device__ __forceinline__ void accumulate_floats(float4 (&sum)[4][D / 32], Shared<float> weights,
                                                  Shared<float> b) {
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    float w[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) w[r] = weights[(float_row() + r) * weight_stride + row];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const float4 y = b.vec<float4>(row * stride + i * 32 + lane_in_warp() % 8 * 4);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sum[r][i].x = __fmaf_rn(w[r], y.x, sum[r][i].x);
        sum[r][i].y = __fmaf_rn(w[r], y.y, sum[r][i].y);
        sum[r][i].z = __fmaf_rn(w[r], y.z, sum[r][i].z);
        sum[r][i].w = __fmaf_rn(w[r], y.w, sum[r][i].w);
      }
    }
  }
}

// One row of a sum, times factor.
template <int D>
__device__ __forceinline__ void store_floats(float* to, const float4 (&sum)[D / 32], float factor, int dim) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const int channel = i * 32 + lane_in_warp() % 8 * 4;
    if (channel >= dim) continue;
    to[channel] = sum[i].x * factor;
    to[channel + 1] = sum[i].y * factor;
    to[channel + 2] = sum[i].z * factor;
    to[channel + 3] = sum[i].w * factor;
  }
}

}  // namespace arimg::cuda
