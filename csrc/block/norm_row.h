// The statistics of one row of a norm on the CPU. Only for *_cpu.cpp files.
#pragma once

#include "core/lanes.h"

namespace arimg {
namespace ARIMG_SIMD {

// The normed row is (x - mean - correction) * inverse. An RMS norm has no mean.
struct Statistics {
  float mean, correction, inverse;
  ARIMG_INLINE F32 normed(F32 x) const { return (x - F32(mean) - F32(correction)) * F32(inverse); }
};

template <typename T>
static ARIMG_INLINE Statistics statistics_of(const T* x, int64_t C, bool rms, float eps) {
  Statistics s{0.f, 0.f, 0.f};
  if (!rms) {
    F32 total(0.f);
    for_lanes(C, [&](int64_t i, int n) { total = total + load_lanes(x + i, n); });
    s.mean = reduce_add(total) / float(C);
  }
  // The second pass also sums the deviations themselves, which takes back the rounding of the first mean.
  F32 squares(0.f), deviations(0.f);
  for_lanes(C, [&](int64_t i, int n) {
    // Lanes beyond the row must not add mean^2.
    F32 d = (n == W ? F32::load(x + i) : F32::load_partial(x + i, n, s.mean)) - F32(s.mean);
    squares = mul_add(d, d, squares);
    deviations = deviations + d;
  });
  if (!rms) s.correction = reduce_add(deviations) / float(C);
  float variance = reduce_add(squares) / float(C) - s.correction * s.correction;
  s.inverse = 1.f / __builtin_sqrtf((variance > 0.f ? variance : 0.f) + eps);
  return s;
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
