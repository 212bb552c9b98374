// The exponential of a softmax, and what is made of it. Only for *_cpu.cpp files.
#pragma once

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// e^x for x <= 0: 1 exactly at 0, 0 below -87, NaN for NaN; relative error 1e-8 plus rounding. x = n ln 2 + f
// with ln 2 in two parts, so that large scores lose nothing.
static ARIMG_INLINE F32 exp_nonpositive(F32 x) {
  Mask vanishes = x < F32(-87.f);
  F32 bounded = max(F32(-87.f), x);  // in this order NaN passes
  I32 n = round_to_int(bounded * F32(1.44269504f));
  F32 whole = to_float(n);
  F32 f = mul_add(whole, F32(-0.693359375f), bounded);
  f = mul_add(whole, F32(2.12194440e-4f), f);
  F32 r(0.0013814599f);
  r = mul_add(r, f, F32(0.008368717f));
  r = mul_add(r, f, F32(0.04166839f));
  r = mul_add(r, f, F32(0.16666521f));
  r = mul_add(r, f, F32(0.49999994f));
  r = mul_add(r * f, f, f) + F32(1.f);
  r = r * float_from_bits((n + I32(127)) << 23);
  return select(vanishes, F32(0.f), r);
}

// e^x for x <= 0 (a little above 0 does no harm) in fewer instructions: 1 exactly at 0, 0 exactly below -88
// and at -inf, NaN for NaN; relative error 1e-7 + 6e-8 |x|, so for the differences of a softmax.
static ARIMG_INLINE F32 exp_difference(F32 x) {
  F32 y = max(F32(-127.f), x * F32(1.44269504f));  // in this order NaN passes; 2^-127 becomes a zero below
  I32 n = round_to_int(y);
  F32 f = y - to_float(n);
  F32 r(0.0013264726f);
  r = mul_add(r, f, F32(0.009671513f));
  r = mul_add(r, f, F32(0.055507336f));
  r = mul_add(r, f, F32(0.24022242f));
  r = mul_add(r, f, F32(0.693147f));
  r = mul_add(r, f, F32(1.f));
  return r * float_from_bits((n + I32(127)) << 23);
}

static ARIMG_INLINE F32 absolute(F32 x) {
  return float_from_bits(bits(x) & I32(0x7fffffff));
}

// 1 / (1 + e^-x), to rounding; 0 below -87.
static ARIMG_INLINE F32 sigmoid(F32 x) {
  F32 e = exp_nonpositive(F32(0.f) - absolute(x));
  return select(x < F32(0.f), e, F32(1.f)) / (F32(1.f) + e);
}

static ARIMG_INLINE F32 silu(F32 x) {
  return x * sigmoid(x);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
