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

template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

__device__ __forceinline__ int64_t place(const Map& m, int64_t image, int64_t channel, int64_t pixel) {
  return image * m.batch + channel * m.channel + pixel * m.pixel;
}

// N (4 or 8) neighbouring elements of a map, `step` apart, in vectors of up to 16 bytes where they lie side
// by side and `vectors` says that they are aligned; elements from `count` on are left out, and read as 0.
template <int N>
__device__ __forceinline__ void load_run(DType dtype, const void* data, int64_t at, int64_t step, int count,
                                         bool vectors, float (&to)[N]) {
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = j < count ? load(dtype, data, at + j * step) : 0.f;
  } else if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at + j);
      to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
    }
  } else {
    using Raw = Words<N / 2>;
    Raw raw = *reinterpret_cast<const Raw*>(static_cast<const Half*>(data) + at);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      uint16_t bits = uint16_t(raw.word[j / 2] >> (j % 2 * 16));
      to[j] = dtype == DType::bf16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
    }
  }
}

template <int N>
__device__ __forceinline__ void store_run(DType dtype, void* data, int64_t at, int64_t step, int count,
                                          bool vectors, const float (&from)[N]) {
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) store(dtype, data, at + j * step, from[j]);
  } else if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < N; j += 4)
      *reinterpret_cast<float4*>(static_cast<float*>(data) + at + j) =
          make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]);
  } else {
    Words<N / 2> raw;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      auto half = [&](float x) {
        return uint32_t(dtype == DType::bf16 ? from_float<BFloat16>(x).bits : from_float<Half>(x).bits);
      };
      raw.word[j / 2] = half(from[j]) | half(from[j + 1]) << 16;
    }
    *reinterpret_cast<Words<N / 2>*>(static_cast<Half*>(data) + at) = raw;
  }
}

// Whether all runs of N elements along the dense axis of a map are aligned and whole.
template <int N>
bool whole_runs(const Map& m, int64_t channels, int64_t pixels) {
  const bool rows = m.channel == 1;
  const int64_t bytes = (m.dtype == DType::f32 ? 4 : 2) * N, least = bytes < 16 ? bytes : 16;
  return (rows || m.pixel == 1) && reinterpret_cast<uintptr_t>(m.data) % least == 0 && m.batch % N == 0 &&
         (rows ? m.pixel : m.channel) % N == 0 && (rows ? channels : pixels) % N == 0;
}

}  // namespace
}  // namespace arimg
