// See fsq.h. W rows of d dimensions are d whole vectors, so a table of d vectors per constant holds for every
// W rows; the digits of a row are then added up in the cache.
#include "quantize/fsq.h"

#include "core/simd.h"
#include "quantize/fsq_math.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE F32 magnitude(F32 x) {
  return float_from_bits(bits(x) & I32(0x7fffffff));
}
static ARIMG_INLINE F32 with_sign_of(F32 x, F32 sign) {
  return float_from_bits(bits(x) | (bits(sign) & I32(int32_t(0x80000000u))));
}

static constexpr int CONSTANTS = 6;  // the most that a kernel reads per dimension

int64_t fsq_scratch(int dims) {
  return int64_t(dims) * W * (CONSTANTS + 1);
}

// table[j][constant][lane]: the constant of the dimension that lane `lane` of vector j holds.
template <int N>
static void fill_table(float* table, int dims, const float* const (&constants)[N]) {
  for (int j = 0; j < dims; ++j)
    for (int i = 0; i < N; ++i)
      for (int lane = 0; lane < W; ++lane)
        table[(j * CONSTANTS + i) * W + lane] = constants[i][(j * W + lane) % dims];
}

// Digits that are already multiplied by their place (`weighted`), or not because that would not be exact.
template <bool weighted>
static ARIMG_INLINE void add_digits(const Fsq& p, const float* digits, int64_t row) {
  const int d = p.levels.dims;
  for (int r = 0; r < W; ++r, digits += d) {
    if constexpr (weighted) {
      float sum = 0.f;
      for (int c = 0; c < d; ++c) sum += digits[c];
      p.index[row + r] = int64_t(sum);
    } else {
      int64_t sum = 0;
      for (int c = 0; c < d; ++c) sum += int64_t(digits[c]) * p.levels.basis[c];
      p.index[row + r] = sum;
    }
  }
}

template <typename T>
static void fsq_row(const Fsq& p, int64_t row) {
  const FsqLevels& l = p.levels;
  const T* z = (const T*)p.z + row * l.dims;
  T* codes = (T*)p.codes + row * l.dims;
  int64_t index = 0;
  for (int c = 0; c < l.dims; ++c) {
    auto q = fsq_quantize(to_float(z[c]), l.shift[c], l.half[c], l.lower[c], l.width[c], l.inverse[c]);
    codes[c] = from_float<T>(q.code);
    index += int64_t(q.digit) * l.basis[c];
  }
  p.index[row] = index;
}

template <typename T, bool weighted>
static void fsq_rows(const Fsq& p, float* scratch, int64_t begin, int64_t end) {
  const FsqLevels& l = p.levels;
  const int d = l.dims;
  float places[fsq_max_dims];
  for (int c = 0; c < d; ++c) places[c] = weighted ? float(l.basis[c]) : 1.f;
  fill_table(scratch, d, {l.shift, l.half, l.lower, l.width, l.inverse, places});
  float* digits = scratch + d * W * CONSTANTS;
  int64_t row = begin;
  for (; row + W <= end; row += W) {
    const T* z = (const T*)p.z + row * d;
    T* codes = (T*)p.codes + row * d;
    const float* table = scratch;
    for (int j = 0; j < d; ++j, table += CONSTANTS * W) {
      auto q = fsq_quantize(F32::load(z + j * W), F32::load(table), F32::load(table + W),
                            F32::load(table + 2 * W), F32::load(table + 3 * W), F32::load(table + 4 * W));
      q.code.store(codes + j * W);
      (weighted ? q.digit * F32::load(table + 5 * W) : q.digit).store(digits + j * W);
    }
    add_digits<weighted>(p, digits, row);
  }
  for (; row < end; ++row) fsq_row<T>(p, row);
}

void fsq(const Fsq& p, float* scratch, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.levels.count <= (1 << 24))  // sums of floats are exact up to here
      fsq_rows<T, true>(p, scratch, begin, end);
    else
      fsq_rows<T, false>(p, scratch, begin, end);
  });
}

template <typename T>
static void backward_rows(const FsqBackward& p, float* scratch, int64_t begin, int64_t end) {
  const FsqLevels& l = p.levels;
  const int d = l.dims;
  fill_table(scratch, d, {l.shift, l.slope});
  const T *grad = (const T*)p.grad, *z = (const T*)p.z;
  T* out = (T*)p.grad_z;
  int64_t i = begin * d;
  for (; i + W * d <= end * d; i += W * d)
    for (int j = 0; j < d; ++j) {
      const float* table = scratch + j * CONSTANTS * W;
      const int64_t at = i + j * W;
      fsq_gradient(F32::load(grad + at), F32::load(z + at), F32::load(table), F32::load(table + W))
          .store(out + at);
    }
  for (int c = 0; i < end * d; ++i, c = c + 1 == d ? 0 : c + 1)
    out[i] = from_float<T>(fsq_gradient(to_float(grad[i]), to_float(z[i]), l.shift[c], l.slope[c]));
}

void fsq_backward(const FsqBackward& p, float* scratch, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) { backward_rows<decltype(t)>(p, scratch, begin, end); });
}

template <typename T>
static void codes_of_row(const FsqCodes& p, int64_t row) {
  const FsqLevels& l = p.levels;
  T* out = (T*)p.codes + row * l.dims;
  uint64_t rest = wrapped_index(p.index[row], l.count);
  for (int c = 0; c < l.dims; ++c) {
    float k = float(take_digit(rest, l.level[c], l.reciprocal[c])) - l.width[c];
    out[c] = from_float<T>(level_value(k, l.width[c], l.inverse[c]));
  }
}

// As take_digit, for W numbers below 2^24: the estimated quotient is off by one at most, the rest is exact.
static ARIMG_INLINE F32 take_digits(F32& rest, F32 level) {
  F32 quotient = to_float(round_to_int(rest * (F32(1.f) / level) - F32(0.5f)));
  F32 digit = fma(F32(0.f) - quotient, level, rest);
  F32 step = select(digit < F32(0.f), F32(-1.f), select(digit >= level, F32(1.f), F32(0.f)));
  rest = quotient + step;
  return digit - step * level;
}

template <typename T>
static void codes_of_rows(const FsqCodes& p, int64_t row) {  // W rows
  const FsqLevels& l = p.levels;
  const int d = l.dims;
  float values[W], codes[fsq_max_dims][W];
  for (int r = 0; r < W; ++r) values[r] = float(wrapped_index(p.index[row + r], l.count));
  F32 rest = F32::load(values);
  for (int c = 0; c < d; ++c) {
    F32 width(l.width[c]);
    F32 k = take_digits(rest, F32(float(l.level[c]))) - width;
    level_value(k, width, F32(l.inverse[c])).store(codes[c]);
  }
  T* out = (T*)p.codes + row * d;
  for (int c = 0; c < d; ++c)
    for (int r = 0; r < W; ++r) out[r * d + c] = from_float<T>(codes[c][r]);
}

void fsq_codes(const FsqCodes& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t row = begin;
    if (p.levels.count <= (1 << 24))
      for (; row + W <= end; row += W) codes_of_rows<T>(p, row);
    for (; row < end; ++row) codes_of_row<T>(p, row);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
