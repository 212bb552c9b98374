// Bytes into and out of vectors, for *_cpu.cpp.
#pragma once

#include "core/simd.h"
#include "kv_cache/codes.h"

namespace arimg {
namespace ARIMG_SIMD {

typedef uint8_t ByteVec __attribute__((vector_size(W)));

// The low bytes of the first n lanes (n >= W: all).
static ARIMG_INLINE void store_bytes(I32 x, uint8_t* to, int64_t n) {
  if (n >= W) {
    ByteVec bytes = __builtin_convertvector(x.v, ByteVec);
    __builtin_memcpy(to, &bytes, sizeof(bytes));
  } else {
    for (int i = 0; i < n; ++i) to[i] = uint8_t(x[i]);
  }
}

static ARIMG_INLINE I32 load_bytes(const uint8_t* from, int64_t n) {
  return n >= W ? I32::load_bytes(from) : I32::load_bytes(from, int(n));
}

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
