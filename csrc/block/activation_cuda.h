// The activations of linear layers on one float, for `.cu` files.
#pragma once

#include "block/linear_rows.h"
#include "core/cuda.h"

namespace arimg::cuda {

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return x * 0.5f * erfcf(x * -0.707106781f);
    case Activation::gelu_tanh:
      return x / (1.f + expf(-x * __fmaf_rn(x * x, 0.0713548163f, 1.59576912f)));
    case Activation::silu:
      return x / (1.f + expf(-x));
    case Activation::relu:
      return x < 0.f ? 0.f : x;
    default:
      return x;
  }
}

}  // namespace arimg::cuda
