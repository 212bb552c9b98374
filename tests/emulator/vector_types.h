// CUDA's vector types and dim3, with CUDA's alignment.
#pragma once

#include <cstdint>

#define ARIMG_VECTOR_TYPES(name, scalar)                                      \
  struct alignas(2 * sizeof(scalar)) name##2 {                                \
    scalar x, y;                                                              \
  };                                                                          \
  struct name##3 {                                                            \
    scalar x, y, z;                                                           \
  };                                                                          \
  struct alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) name##4 { \
    scalar x, y, z, w;                                                        \
  };                                                                          \
  inline name##2 make_##name##2(scalar x, scalar y) {                         \
    return {x, y};                                                            \
  }                                                                           \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) {               \
    return {x, y, z};                                                         \
  }                                                                           \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) {     \
    return {x, y, z, w};                                                      \
  }

ARIMG_VECTOR_TYPES(char, signed char)
ARIMG_VECTOR_TYPES(uchar, unsigned char)
ARIMG_VECTOR_TYPES(short, short)
ARIMG_VECTOR_TYPES(ushort, unsigned short)
ARIMG_VECTOR_TYPES(int, int)
ARIMG_VECTOR_TYPES(uint, unsigned int)
ARIMG_VECTOR_TYPES(longlong, long long)
ARIMG_VECTOR_TYPES(ulonglong, unsigned long long)
ARIMG_VECTOR_TYPES(float, float)
ARIMG_VECTOR_TYPES(double, double)
#undef ARIMG_VECTOR_TYPES

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
