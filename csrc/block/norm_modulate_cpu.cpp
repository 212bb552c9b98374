// See contract.h. One pass over memory per row: the row (a few KiB) stays in the first-level cache between
// the mean, the deviations and the output.
#include "block/contract.h"
#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// f(i, n): the n lanes from i; n == W except in the tail.
template <typename F>
static ARIMG_INLINE void for_lanes(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, W);
  if (i < count) f(i, int(count - i));
}

template <typename T>
static ARIMG_INLINE F32 load_lanes(const T* p, int n) {
  return n == W ? F32::load(p) : F32::load_partial(p, n);
}

template <typename T>
static ARIMG_INLINE void store_lanes(F32 x, T* p, int n) {
  if (n == W)
    x.store(p);
  else
    x.store_partial(p, n);
}

// With a residual the sum is rounded to the storage type first and the statistics are taken from what was
// stored, so that the fused and the separate operations agree.
template <typename T>
static const T* add_residual(const NormModulate& p, int64_t row) {
  int64_t C = p.channels;
  const T* x = (const T*)p.x + row * C;
  if (p.y == nullptr) return x;
  const T* y = (const T*)p.y + row * C;
  const T* gate = (const T*)p.gate + (row / p.rows_per_batch) * p.gate_stride;
  T* sum = (T*)p.residual + row * C;
  for_lanes(C, [&](int64_t i, int n) {
    store_lanes(mul_add(load_lanes(gate + i, n), load_lanes(y + i, n), load_lanes(x + i, n)), sum + i, n);
  });
  return sum;
}

template <typename T>
static void row_norm_modulate(const NormModulate& p, int64_t row) {
  int64_t C = p.channels;
  const T* x = add_residual<T>(p, row);
  if (p.scale == nullptr) return;
  F32 total(0.f);
  for_lanes(C, [&](int64_t i, int n) { total = total + load_lanes(x + i, n); });
  float mean = reduce_add(total) / float(C);
  // The second pass also sums the deviations themselves, which takes back the rounding of the first mean.
  F32 squares(0.f), deviations(0.f);
  for_lanes(C, [&](int64_t i, int n) {
    // Lanes beyond the row must not add mean^2.
    F32 d = (n == W ? F32::load(x + i) : F32::load_partial(x + i, n, mean)) - F32(mean);
    squares = mul_add(d, d, squares);
    deviations = deviations + d;
  });
  float correction = reduce_add(deviations) / float(C);
  float variance = reduce_add(squares) / float(C) - correction * correction;
  float inverse = 1.f / __builtin_sqrtf((variance > 0.f ? variance : 0.f) + p.eps);
  const T* scale = (const T*)p.scale + (row / p.rows_per_batch) * p.scale_stride;
  const T* shift = (const T*)p.shift + (row / p.rows_per_batch) * p.shift_stride;
  T* out = (T*)p.out + row * C;
  for_lanes(C, [&](int64_t i, int n) {
    F32 normed = (load_lanes(x + i, n) - F32(mean) - F32(correction)) * F32(inverse);
    store_lanes(mul_add(normed, load_lanes(scale + i, n) + F32(1.f), load_lanes(shift + i, n)), out + i, n);
  });
}

void norm_modulate(const NormModulate& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) row_norm_modulate<decltype(t)>(p, row);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
