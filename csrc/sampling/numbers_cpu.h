// Many random numbers at one position, in vectors, for *_cpu.cpp files.
#pragma once

#include "core/philox.h"
#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// Numbers [i, i + 64) of a position, i a multiple of 64: philox_number in vectors.
static inline void philox_run(uint64_t seed, uint64_t position, uint32_t draw, int64_t i, int32_t* out) {
  for (int block = 0; block < 16; block += W) {
    I32 c[4] = {I32(int32_t(position)), I32(int32_t(position >> 32)), I32(int32_t(draw)),
                lane_index() + I32(int32_t(1 + i / 4 + block))};
    philox_rounds(c, seed);
    for (int word = 0; word < 4; ++word) c[word].store(out + 16 * word + block);
  }
}

// Numbers [0, count), and up to 63 more, of a position.
static inline void philox_numbers(uint64_t seed, uint64_t position, uint32_t draw, int64_t count,
                                  int32_t* out) {
  for (int64_t i = 0; i < count; i += 64) philox_run(seed, position, draw, i, out + i);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
