// The arithmetic of fsq.h, one text for floats and for vectors of them (F is float or F32): see core/math.h.
#pragma once

#include "core/math.h"
#include "quantize/fsq.h"

namespace arimg {

static ARIMG_HD float magnitude(float x) {
  return bits_float(float_bits(x) & 0x7fffffffu);
}
static ARIMG_HD float with_sign_of(float x, float sign) {
  return bits_float(float_bits(x) | (float_bits(sign) & 0x80000000u));
}

// exp(-2 |x|); beyond |x| = 20 it changes neither tanh nor a sum with 1. NaN gives a number.
template <typename F>
static ARIMG_HD F decay_of(F x) {
  return exp_times_power(larger(multiply(magnitude(x), F(-2.f)), F(-40.f)), 0);
}

// Absolute error below 2^-22; odd, and 0 at 0.
template <typename F>
static ARIMG_HD F tanh_of(F x) {
  F e = decay_of(x);
  return with_sign_of(divide(F(1.f) - e, F(1.f) + e), x);
}

// 1 - tanh^2, without the cancellation.
template <typename F>
static ARIMG_HD F sech_squared(F x) {
  F e = decay_of(x);
  F r = divide(F(1.f), F(1.f) + e);
  return multiply(multiply(multiply(F(4.f), e), r), r);
}

// k / width for integers |k| <= width <= 500, correctly rounded (tests try them all), from inverse = 1 /
// width.
template <typename F>
static ARIMG_HD F level_value(F k, F width, F inverse) {
  F q = multiply(k, inverse);
  return fma(fma(F(0.f) - q, width, k), inverse, q);
}

template <typename F>
struct FsqResult {
  F code, digit;
};

template <typename F>
static ARIMG_HD FsqResult<F> fsq_quantize(F z, F shift, F half, F lower, F width, F inverse) {
  F k = to_float(round_to_int(fma(tanh_of(z + shift), half, lower)));
  return {select(z == z, level_value(k, width, inverse), z), select(z == z, k + width, F(0.f))};
}

template <typename F>
static ARIMG_HD F fsq_gradient(F grad, F z, F shift, F slope) {
  return select(z == z, multiply(multiply(grad, sech_squared(z + shift)), slope), z);
}

// The digit of the fastest dimension; `rest` becomes the number that the other digits make.
static ARIMG_HD int32_t take_digit(uint64_t& rest, int32_t level, uint64_t reciprocal) {
#if defined(__CUDA_ARCH__)
  uint64_t quotient = __umul64hi(rest, reciprocal);
#else
  uint64_t quotient = uint64_t((unsigned __int128)(rest)*reciprocal >> 64);
#endif
  uint64_t digit = rest - quotient * uint64_t(level);  // the quotient is right or one too small
  if (digit >= uint64_t(level)) {
    digit -= uint64_t(level);
    ++quotient;
  }
  rest = quotient;
  return int32_t(digit);
}

static ARIMG_HD uint64_t wrapped_index(int64_t index, int64_t count) {
  if (index >= 0 && index < count) return uint64_t(index);
  index %= count;
  return uint64_t(index < 0 ? index + count : index);
}

}  // namespace arimg
