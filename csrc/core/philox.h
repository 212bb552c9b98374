// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the project's one
// stream of random numbers. Key: the row's 64-bit seed. Counter: (position lo, position hi, draw, 0).
#pragma once

#include "core/dtype.h"

namespace arimg {

struct Philox4 {
  uint32_t word[4];
};

static ARIMG_HD Philox4 philox(uint64_t seed, uint64_t position, uint32_t draw) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = draw, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Uniform in (0, 1), never 0 or 1: ((word >> 8) + 1/2) * 2^-24, rounded to nearest but not up to 1.
static ARIMG_HD float uniform_from_bits(uint32_t word) {
  float u = (float(word >> 8) + 0.5f) * 0x1p-24f;
  return u < 1.f ? u : 1.f - 0x1p-24f;
}

static ARIMG_HD float philox_uniform(uint64_t seed, uint64_t position, uint32_t draw) {
  return uniform_from_bits(philox(seed, position, draw).word[0]);
}

// floor(u * total) with u = (word 0 * 2^32 + word 1) / 2^64: an integer below total, equally likely but for
// a bias below total / 2^64.
static ARIMG_HD uint64_t draw_below(uint64_t total, uint64_t seed, uint64_t position, uint32_t draw) {
  Philox4 x = philox(seed, position, draw);
  uint64_t u = uint64_t(x.word[0]) << 32 | x.word[1];
#if defined(__CUDA_ARCH__)
  return __umul64hi(u, total);
#else
  return uint64_t((unsigned __int128)(u)*total >> 64);
#endif
}

}  // namespace arimg
