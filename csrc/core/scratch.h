// Working memory of one call or one thread, aligned to cache lines. For ops.cpp files.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

}  // namespace arimg
