// 16-byte pieces of a row of storage type T, as floats, for `.cu` files.
//
// With `vectors` the address must be 16-byte aligned and the piece whole; without, elements are read one by
// one and those beyond `count` are left out. Threads and orders are the same either way, so a result does not
// depend on where a tensor lies.
#pragma once

#include "core/cuda.h"
#include "core/dtype.h"

namespace arimg::cuda {

template <typename T>
constexpr int chunk = 16 / sizeof(T);

// Elements beyond `count` become `fill`.
template <bool vectors, typename T>
__device__ __forceinline__ void load_chunk(float (&to)[chunk<T>], const T* from, int count,
                                           float fill = 0.f) {
  if constexpr (vectors) {
    alignas(16) T raw[chunk<T>];
    *reinterpret_cast<uint4*>(raw) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) to[i] = to_float(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) to[i] = i < count ? to_float(from[i]) : fill;
  }
}

template <bool vectors, typename T>
__device__ __forceinline__ void store_chunk(T* to, const float (&from)[chunk<T>], int count) {
  if constexpr (vectors) {
    alignas(16) T raw[chunk<T>];
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) raw[i] = from_float<T>(from[i]);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(raw);
  } else {
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i)
      if (i < count) to[i] = from_float<T>(from[i]);
  }
}

// Whether rows that begin at `pointer` and lie `stride` elements apart can be read as vectors.
template <typename T>
bool chunk_aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % chunk<T> == 0;
}

}  // namespace arimg::cuda
