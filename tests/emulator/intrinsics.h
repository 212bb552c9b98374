// CUDA's per-thread functions, as host code: arithmetic, bits, casts, loads, atomics.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine.h"

using std::max;
using std::min;

// --- casts of bits ---
inline unsigned int __float_as_uint(float x) {
  return std::bit_cast<unsigned int>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned int x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

// --- arithmetic ---
inline float __fmaf_rn(float a, float b, float c) {
  return std::fmaf(a, b, c);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline float __frsqrt_rn(float a) {
  return 1.0f / std::sqrt(a);
}
inline float rsqrtf(float a) {
  return 1.0f / std::sqrt(a);
}
inline float __expf(float a) {
  return std::exp(a);
}
inline float __exp2f(float a) {
  return std::exp2(a);
}
inline float __logf(float a) {
  return std::log(a);
}
inline float __log2f(float a) {
  return std::log2(a);
}
inline float __saturatef(float a) {
  return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f;
}
inline int __float2int_rn(float a) {
  return int(std::nearbyint(a));
}
inline int __float2int_rd(float a) {
  return int(std::floor(a));
}
inline int __float2int_ru(float a) {
  return int(std::ceil(a));
}
inline int __float2int_rz(float a) {
  return int(a);
}
inline unsigned int __float2uint_rn(float a) {
  return (unsigned int)(std::nearbyint(a));
}
inline unsigned int __float2uint_rz(float a) {
  return (unsigned int)(a);
}
inline unsigned long long __float2ull_rn(float a) {
  return (unsigned long long)(std::nearbyint(a));
}
inline float __int2float_rn(int a) {
  return float(a);
}
inline float __uint2float_rn(unsigned int a) {
  return float(a);
}

// --- bits ---
inline int __popc(unsigned int x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero((unsigned int)(x));
}
inline int __clzll(long long x) {
  return std::countl_zero((unsigned long long)(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return (unsigned int)((unsigned long long)(a)*b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}
inline unsigned int __brev(unsigned int x) {
  unsigned int out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1) << (31 - i);
  return out;
}
inline unsigned int __funnelshift_l(unsigned int lo, unsigned int hi, unsigned int n) {
  return (unsigned int)((((unsigned long long)(hi) << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned int __funnelshift_r(unsigned int lo, unsigned int hi, unsigned int n) {
  return (unsigned int)(((unsigned long long)(hi) << 32 | lo) >> (n & 31));
}
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  unsigned long long bytes = (unsigned long long)(y) << 32 | x;
  unsigned int out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned int)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}

// --- loads and stores with cache hints ---
template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0)
    arimg::emulator::fail("__ldg from a misaligned address", arimg::emulator::Where::current());
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return __ldg(p);
}
template <typename T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <typename T>
T __ldca(const T* p) {
  return __ldg(p);
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline long long clock64() {
  return 0;
}

// --- atomics (a fiber is never left in the middle of one) ---
template <typename T, typename F>
T arimg_emulator_atomic(T* p, F next, arimg::emulator::Where where) {
  arimg::emulator::check_shared_pointer(p, sizeof(T), sizeof(T), true, where);
  T old = *p;
  *p = next(old);
  return old;
}

#define ARIMG_ATOMIC(name, expression)                                              \
  template <typename T>                                                             \
  T name(T* p, std::type_identity_t<T> value,                                       \
         arimg::emulator::Where where = arimg::emulator::Where::current()) {        \
    return arimg_emulator_atomic(p, [=](T old) -> T { return expression; }, where); \
  }
ARIMG_ATOMIC(atomicAdd, old + value)
ARIMG_ATOMIC(atomicSub, old - value)
ARIMG_ATOMIC(atomicMax, old < value ? value : old)
ARIMG_ATOMIC(atomicMin, value < old ? value : old)
ARIMG_ATOMIC(atomicExch, value)
ARIMG_ATOMIC(atomicAnd, old& value)
ARIMG_ATOMIC(atomicOr, old | value)
ARIMG_ATOMIC(atomicXor, old ^ value)
#undef ARIMG_ATOMIC

inline unsigned int atomicInc(unsigned int* p, unsigned int limit,
                              arimg::emulator::Where where = arimg::emulator::Where::current()) {
  return arimg_emulator_atomic(p, [=](unsigned int old) { return old >= limit ? 0u : old + 1; }, where);
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            arimg::emulator::Where where = arimg::emulator::Where::current()) {
  return arimg_emulator_atomic(p, [=](T old) { return old == compare ? value : old; }, where);
}
