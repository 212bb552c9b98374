// See contract.h. One pass over memory per row: the row (a few KiB) stays in the first-level cache between
// the mean, the deviations and the output.
#include "block/contract.h"
#include "block/norm_row.h"

namespace arimg {
namespace ARIMG_SIMD {

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
  const Statistics statistics = statistics_of(x, C, p.rms, p.eps);
  const T* scale = (const T*)p.scale + (row / p.rows_per_batch) * p.scale_stride;
  const T* shift = (const T*)p.shift + (row / p.rows_per_batch) * p.shift_stride;
  T* out = (T*)p.out + row * C;
  for_lanes(C, [&](int64_t i, int n) {
    F32 normed = statistics.normed(load_lanes(x + i, n));
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
