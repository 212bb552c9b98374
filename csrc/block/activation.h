// The activations of linear layers on lanes of floats, and the sum of the lanes. Only for *_cpu.cpp files.
#pragma once

#include "block/linear_rows.h"
#include "core/exp.h"
#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// P(N(0, 1) < x): the upper tail at |x| is e^(-x^2 / 2) times a polynomial in 1 / (1 + 0.3 |x|) (degree 8,
// the largest relative error below 6e-8 up to |x| = 14, where the tail vanishes in fp32).
static ARIMG_INLINE F32 normal_cdf(F32 x) {
  F32 z = absolute(x);
  F32 t = F32(1.f) / mul_add(z, F32(0.3f), F32(1.f));
  F32 q = mul_add(t, F32(0.0383783057f), F32(-0.169166192f));
  q = mul_add(t, q, F32(0.228660241f));
  q = mul_add(t, q, F32(-0.076506637f));
  q = mul_add(t, q, F32(0.142535627f));
  q = mul_add(t, q, F32(0.0946834832f));
  q = mul_add(t, q, F32(0.121920355f));
  q = mul_add(t, q, F32(0.119487688f));
  q = mul_add(t, q, F32(7.16893237e-06f));
  F32 tail = q * exp_nonpositive(z * z * F32(-0.5f));
  return select(x < F32(0.f), tail, F32(1.f) - tail);
}

static ARIMG_INLINE F32 activate(Activation activation, F32 x) {
  switch (activation) {
    case Activation::gelu:
      return x * normal_cdf(x);
    case Activation::gelu_tanh: {
      // (1 + tanh u) / 2 is the sigmoid of 2 u.
      F32 u = x * mul_add(x * x, F32(0.0713548163f), F32(1.59576912f));
      return x * sigmoid(u);
    }
    case Activation::silu:
      return silu(x);
    case Activation::relu:
      return select(x < F32(0.f), F32(0.f), x);  // NaN stays
    default:
      return x;
  }
}

// As reduce_add, by shuffles: the lanes from `half` on are added to those before, again and again.
template <int half, int... Lane>
static ARIMG_INLINE FloatVec fold(FloatVec v) {
  return v + __builtin_shufflevector(v, v, ((Lane + half) % W)...);
}
static ARIMG_INLINE float sum_lanes(F32 x) {
  FloatVec v = x.v;
  if constexpr (W == 16) v = fold<8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(v);
  if constexpr (W == 16) v = fold<4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(v);
  if constexpr (W == 8) v = fold<4, 0, 1, 2, 3, 4, 5, 6, 7>(v);
  if constexpr (W >= 8) {
    typedef float Four __attribute__((vector_size(16)));
    Four low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
    return (low[0] + low[2]) + (low[1] + low[3]);
  }
  return (v[0] + v[2]) + (v[1] + v[3]);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
