// A score and an index in one number that orders like (score, index): lower scores first, -0 equal to 0, and
// NaN like +infinity.
#pragma once

#include "core/dtype.h"

namespace arimg {

static ARIMG_HD uint64_t sort_key(float score, int32_t index) {
  const float infinity = __builtin_inff();
  uint32_t bits = float_bits(score < infinity ? score + 0.f : infinity);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | uint32_t(index);
}
static ARIMG_HD float key_score(uint64_t key) {
  uint32_t bits = uint32_t(key >> 32);
  return bits_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}
static ARIMG_HD int32_t key_index(uint64_t key) {
  return int32_t(uint32_t(key));
}

}  // namespace arimg
