// Attention of a tile of few query rows, such as one decoded token: keys and values are read as they lie,
// once and in order. Only for *_cpu.cpp files.
#pragma once

#include "attention/tile_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

// sums[i] += the products with channels [d, d + V * W) of key i, key after key as they lie in memory.
template <int V, typename Row>
static ARIMG_INLINE void score_channels(const float* query, Row&& row, int64_t d, F32 (&sums)[W]) {
  F32 q[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) q[j] = F32::load(query + d + j * W);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i] = mul_add(q[j], load_stored(row(i) + d + j * W), sums[i]);
}

// Lane i becomes the sum of the lanes of vector i: half the shuffles of a transposition.
template <int Distance>
static ARIMG_INLINE F32 sum_lanes(F32 (&rows)[W], int i) {
  if constexpr (Distance == 0) {
    return rows[i];
  } else {
    F32 a = sum_lanes<Distance / 2>(rows, i), b = sum_lanes<Distance / 2>(rows, i + Distance);
    if constexpr (W == 16)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
    else if constexpr (W == 8)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
    else
      exchange<Distance, 0, 1, 2, 3>(a, b);
    return a + b;
  }
}

// Scores of R rows against W keys, key i at row(i).
template <int R, typename T, typename Row>
static ARIMG_INLINE void score_keys(const Tile<T>& t, Row&& row, float* scores) {
  for (int r = 0; r < R; ++r) {
    const float* query = t.queries + r * t.padded;
    F32 sums[W];
    for (int i = 0; i < W; ++i) sums[i] = F32(0.f);
    int64_t d = 0;
    for (; d + 4 * W <= t.dim; d += 4 * W) score_channels<4>(query, row, d, sums);
    if (d + 2 * W <= t.dim) score_channels<2>(query, row, d, sums), d += 2 * W;
    if (d + W <= t.dim) score_channels<1>(query, row, d, sums);
    sum_lanes<W / 2>(sums, 0).store(scores + r * kFewStride);
  }
}

// Scores of R rows against `count` keys that lie `stride` apart; up to W - 1 more are written.
template <int R, typename T>
static ARIMG_INLINE void score_run(const Tile<T>& t, const T* from, int64_t stride, int64_t ahead,
                                   int64_t count, float* scores) {
  int64_t n = 0;
  for (; n + W <= count; n += W, from += W * stride) {
    if (t.far)
      for (int i = 0; i < W; ++i) prefetch(from + i * stride + ahead, t.dim);
    score_keys<R>(t, [=](int i) { return from + i * stride; }, scores + n);
  }
  if (n == count) return;
  const int64_t last = count - n - 1;
  score_keys<R>(t, [=](int64_t i) { return from + (i < last ? i : last) * stride; }, scores + n);
}

// Channels [d, d + V * W) of the sums of R rows take `part` of the keys from `first` on.
template <int R, int V, typename T>
static ARIMG_INLINE void add_values(const Tile<T>& t, const Part& part, int64_t first, const float* decay,
                                    int64_t d) {
  F32 sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sum[r][i] = F32::load(t.sums + r * t.padded + d + i * W) * F32(decay[r]);
  t.v.runs(first + part.low, part.high - part.low,
           [&](int64_t index, int64_t count, const T* from, int64_t stride, int64_t ahead)
               __attribute__((always_inline)) {
                 const float* weights = t.scores + part.low + index;
                 from += d;
                 for (int64_t n = 0; n < count; ++n, from += stride) {
                   if (t.far) prefetch(from + ahead, V * W);
                   F32 value[V];
#pragma GCC unroll 8
                   for (int i = 0; i < V; ++i) value[i] = load_stored(from + i * W);
#pragma GCC unroll 4
                   for (int r = 0; r < R; ++r) {
                     const F32 weight(weights[r * kFewStride + n]);
#pragma GCC unroll 8
                     for (int i = 0; i < V; ++i) sum[r][i] = mul_add(weight, value[i], sum[r][i]);
                   }
                 }
               });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sum[r][i].store(t.sums + r * t.padded + d + i * W);
}

// Scores or weights of R rows times the factors of the keys; NaN where a factor is NaN or infinite, as the
// values are then.
template <int R>
static ARIMG_INLINE void multiply_factors(const Part& part, const float* factor, float* scores) {
  for (int n = part.from; n < part.to; n += W) {
    const F32 f = F32::load(factor + n), nan = f - f;
    for (int r = 0; r < R; ++r)
      mul_add(F32::load(scores + r * kFewStride + n), f, nan).store(scores + r * kFewStride + n);
  }
}

// All R rows of a tile against up to kFewTile keys from `first` on; channels are whole vectors.
template <int R, typename T>
static __attribute__((noinline)) void attend_few(const Tile<T>& t, const Part& part, int64_t first) {
  const int64_t begin = first + part.low, count = part.high - part.low;
  t.k.runs(begin, count,
           [&](int64_t index, int64_t some, const T* from, int64_t stride, int64_t ahead) __attribute__((
               always_inline)) { score_run<R>(t, from, stride, ahead, some, t.scores + part.low + index); });
  alignas(64) float factor[is_code<T> ? kFewTile : 1];
  if constexpr (is_code<T>) {
    for (int n = part.from; n < part.to; n += W) F32(0.f).store(factor + n);
    t.k.factors(begin, count, factor + part.low);
    multiply_factors<R>(part, factor, t.scores);
  }
  if (!part.whole) mask_rows<kFewStride>(t, 0, R, part, first);
  float decay[W];
  softmax_rows<R, kFewStride>(t.scores, part.from, part.to, t.highest, t.weight, decay);
  if constexpr (is_code<T>) {
    t.v.factors(begin, count, factor + part.low);
    multiply_factors<R>(part, factor, t.scores);
  }
  constexpr int most = R * 8 <= W ? 8 : 4;  // vectors whose sums fit the registers
  int64_t d = 0;
  for (; d + most * W <= t.dim; d += most * W) add_values<R, most>(t, part, first, decay, d);
  if (most > 4 && d + 4 * W <= t.dim) add_values<R, 4>(t, part, first, decay, d), d += 4 * W;
  if (d + 2 * W <= t.dim) add_values<R, 2>(t, part, first, decay, d), d += 2 * W;
  if (d + W <= t.dim) add_values<R, 1>(t, part, first, decay, d);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
