// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the project's one
// stream of random numbers. Key: the row's 64-bit seed. Counter: (position lo, position hi, draw, block);
// block is 0 but where a position has many numbers.
#pragma once

#include "core/dtype.h"

namespace arimg {

struct Philox4 {
  uint32_t word[4];
};

static ARIMG_HD void multiply_wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t(a) * m;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}

// The ten rounds, on one counter (uint32_t) or on a vector of them (I32 of core/simd.h).
template <typename I>
static ARIMG_HD void philox_rounds(I (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    I high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ I(k0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ I(k1);
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

static ARIMG_HD Philox4 philox(uint64_t seed, uint64_t position, uint32_t draw, uint32_t block = 0) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), draw, block};
  philox_rounds(c, seed);
  return Philox4{{c[0], c[1], c[2], c[3]}};
}

// Many numbers at one position: 64 of them come from 16 counters, whose words lie side by side, so that a
// vector of counters gives runs of numbers. Number i is word i % 64 / 16 of block 1 + i / 64 * 16 + i % 16.
static ARIMG_HD uint32_t philox_number(uint64_t seed, uint64_t position, uint32_t draw, uint32_t i) {
  return philox(seed, position, draw, 1 + i / 64 * 16 + i % 16).word[i % 64 / 16];
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
