#include "core/simd_level.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace arimg {

SimdLevel detected_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(ARIMG_WIDE)
  has_avx512 = has_avx2;
#endif
  return has_avx512 ? SimdLevel::avx512 : has_avx2 ? SimdLevel::avx2 : SimdLevel::scalar;
#else
  return SimdLevel::scalar;
#endif
}

const char* simd_level_name(SimdLevel level) {
  static const char* const names[] = {"scalar", "avx2", "avx512"};
  return names[int(level)];
}

static SimdLevel initial_level() {
  SimdLevel detected = detected_simd_level();
  const char* wanted = std::getenv("ARIMG_SIMD_LEVEL");
  if (wanted == nullptr || *wanted == 0) return detected;
  for (int level = 0; level <= int(SimdLevel::avx512); ++level) {
    if (std::strcmp(wanted, simd_level_name(SimdLevel(level))) != 0) continue;
    if (level <= int(detected)) return SimdLevel(level);
    std::fprintf(stderr, "arimg: ARIMG_SIMD_LEVEL=%s, but this machine has %s; using %s\n", wanted,
                 simd_level_name(detected), simd_level_name(detected));
    return detected;
  }
  std::fprintf(stderr, "arimg: ARIMG_SIMD_LEVEL: expected scalar, avx2 or avx512, got %s; using %s\n", wanted,
               simd_level_name(detected));
  return detected;
}

static std::atomic<SimdLevel>& current() {
  static std::atomic<SimdLevel> level{initial_level()};
  return level;
}

SimdLevel simd_level() {
  return current().load(std::memory_order_relaxed);
}

bool set_simd_level(SimdLevel level) {
  if (level > detected_simd_level()) return false;
  current().store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace arimg
