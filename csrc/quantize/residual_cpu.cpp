// See residual.h: what happens between the searches.
#include "core/simd.h"
#include "quantize/residual.h"

namespace arimg {
namespace ARIMG_SIMD {

template <typename T>
static ARIMG_INLINE const T* code_of(const ResidualCodes& p, int64_t depth, int64_t code) {
  return (const T*)p.books[depth] + code * p.dim;
}

template <typename TX, typename TC>
static void subtract(const TX* from, const TC* code, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + W <= n; d += W) (F32::load(from + d) - F32::load(code + d)).store(to + d);
  for (; d < n; ++d) to[d] = to_float(from[d]) - to_float(code[d]);
}

template <typename TX, typename TC>
static void step_rows(const ResidualCodes& p, int64_t depth, const int64_t* chosen, int64_t begin,
                      int64_t end) {
  const int64_t D = p.dim;
  const bool last = depth + 1 == p.depths;
  for (int64_t row = begin; row < end; ++row) {
    p.index[row * p.depths + depth] = chosen[row];
    if (last) continue;
    const TC* code = code_of<TC>(p, depth, chosen[row]);
    float* residual = p.residual + row * D;
    if (depth == 0)
      subtract((const TX*)p.x + row * D, code, D, residual);
    else
      subtract((const float*)residual, code, D, residual);
  }
}

void residual_step(const ResidualCodes& p, int64_t depth, const int64_t* chosen, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto x) {
    with_dtype(p.book_dtype,
               [&](auto c) { step_rows<decltype(x), decltype(c)>(p, depth, chosen, begin, end); });
  });
}

template <typename TX, typename TC>
static void sum_rows(const ResidualCodes& p, int64_t begin, int64_t end) {
  const int64_t D = p.dim;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* index = p.index + row * p.depths;
    TX* out = (TX*)p.quantized + row * D;
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      F32 sum = F32::load(code_of<TC>(p, 0, index[0]) + d);
      for (int64_t q = 1; q < p.depths; ++q) sum = sum + F32::load(code_of<TC>(p, q, index[q]) + d);
      sum.store(out + d);
    }
    for (; d < D; ++d) {
      float sum = to_float(code_of<TC>(p, 0, index[0])[d]);
      for (int64_t q = 1; q < p.depths; ++q) sum += to_float(code_of<TC>(p, q, index[q])[d]);
      out[d] = from_float<TX>(sum);
    }
  }
}

void residual_sum(const ResidualCodes& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto x) {
    with_dtype(p.book_dtype, [&](auto c) { sum_rows<decltype(x), decltype(c)>(p, begin, end); });
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
