// Working memory of one call or one thread, aligned to cache lines. For ops.cpp files.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace arimg {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float[], FreeMemory>;

inline Scratch make_scratch(int64_t floats) {
  size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes ? bytes : 64);
  if (p == nullptr) throw std::bad_alloc();
  return Scratch(static_cast<float*>(p));
}

// Asks for large pages for memory not yet written: the first touch of each small page costs more than a whole
// copy (measured: 40 MiB fresh take 17 ms to fill, again 1.3 ms). Allocators keep blocks below 32 MiB, whose
// pages are there already. A hint: failure is no error.
inline void prefer_large_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  if (bytes < int64_t(16 * page)) return;
  uintptr_t begin = (uintptr_t(p) + page - 1) / page * page,
            end = (uintptr_t(p) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace arimg
