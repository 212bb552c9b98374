// Rows of any storage type as vectors with a tail. Only for *_cpu.cpp files.
#pragma once

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE int64_t at_most(int64_t x, int64_t limit) {
  return x < limit ? x : limit;
}

// f(i, n): the n lanes from i; n == W except in the tail.
template <typename F>
static ARIMG_INLINE void for_lanes(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, W);
  if (i < count) f(i, int(count - i));
}

// The first n lanes from p (all from n = W on), the rest 0.
template <typename T>
static ARIMG_INLINE F32 load_lanes(const T* p, int64_t n) {
  return n >= W ? F32::load(p) : F32::load_partial(p, int(n));
}

template <typename T>
static ARIMG_INLINE void store_lanes(F32 x, T* p, int64_t n) {
  if (n >= W)
    x.store(p);
  else
    x.store_partial(p, int(n));
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
