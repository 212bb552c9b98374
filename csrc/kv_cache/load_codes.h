// One-byte storage as floats, for `.cu` files.
#pragma once

#include "core/chunk.h"
#include "kv_cache/codes.h"

namespace arimg::cuda {

// As many elements as 16 bytes of T hold; see chunk.h for `vectors` and `count`.
template <typename T, bool vectors>
__device__ __forceinline__ void load_codes(float (&to)[chunk<T>], const uint8_t* from, int count, float scale,
                                           Storage storage) {
  alignas(8) uint8_t raw[chunk<T>];
  if constexpr (vectors) {
    using V = std::conditional_t<chunk<T> == 4, uint32_t, uint2>;
    *reinterpret_cast<V*>(raw) = *reinterpret_cast<const V*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < chunk<T>; ++i) raw[i] = i < count ? from[i] : uint8_t(0);
  }
#pragma unroll
  for (int i = 0; i < chunk<T>; ++i) to[i] = multiply(decode(int32_t(raw[i]), storage), scale);
}

}  // namespace arimg::cuda
