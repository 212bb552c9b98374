// mass_of (accept_contract.h) of vectors of weights, for *_cpu.cpp files.
#pragma once

#include "core/simd.h"
#include "sampling/accept_contract.h"

namespace arimg {
namespace ARIMG_SIMD {

typedef WideSum::LongVec LongVec;
typedef int64_t SignedVec __attribute__((vector_size(W * 4)));

// Products of the low halves of the lanes.
static ARIMG_INLINE LongVec low_product(LongVec a, LongVec b) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ARIMG_WIDTH == 8
  return (LongVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Of W weights: the masses of the even or of the odd ones (low or high halves of 64-bit lanes).
static ARIMG_INLINE LongVec masses(LongVec weights, Scale s) {
  return (low_product(weights, LongVec{} + s.factor) >> s.right) << s.left;
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
