// Everything a `.cu` file needs to compile and run on the host. Included by csrc/core/cuda.h in place of the
// CUDA headers when ARIMG_EMULATOR is defined. docs/emulator.md says what it checks and what it cannot show.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#pragma GCC diagnostic ignored "-Wunknown-pragmas"

#include "collectives.h"
#include "engine.h"
#include "intrinsics.h"
#include "shared.h"
#include "vector_types.h"

// --- the few host functions that launchers use ---

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
