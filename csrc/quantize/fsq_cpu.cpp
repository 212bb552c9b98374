// See fsq.h. W rows of d dimensions are d whole vectors, so a table of d vectors per constant holds for every
// W rows. Between rows and indices, up to W dimensions are turned in registers: rows are read or written as
// whole vectors, of which the first d lanes count.
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

// Groups of W rows whose digits are all written before the first is read again, as reads that straddle two
// fresh writes would wait for both.
static constexpr int GROUPS = 8;

int64_t fsq_scratch(int dims) {
  return int64_t(dims) * W * (CONSTANTS + GROUPS) + W;
}

template <int... Lane>
static ARIMG_INLINE void split_words(I32 a, I32 b, I32& low, I32& high) {
  low = __builtin_shufflevector(a.v, b.v, (2 * Lane)...);
  high = __builtin_shufflevector(a.v, b.v, (2 * Lane + 1)...);
}
template <int... Lane>
static ARIMG_INLINE void join_words(I32 low, I32 high, I32& a, I32& b) {
  a = __builtin_shufflevector(low.v, high.v, (Lane / 2 + Lane % 2 * W)...);
  b = __builtin_shufflevector(low.v, high.v, (Lane / 2 + W / 2 + Lane % 2 * W)...);
}
template <typename F>
static ARIMG_INLINE void with_lanes(F&& f) {
  if constexpr (W == 16)
    f.template operator()<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>();
  else if constexpr (W == 8)
    f.template operator()<0, 1, 2, 3, 4, 5, 6, 7>();
  else
    f.template operator()<0, 1, 2, 3>();
}

// W indices, wrapped into [0, count), count <= 2^24.
static ARIMG_INLINE F32 load_indices(const int64_t* index, int64_t count) {
  I32 low, high;
  const I32 a = I32::load((const int32_t*)index), b = I32::load((const int32_t*)index + W);
  with_lanes([&]<int... Lane>() { split_words<Lane...>(a, b, low, high); });
  const I32 last(int32_t(count - 1));
  if (any((high != I32(0)) | (low < I32(0)) | (low > last))) {
    int32_t wrapped[W];
    for (int r = 0; r < W; ++r) wrapped[r] = int32_t(wrapped_index(index[r], count));
    low = I32::load(wrapped);
  }
  return to_float(low);
}

static ARIMG_INLINE void store_indices(F32 index, int64_t* to) {
  I32 a, b;
  with_lanes([&]<int... Lane>() { join_words<Lane...>(round_to_int(index), I32(0), a, b); });
  a.store((int32_t*)to);
  b.store((int32_t*)to + W);
}

// table[j][constant][lane]: the constant of the dimension that lane `lane` of vector j holds.
template <int N>
static void fill_table(float* table, int dims, const float* const (&constants)[N]) {
  for (int j = 0; j < dims; ++j)
    for (int i = 0; i < N; ++i)
      for (int lane = 0; lane < W; ++lane)
        table[(j * CONSTANTS + i) * W + lane] = constants[i][(j * W + lane) % dims];
}

// The indices of W rows from their digits, which are already multiplied by their place (`weighted`), or not
// because that would not be exact. W floats may be read beyond the digits.
template <bool weighted>
static ARIMG_INLINE void add_digits(const Fsq& p, const float* digits, int64_t row) {
  const int d = p.levels.dims;
  if (weighted && d <= W) {
    F32 block[W];
    for (int r = 0; r < W; ++r) block[r] = F32::load(digits + r * d);
    transpose(block);
    F32 sum = block[0];
    for (int c = 1; c < d; ++c) sum = sum + block[c];
    return store_indices(sum, p.index + row);
  }
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
  while (row + W <= end) {
    const int64_t first = row;
    float* to = digits;
    for (; row + W <= end && row < first + GROUPS * W; row += W, to += d * W) {
      const T* z = (const T*)p.z + row * d;
      T* codes = (T*)p.codes + row * d;
      const float* table = scratch;
      for (int j = 0; j < d; ++j, table += CONSTANTS * W) {
        auto q = fsq_quantize(F32::load(z + j * W), F32::load(table), F32::load(table + W),
                              F32::load(table + 2 * W), F32::load(table + 3 * W), F32::load(table + 4 * W));
        q.code.store(codes + j * W);
        (weighted ? q.digit * F32::load(table + 5 * W) : q.digit).store(to + j * W);
      }
    }
    for (int64_t group = 0; first + group * W < row; ++group)
      add_digits<weighted>(p, digits + group * d * W, first + group * W);
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

// floor(index / basis) of W numbers below 2^24: the estimate is off by one at most, the rest is exact.
static ARIMG_INLINE F32 quotient_of(F32 index, F32 basis, F32 reciprocal) {
  F32 quotient = to_float(round_to_int(fma(index, reciprocal, F32(-0.5f))));
  F32 rest = fma(F32(0.f) - quotient, basis, index);
  return quotient + select(rest < F32(0.f), F32(-1.f), select(rest >= basis, F32(1.f), F32(0.f)));
}

// Of n <= W lanes; for float and few, half a vector crosses fewer cache lines.
template <typename T>
static ARIMG_INLINE void store_row(F32 row, T* to, int) {
  row.store(to);
}
static ARIMG_INLINE void store_row(F32 row, float* to, int n) {
  if (n <= W / 2)
    __builtin_memcpy(to, &row.v, sizeof(row.v) / 2);
  else
    row.store(to);
}

// W rows; up to W - 1 elements behind them may be overwritten.
template <typename T>
static void codes_of_rows(const FsqCodes& p, const float* reciprocal, int64_t row) {
  const FsqLevels& l = p.levels;
  const int d = l.dims;
  const F32 index = load_indices(p.index + row, l.count);
  F32 rest = index;  // in units of the place at hand; the quotients do not wait for each other
  for (int first = 0; first < d; first += W) {
    F32 block[W];
    const int n = d - first < W ? d - first : W;
    for (int i = n; i < W; ++i) block[i] = F32(0.f);
    for (int i = 0; i < n; ++i) {
      const int c = first + i;
      F32 next(0.f);
      if (c + 1 < d) next = quotient_of(index, F32(float(l.basis[c + 1])), F32(reciprocal[c + 1]));
      const F32 width(l.width[c]);
      block[i] =
          level_value(fma(F32(0.f) - next, F32(float(l.level[c])), rest) - width, width, F32(l.inverse[c]));
      rest = next;
    }
    transpose(block);
    T* out = (T*)p.codes + row * d + first;
    for (int r = 0; r < W; ++r)  // what reaches beyond a row is overwritten by the next one
      if (d <= W)
        store_row(block[r], out + r * d, d);
      else
        block[r].store_partial(out + r * d, n);
  }
}

void fsq_codes(const FsqCodes& p, int64_t begin, int64_t end) {
  const int d = p.levels.dims;
  float reciprocal[fsq_max_dims];
  for (int c = 0; c < d; ++c) reciprocal[c] = 1.f / float(p.levels.basis[c]);
  const int64_t behind = d < W ? W - d : 0;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    int64_t row = begin;
    if (p.levels.count <= (1 << 24))
      for (; (row + W) * d + behind <= end * d; row += W) codes_of_rows<T>(p, reciprocal, row);
    for (; row < end; ++row) codes_of_row<T>(p, row);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
