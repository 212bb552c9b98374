// Bytes into and out of vectors, for *_cpu.cpp.
#pragma once

#include "core/lanes.h"
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

}  // namespace ARIMG_SIMD
}  // namespace arimg
