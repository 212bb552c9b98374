// One-byte storage: a vector is held as codes and one factor, value = code * factor. The same bits on every
// backend; see core/math.h for the value types.
//
// The factor is amax / limit, with amax the largest magnitude of the vector, 2^-100 at least, and limit 127
// (int8) or 448 (fp8, e4m3: 4 bits of exponent, 3 of mantissa, no infinities). A vector with a NaN or an
// infinity gets a factor that is none either, so it reads as NaN or infinity throughout.
#pragma once

#include "core/math.h"
#include "kv_cache/contract.h"

namespace arimg {

// A stored byte, for templates over the type of what a cache holds.
struct Int8Code {
  uint8_t byte;
};
struct Fp8Code {
  uint8_t byte;
};

constexpr float kSmallestAmax = 0x1p-100f;

static ARIMG_HD int32_t select(bool condition, int32_t a, int32_t b) {
  return condition ? a : b;
}

static ARIMG_HD float code_limit(Storage storage) {
  return storage == Storage::int8 ? 127.f : 448.f;
}

// The byte of e4m3 nearest to x, ties to even; |x| <= 448.
template <typename F>
static ARIMG_HD auto e4m3_code(F x) {
  auto u = bits(x);
  using I = decltype(u);
  I magnitude = u & I(0x7fffffff);
  I normal = ((magnitude + I(0x7ffff) + ((magnitude >> 20) & I(1))) >> 20) - I(120 << 3);
  I subnormal = round_to_int(multiply(float_from_bits(magnitude), F(512.f)));
  return ((u >> 24) & I(0x80)) | select(magnitude < I(0x3c800000), subnormal, normal);  // 2^-6
}

template <typename I>
static ARIMG_HD auto e4m3_value(I code) {
  using F = decltype(to_float(code));
  I magnitude = code & I(0x7f);
  F normal = float_from_bits((magnitude << 20) + I(120 << 23));
  F subnormal = multiply(to_float(magnitude), F(0x1p-9f));
  F value = select(magnitude < I(8), subnormal, normal);
  return float_from_bits(bits(value) | ((code & I(0x80)) << 24));
}

// x times limit / amax as a byte, in the low bits.
template <typename F>
static ARIMG_HD auto encode(F x, F inverse, Storage storage) {
  F limit = F(code_limit(storage));
  F y = larger(smaller(multiply(x, inverse), limit), F(0.f) - limit);  // a NaN becomes the limit
  auto byte = storage == Storage::int8 ? round_to_int(y) : e4m3_code(y);
  return byte & decltype(byte)(0xff);
}

template <typename I>
static ARIMG_HD auto decode(I byte, Storage storage) {
  return storage == Storage::int8 ? to_float((byte << 24) >> 24) : e4m3_value(byte);
}

}  // namespace arimg
