// Double precision that gives the same bits on every backend, under the rules of core/math.h: each operation
// rounds once, and no product feeds an addition except through fma.
#pragma once

#include "core/dtype.h"

namespace arimg {

static ARIMG_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

static ARIMG_HD double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

static ARIMG_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

static ARIMG_HD uint64_t double_bits(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}

static ARIMG_HD double bits_double(uint64_t u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}

// log(x 2^exponent) for a positive, normal, finite x; off by less than 2^-50 of the result and 2^-52 in all.
//
// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, by
// the first eleven terms of its series.
static ARIMG_HD double log_of(double x, int exponent = 0) {
  const uint64_t b = double_bits(x);
  const int e = int(int64_t(b - 0x3fe6a09e667f3bcdu) >> 52);
  const double m = bits_double(b - (uint64_t(int64_t(e)) << 52));
  const double s = (m - 1) / (m + 1), u = multiply(s, s);
  double series = 1.0 / 21;
  for (int k = 19; k >= 3; k -= 2) series = fma(u, series, 1.0 / k);
  const double twice = s + s;
  const double log_m = fma(multiply(twice, u), series, twice);
  return fma(double(e + exponent), 0x1.62e42fefa39efp-1, log_m);
}

// cos and sin of 2 pi t for t in [0, 1): a quarter turn is taken off without rounding, the rest (|angle| <=
// pi / 4) goes through Taylor's series. Error below 2^-52.
static ARIMG_HD void cos_sin_of_turn(double t, double& cosine, double& sine) {
  const double quarters = multiply(t, 4.0);
  const int k = int(quarters + 0.5);
  const double x = multiply(quarters - double(k), 0x1.921fb54442d18p+0), u = multiply(x, x);
  double c = 1, s = 1;  // 1 - u / (1 2) (1 - u / (3 4) (...)), and 1 - u / (2 3) (1 - u / (4 5) (...))
  for (int i = 16; i >= 2; i -= 2) {
    c = fma(multiply(u, -1.0 / (i * (i - 1))), c, 1.0);
    s = fma(multiply(u, -1.0 / (i * (i + 1))), s, 1.0);
  }
  s = multiply(s, x);
  cosine = k % 4 == 0 ? c : k % 4 == 1 ? -s : k % 4 == 2 ? -c : s;
  sine = k % 4 == 0 ? s : k % 4 == 1 ? c : k % 4 == 2 ? -s : -c;
}

}  // namespace arimg
