// One small vector type, `F32`: W floats, and `I32`: W 32-bit integers. Kernels are written once against it.
//
// It stands on the compiler's vector extensions rather than on one set of intrinsics, so the same source is
// AVX-512 (W = 16), AVX2 (W = 8), and a four-wide baseline that any machine has (SSE2, NEON); intrinsics are
// used only where the compiler has no equal (fused multiply-add, half precision, rounding).
//
// Include only from *_cpu.cpp. No std:: functions in those files: a shared inline function compiled with
// AVX-512 flags could be picked by the linker for a machine without them (tests/test_build.py checks).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

#if !defined(ARIMG_SIMD)
#error "compile through CMake: ARIMG_SIMD names the level's namespace"
#endif

#define ARIMG_INLINE inline __attribute__((always_inline))

namespace arimg {
namespace ARIMG_SIMD {

// ARIMG_WIDE: sixteen lanes without AVX-512, so that the logic of that level can be tested on any machine.
#if defined(__AVX512F__) || defined(ARIMG_WIDE)
#define ARIMG_WIDTH 16
#elif defined(__AVX2__)
#define ARIMG_WIDTH 8
#else
#define ARIMG_WIDTH 4
#endif

constexpr int W = ARIMG_WIDTH;

typedef float FloatVec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint32_t UintVec __attribute__((vector_size(W * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(W * 2)));

struct I32 {
  IntVec v;
  I32() = default;
  ARIMG_INLINE I32(IntVec x) : v(x) {}
  ARIMG_INLINE I32(int32_t x) : v(IntVec{} + x) {}
  static ARIMG_INLINE I32 load(const int32_t* p) {
    I32 r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  // W bytes as numbers.
  static ARIMG_INLINE I32 load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif ARIMG_WIDTH == 8
    return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    IntVec r;
    for (int i = 0; i < W; ++i) r[i] = p[i];
    return r;
#endif
  }
  // The first n bytes, the rest 0; reads nothing beyond p + n.
  static ARIMG_INLINE I32 load_bytes(const uint8_t* p, int n) {
    IntVec r{};
    for (int i = 0; i < n; ++i) r[i] = p[i];
    return r;
  }
  ARIMG_INLINE void store(int32_t* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  ARIMG_INLINE int32_t operator[](int i) const { return v[i]; }
};

// Lanes 0, 1, ..., W-1.
static ARIMG_INLINE I32 lane_index() {
  IntVec r;
  for (int i = 0; i < W; ++i) r[i] = i;
  return r;
}

// Bit i of lane i.
static ARIMG_INLINE I32 lane_bit() {
  IntVec r;
  for (int i = 0; i < W; ++i) r[i] = 1 << i;
  return r;
}

ARIMG_INLINE I32 operator+(I32 a, I32 b) {
  return a.v + b.v;
}
ARIMG_INLINE I32 operator-(I32 a, I32 b) {
  return a.v - b.v;
}
ARIMG_INLINE I32 operator&(I32 a, I32 b) {
  return a.v & b.v;
}
ARIMG_INLINE I32 operator|(I32 a, I32 b) {
  return a.v | b.v;
}
ARIMG_INLINE I32 operator^(I32 a, I32 b) {
  return a.v ^ b.v;
}
ARIMG_INLINE I32 operator<<(I32 a, int n) {
  return a.v << n;
}
ARIMG_INLINE I32 operator>>(I32 a, int n) {
  return a.v >> n;
}  // arithmetic

// The result of a comparison: all bits of a lane set, or none.
struct Mask {
  IntVec m;
};
ARIMG_INLINE Mask operator<(I32 a, I32 b) {
  return {a.v < b.v};
}
ARIMG_INLINE Mask operator>(I32 a, I32 b) {
  return {a.v > b.v};
}
ARIMG_INLINE Mask operator!=(I32 a, I32 b) {
  return {a.v != b.v};
}
ARIMG_INLINE Mask operator==(I32 a, I32 b) {
  return {a.v == b.v};
}
ARIMG_INLINE Mask operator&(Mask a, Mask b) {
  return {a.m & b.m};
}
ARIMG_INLINE Mask operator|(Mask a, Mask b) {
  return {a.m | b.m};
}
ARIMG_INLINE I32 select(Mask m, I32 a, I32 b) {
  return (IntVec)((m.m & a.v) | (~m.m & b.v));
}

#if ARIMG_WIDTH == 8
ARIMG_INLINE __m256i first_lanes(int n) {
  return (__m256i)(lane_index() < I32(n)).m;
}
#endif

struct F32 {
  FloatVec v;
  F32() = default;
  ARIMG_INLINE F32(FloatVec x) : v(x) {}
  ARIMG_INLINE F32(float x) : v(x - FloatVec{}) {}  // x - 0 is x, even for -0, and costs nothing; 0 + x does

  static ARIMG_INLINE F32 load(const float* p) {
    F32 r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static ARIMG_INLINE F32 load(const BFloat16* p) {
#if defined(__AVX512F__)
    return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    ShortVec s;
    __builtin_memcpy(&s, p, sizeof(s));
    return (FloatVec)(__builtin_convertvector(s, UintVec) << 16);
#endif
  }
  static ARIMG_INLINE F32 load(const Half* p) {
#if defined(__AVX512F__)
    return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif ARIMG_WIDTH == 8
    return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    FloatVec r;
    for (int i = 0; i < W; ++i) r[i] = to_float(p[i]);
    return r;
#endif
  }
  // The first n lanes from p (0 <= n <= W), the rest `fill`; reads nothing beyond p + n.
  template <typename T>
  static ARIMG_INLINE F32 load_partial(const T* p, int n, float fill = 0.f) {
    F32 r(fill);
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }

#if defined(__AVX512F__)
  static ARIMG_INLINE F32 load_partial(const float* p, int n, float fill = 0.f) {
    return (FloatVec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
  }
#elif ARIMG_WIDTH == 8
  static ARIMG_INLINE F32 load_partial(const float* p, int n, float fill = 0.f) {
    const __m256i lanes = first_lanes(n);
    return (FloatVec)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, lanes), (__m256)lanes);
  }
#endif

  ARIMG_INLINE void store(float* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  ARIMG_INLINE void store(BFloat16* p) const {
    UintVec u = (UintVec)v;
    UintVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    UintVec nan = (u >> 16) | 0x40;
    UintVec is_nan = (UintVec)(v != v);
    UintVec chosen = (is_nan & nan) | (~is_nan & rounded);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)chosen));
#else
    ShortVec s = __builtin_convertvector(chosen, ShortVec);
    __builtin_memcpy(p, &s, sizeof(s));
#endif
  }
  ARIMG_INLINE void store(Half* p) const {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif ARIMG_WIDTH == 8
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) p[i] = from_float<Half>(v[i]);
#endif
  }
  template <typename T>
  ARIMG_INLINE void store_partial(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
#if defined(__AVX512F__)
  ARIMG_INLINE void store_partial(float* p, int n) const {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  }
#elif ARIMG_WIDTH == 8
  ARIMG_INLINE void store_partial(float* p, int n) const {
    _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
  }
#endif
  ARIMG_INLINE float operator[](int i) const { return v[i]; }
};

ARIMG_INLINE F32 operator+(F32 a, F32 b) {
  return a.v + b.v;
}
ARIMG_INLINE F32 operator-(F32 a, F32 b) {
  return a.v - b.v;
}
ARIMG_INLINE F32 operator*(F32 a, F32 b) {
  return a.v * b.v;
}
ARIMG_INLINE F32 operator/(F32 a, F32 b) {
  return a.v / b.v;
}
ARIMG_INLINE Mask operator<(F32 a, F32 b) {
  return {(IntVec)(a.v < b.v)};
}
ARIMG_INLINE Mask operator<=(F32 a, F32 b) {
  return {(IntVec)(a.v <= b.v)};
}
ARIMG_INLINE Mask operator>(F32 a, F32 b) {
  return {(IntVec)(a.v > b.v)};
}
ARIMG_INLINE Mask operator>=(F32 a, F32 b) {
  return {(IntVec)(a.v >= b.v)};
}
ARIMG_INLINE Mask operator==(F32 a, F32 b) {
  return {(IntVec)(a.v == b.v)};
}
ARIMG_INLINE F32 select(Mask m, F32 a, F32 b) {
  return m.m ? a.v : b.v;
}
ARIMG_INLINE F32 max(F32 a, F32 b) {
  return a.v > b.v ? a.v : b.v;
}  // b where either is NaN
ARIMG_INLINE F32 min(F32 a, F32 b) {
  return a.v < b.v ? a.v : b.v;
}

// Under the names of core/math.h.
ARIMG_INLINE F32 multiply(F32 a, F32 b) {
  return a * b;
}
ARIMG_INLINE F32 divide(F32 a, F32 b) {
  return a / b;
}
ARIMG_INLINE F32 larger(F32 a, F32 b) {
  return max(a, b);
}
ARIMG_INLINE F32 smaller(F32 a, F32 b) {
  return min(a, b);
}

// a * b + c, rounded once, on every level.
ARIMG_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v);
#elif ARIMG_WIDTH == 8
  return (FloatVec)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v);
#else
  FloatVec r;
  for (int i = 0; i < W; ++i) r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#endif
}

// a * b + c, fused where that is fast.
ARIMG_INLINE F32 mul_add(F32 a, F32 b, F32 c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

ARIMG_INLINE F32 sqrt(F32 a) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_sqrt_ps((__m512)a.v);
#elif ARIMG_WIDTH == 8
  return (FloatVec)_mm256_sqrt_ps((__m256)a.v);
#else
  FloatVec r = a.v;
  for (int i = 0; i < W; ++i) r[i] = __builtin_sqrtf(a.v[i]);
  return r;
#endif
}

// Nearest integer, halves to even; defined for |x| < 2^31.
ARIMG_INLINE I32 round_to_int(F32 a) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)a.v);
#elif ARIMG_WIDTH == 8
  return (IntVec)_mm256_cvtps_epi32((__m256)a.v);
#else
  IntVec r;
  for (int i = 0; i < W; ++i) r[i] = int32_t(__builtin_rintf(a.v[i]));
  return r;
#endif
}

using arimg::to_float;  // of the storage types; the next line would hide them
ARIMG_INLINE F32 to_float(I32 a) {
  return __builtin_convertvector(a.v, FloatVec);
}
ARIMG_INLINE I32 bits(F32 a) {
  return (IntVec)a.v;
}
ARIMG_INLINE F32 float_from_bits(I32 a) {
  return (FloatVec)a.v;
}

// The products of the lanes, unsigned, as their high and low words. Under the name of core/philox.h.
ARIMG_INLINE void multiply_wide(I32 a, I32 b, I32& high, I32& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a.v, y = (__m512i)b.v;
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), _mm512_srli_epi64(y, 32));
  high = (IntVec)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (IntVec)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif ARIMG_WIDTH == 8
  const __m256i x = (__m256i)a.v, y = (__m256i)b.v;
  const __m256i even = _mm256_mul_epu32(x, y);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32));
  high = (IntVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (IntVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = uint64_t(uint32_t(a.v[i])) * uint32_t(b.v[i]);
    high.v[i] = int32_t(product >> 32);
    low.v[i] = int32_t(product);
  }
#endif
}
ARIMG_INLINE void multiply_wide(I32 a, uint32_t m, I32& high, I32& low) {
  multiply_wide(a, I32(int32_t(m)), high, low);
}

// The sum of the lanes as unsigned numbers, in 64 bits.
struct WideSum {
  typedef uint64_t LongVec __attribute__((vector_size(W * 4)));
  LongVec low{}, high{};
  ARIMG_INLINE void add(I32 x) {
    LongVec pairs = (LongVec)x.v;
    low += pairs & 0xffffffffu;
    high += pairs >> 32;
  }
  ARIMG_INLINE uint64_t total() const {
    LongVec sum = low + high;
    uint64_t r = 0;
    for (int i = 0; i < W / 2; ++i) r += sum[i];
    return r;
  }
};

ARIMG_INLINE int reduce_add(I32 a) {
  int r = 0;
  for (int i = 0; i < W; ++i) r += a.v[i];
  return r;
}

// Bit i is lane i.
ARIMG_INLINE uint32_t lane_bits(Mask m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m.m);
#elif ARIMG_WIDTH == 8
  return uint32_t(_mm256_movemask_ps((__m256)m.m));
#else
  uint32_t r = 0;
  for (int i = 0; i < W; ++i) r |= uint32_t(m.m[i] & 1) << i;
  return r;
#endif
}

// A byte for each lane: 1 where it is set, else 0.
ARIMG_INLINE void store_bytes(Mask m, uint8_t* p) {
  typedef uint8_t ByteVec __attribute__((vector_size(W)));
  const ByteVec bytes = __builtin_convertvector(m.m & 1, ByteVec);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}
ARIMG_INLINE void store_bytes(Mask m, uint8_t* p, int n) {
  for (int i = 0; i < n; ++i) p[i] = uint8_t(m.m[i] & 1);
}

#if ARIMG_WIDTH == 8
// For each mask the lanes it chooses, a byte each.
struct LaneOrders {
  uint64_t of[256];
  constexpr LaneOrders() : of{} {
    for (int bits = 0; bits < 256; ++bits) {
      int place = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (bits >> lane & 1) of[bits] |= uint64_t(lane) << (8 * place++);
    }
  }
};
static constexpr LaneOrders lane_orders{};
#endif

// Moves chosen lanes to the front, in order: Compress c(mask); c(x).store(p); p += c.count. Lanes from count
// on are undefined.
class Compress {
 public:
  int count;
#if defined(__AVX512F__)
  ARIMG_INLINE explicit Compress(Mask m) : bits_(__mmask16(lane_bits(m))) {
    count = __builtin_popcount(bits_);
  }
  ARIMG_INLINE I32 operator()(I32 x) const {
    return (IntVec)_mm512_maskz_compress_epi32(bits_, (__m512i)x.v);
  }

 private:
  __mmask16 bits_;
#elif ARIMG_WIDTH == 8
  ARIMG_INLINE explicit Compress(Mask m) {
    uint32_t bits = lane_bits(m);
    count = __builtin_popcount(bits);
    uint64_t table = lane_orders.of[bits];
    order_ = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)table));
  }
  ARIMG_INLINE I32 operator()(I32 x) const {
    return (IntVec)_mm256_permutevar8x32_epi32((__m256i)x.v, order_);
  }

 private:
  __m256i order_;
#else
  ARIMG_INLINE explicit Compress(Mask m) : bits_(lane_bits(m)) { count = __builtin_popcount(bits_); }
  ARIMG_INLINE I32 operator()(I32 x) const {
    int32_t from[W], to[W] = {};
    x.store(from);
    int place = 0;
    for (int lane = 0; lane < W; ++lane) {
      to[place] = from[lane];
      place += bits_ >> lane & 1;
      if (place == W) break;
    }
    return I32::load(to);
  }

 private:
  uint32_t bits_;
#endif
 public:
  ARIMG_INLINE F32 operator()(F32 x) const { return (FloatVec)(*this)(bits(x)).v; }
};

// Reductions by halving: the order depends on W alone, never on the data.
ARIMG_INLINE float reduce_add(F32 a) {
  float t[W];
  a.store(t);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}
ARIMG_INLINE float reduce_max(F32 a) {
  float m = a.v[0];
  for (int i = 1; i < W; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

// Lane i: lane index[i] of a, or lane index[i] - W of b.
ARIMG_INLINE F32 pick(F32 a, F32 b, I32 index) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_permutex2var_ps((__m512)a.v, (__m512i)index.v, (__m512)b.v);
#elif ARIMG_WIDTH == 8
  const __m256i i = (__m256i)index.v;
  const __m256 of_a = _mm256_permutevar8x32_ps((__m256)a.v, i);
  const __m256 of_b = _mm256_permutevar8x32_ps((__m256)b.v, i);
  return (FloatVec)_mm256_blendv_ps(of_a, of_b, (__m256)_mm256_slli_epi32(i, 28));
#else
  float both[2 * W];
  a.store(both);
  b.store(both + W);
  F32 r;
  for (int i = 0; i < W; ++i) r.v[i] = both[index.v[i]];
  return r;
#endif
}

// Lanes 0, 2, 4, ... and 1, 3, 5, ... of the 2 W lanes of a and b.
template <int... Lane>
static ARIMG_INLINE void part_lanes(F32 a, F32 b, F32& even, F32& odd) {
  even = __builtin_shufflevector(a.v, b.v, (2 * Lane)...);
  odd = __builtin_shufflevector(a.v, b.v, (2 * Lane + 1)...);
}
static ARIMG_INLINE void part_pairs(F32 a, F32 b, F32& even, F32& odd) {
  if constexpr (W == 16)
    part_lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b, even, odd);
  else if constexpr (W == 8)
    part_lanes<0, 1, 2, 3, 4, 5, 6, 7>(a, b, even, odd);
  else
    part_lanes<0, 1, 2, 3>(a, b, even, odd);
}

// Transposes a W x W matrix held as W vectors.
template <int Distance, int... Lane>
static ARIMG_INLINE void exchange(F32& a, F32& b) {
  FloatVec low = __builtin_shufflevector(a.v, b.v, (Lane & Distance ? W + Lane - Distance : Lane)...);
  FloatVec high = __builtin_shufflevector(a.v, b.v, (Lane & Distance ? W + Lane : Lane + Distance)...);
  a = low;
  b = high;
}
template <int Distance>
static ARIMG_INLINE void exchange_all(F32 (&r)[W]) {
  for (int i = 0; i < W; ++i) {
    if (i & Distance) continue;
    if constexpr (W == 16)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(r[i], r[i + Distance]);
    else if constexpr (W == 8)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7>(r[i], r[i + Distance]);
    else
      exchange<Distance, 0, 1, 2, 3>(r[i], r[i + Distance]);
  }
}
static ARIMG_INLINE void transpose(F32 (&r)[W]) {
  exchange_all<1>(r);
  exchange_all<2>(r);
  if constexpr (W >= 8) exchange_all<4>(r);
  if constexpr (W >= 16) exchange_all<8>(r);
}

ARIMG_INLINE bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m.m, (__m512i)m.m) != 0;
#elif ARIMG_WIDTH == 8
  return _mm256_movemask_epi8((__m256i)m.m) != 0;
#else
  int r = 0;
  for (int i = 0; i < W; ++i) r |= m.m[i];
  return r != 0;
#endif
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
