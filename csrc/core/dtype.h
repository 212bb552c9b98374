// Storage types and their conversions to and from float, the same on host, device and emulator.
//
// Everything here is `static`: these headers are compiled once per SIMD level with different machine flags,
// and a function with external linkage could be merged by the linker into code for a machine that lacks the
// instructions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ARIMG_HD __host__ __device__ __forceinline__
#else
#define ARIMG_HD __attribute__((always_inline)) inline
#endif

namespace arimg {

enum class DType : int { f32, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static ARIMG_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

static ARIMG_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static ARIMG_HD float to_float(float x) {
  return x;
}
static ARIMG_HD float to_float(BFloat16 x) {
  return bits_float(uint32_t(x.bits) << 16);
}
static ARIMG_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return float(h);
#endif
}

// Rounds to nearest even; NaN stays NaN.
template <typename T>
static ARIMG_HD T from_float(float x);

template <>
ARIMG_HD float from_float<float>(float x) {
  return x;
}
template <>
ARIMG_HD BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  uint32_t u = float_bits(x);
  if (x != x) return BFloat16{uint16_t((u >> 16) | 0x40)};
  return BFloat16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
#endif
}
template <>
ARIMG_HD Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(x))};
#else
  _Float16 h = _Float16(x);
  Half out;
  memcpy(&out.bits, &h, 2);
  return out;
#endif
}

// Calls f with a value of the storage type that `dtype` names: with_dtype(d, [&](auto t) { using T =
// decltype(t); ... }).
template <typename F>
static inline auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(BFloat16{});
    case DType::f16:
      return f(Half{});
    default:
      return f(float{});
  }
}

}  // namespace arimg
