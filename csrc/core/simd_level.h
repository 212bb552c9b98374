// Which SIMD level the CPU kernels run at, and the one dispatch, outside all loops.
//
// A CPU kernel is declared with ARIMG_CPU_KERNEL(status, name, (arguments)) in contract.h, defined in
// `namespace arimg::ARIMG_SIMD` in a *_cpu.cpp file (compiled once per level) and called as
// ARIMG_CPU(name)(arguments).
#pragma once

#if defined(__x86_64__)
#define ARIMG_CPU_KERNEL(result, name, arguments) \
  namespace scalar {                              \
  result name arguments;                          \
  }                                               \
  namespace avx2 {                                \
  result name arguments;                          \
  }                                               \
  namespace avx512 {                              \
  result name arguments;                          \
  }
#define ARIMG_CPU(name)                                               \
  (::arimg::simd_level() == ::arimg::SimdLevel::avx512 ? avx512::name \
   : ::arimg::simd_level() == ::arimg::SimdLevel::avx2 ? avx2::name   \
                                                       : scalar::name)
#else
#define ARIMG_CPU_KERNEL(result, name, arguments) \
  namespace scalar {                              \
  result name arguments;                          \
  }
#define ARIMG_CPU(name) scalar::name
#endif

namespace arimg {

enum class SimdLevel : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The best level this machine has, lowered by the environment variable ARIMG_SIMD_LEVEL
// (scalar | avx2 | avx512) and by set_simd_level.
SimdLevel simd_level();
SimdLevel detected_simd_level();
// Returns false, changing nothing, when this machine or build lacks the level.
bool set_simd_level(SimdLevel level);
const char* simd_level_name(SimdLevel level);

}  // namespace arimg
