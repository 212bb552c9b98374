// Elements of maps on the GPU. For `.cu` files.
#pragma once

#include "core/cuda.h"
#include "pyramid/contract.h"

namespace arimg {
namespace {

// Storage types are chosen at run time: the branch is the same for all threads, and three dtypes in three
// places would be 27 kernels.
__device__ __forceinline__ float load(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return to_float(static_cast<const Half*>(data)[i]);
}

__device__ __forceinline__ void store(DType dtype, void* data, int64_t i, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = value;
  else if (dtype == DType::bf16)
    static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(value);
  else
    static_cast<Half*>(data)[i] = from_float<Half>(value);
}

__device__ __forceinline__ int64_t place(const Map& m, int64_t image, int64_t channel, int64_t pixel) {
  return image * m.batch + channel * m.channel + pixel * m.pixel;
}

}  // namespace
}  // namespace arimg
