// Arithmetic that gives the same bits on every backend: each operation rounds once (IEEE 754, to nearest),
// and no product feeds an addition except through fma, so that neither -ffp-contract nor nvcc's --fmad can
// change a result.
//
// Functions of vectors are templates over the value type: `float` with the operations below (host, device and
// emulator), or F32 with those of core/simd.h. One text, hence one result.
#pragma once

#include "core/dtype.h"

namespace arimg {

static ARIMG_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

static ARIMG_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

static ARIMG_HD float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

static ARIMG_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);  // not the reciprocal of --use_fast_math
#else
  return a / b;
#endif
}

// Halves to even; |x| < 2^31.
static ARIMG_HD int32_t round_to_int(float x) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x);
#else
  return int32_t(__builtin_rintf(x));
#endif
}

static ARIMG_HD float to_float(int32_t x) {
  return float(x);
}
static ARIMG_HD float float_from_bits(int32_t x) {
  return bits_float(uint32_t(x));
}
static ARIMG_HD float larger(float a, float b) {
  return a > b ? a : b;
}  // b where either is NaN

static ARIMG_HD float smaller(float a, float b) {
  return a < b ? a : b;
}  // b where either is NaN
static ARIMG_HD int32_t bits(float x) {
  return int32_t(float_bits(x));
}
static ARIMG_HD float select(bool condition, float a, float b) {
  return condition ? a : b;
}

constexpr int32_t weight_one = 1 << 30;  // exp(0) in the units of exp_weight

// exp(d) * 2^power for -60 <= d <= 0 and a normal result, with a relative error below 2^-22; exact at d = 0.
//
// d = k ln 2 + r with |r| <= ln(2) / 2; exp(r) = 1 + r + r^2 q(r) with q the polynomial of degree 4 that
// minimises the largest relative error (4e-9, coefficients rounded); then times 2^(k + power), which is
// exact.
template <typename F>
static ARIMG_HD F exp_times_power(F d, int power) {
  auto k = round_to_int(multiply(d, F(0x1.715476p+0f)));
  F kf = to_float(k);
  F r = fma(kf, F(-0x1.62ep-1f), d);
  r = fma(kf, F(-0x1.0bfbe8p-15f), r);
  F q = fma(r, F(0x1.6a2434p-10f), F(0x1.1239e2p-7f));
  q = fma(r, q, F(0x1.5558f2p-5f));
  q = fma(r, q, F(0x1.555492p-3f));
  q = fma(r, q, F(0x1.fffffcp-2f));
  q = fma(r, q, F(1.f));
  F p = fma(r, q, F(1.f));
  return multiply(p, float_from_bits((k + (power + 127)) << 23));
}

// round(exp(d) * 2^30) for d <= 0, halves to even; 0 for NaN. exp_weight(0) is 2^30 exactly and nothing below
// -21.5 has a weight.
template <typename F>
static ARIMG_HD auto exp_weight(F d) {
  return round_to_int(exp_times_power(larger(d, F(-22.5f)), 30));
}

// -log(1 - v), an exponentially distributed number, for 31 random bits v = (word / 2 + 1/2) 2^-31. Relative
// error below 2^-21, near 0 too: small numbers, which decide who comes first, keep the resolution of v.
//
// 1 - v = 2^e m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), by its
// series; where e is 0, m - 1 is taken as -v, which 1 - v has rounded.
template <typename I>
static ARIMG_HD auto exponential(I word) {
  using F = decltype(to_float(word));
  F v = multiply(to_float((word >> 1) & I(0x7fffffff)) + F(0.5f), F(0x1p-31f));
  v = smaller(v, F(1.f - 0x1p-24f));
  F y = F(1.f) - v;
  I e = (bits(y) - I(0x3f3504f3)) >> 23;
  F m = float_from_bits(bits(y) - (e << 23));
  F s = divide(select(e == I(0), F(0.f) - v, m - F(1.f)), select(e == I(0), F(2.f) - v, m + F(1.f)));
  F u = multiply(s, s);
  F series = fma(u, F(0x1.c71c72p-4f), F(0x1.24924ap-3f));
  series = fma(u, series, F(0x1.99999ap-3f));
  series = fma(u, series, F(0x1.555556p-2f));
  F twice = s + s;
  F log_m = fma(multiply(twice, u), series, twice);
  return fma(to_float(e), F(-0x1.62e43p-1f), multiply(log_m, F(-1.f)));
}

}  // namespace arimg
