// The emulator's twins of csrc/core/mma.h. Tensor cores compute from the fragments of all 32 lanes.
#pragma once

#include <cmath>

#include "collectives.h"
#include "core/dtype.h"
#include "engine.h"

namespace arimg::cuda {

inline void cp_async16(void* to_shared, const void* from_global, bool valid = true,
                       emulator::Where where = emulator::Where::current()) {
  emulator::async_copy(to_shared, from_global, 16, valid, where);
}
inline void cp_async_commit() {
  emulator::async_commit();
}
template <int groups_left>
void cp_async_wait() {
  emulator::async_wait(groups_left);
}

}  // namespace arimg::cuda

namespace arimg::emulator {

template <bool transposed>
void ldmatrix(uint32_t (&out)[4], const void* row, Where where) {
  if (!check_shared_pointer(row, 16, 16, false, where))
    fail("ldmatrix from an address that is not shared memory", where);
  struct Load {
    const uint16_t* row;
    uint32_t* out;
  } mine{static_cast<const uint16_t*>(row), out};
  each_lane(
      0xffffffffu, mine,
      [](Load& own, int lane, uint32_t, Load* const* all) {
        const int major = lane / 4, minor = lane % 4 * 2;
        for (int m = 0; m < 4; ++m) {
          auto at = [&](int r, int c) -> uint32_t { return all[m * 8 + r]->row[c]; };
          own.out[m] = transposed ? at(minor, major) | at(minor + 1, major) << 16
                                  : at(major, minor) | at(major, minor + 1) << 16;
        }
      },
      where);
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <int k>
void multiply(Mma* const* all, const float (&a)[16][k], const float (&b)[k][8]) {
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int i = 0; i < k; ++i)
      for (int column = 0; column < 8; ++column) sum[column] += a[row][i] * b[i][column];
    for (int column = 0; column < 8; ++column)
      all[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sum[column];
  }
}

}  // namespace arimg::emulator

namespace arimg::cuda {

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row,
                        emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<false>(out, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row,
                              emulator::Where where = emulator::Where::current()) {
  emulator::ldmatrix<true>(out, row, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulator::Where where = emulator::Where::current()) {
  emulator::Mma mine{d, a, b};
  emulator::warp_collective(
      full_warp, &mine,
      [](void* const* lanes, uint32_t) {
        auto all = reinterpret_cast<emulator::Mma* const*>(lanes);
        auto half = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> 16 * i)}); };
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4 * 2;
          for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 8 + i] = half(all[lane]->a[r], i);
            for (int r = 0; r < 2; ++r) b[t + r * 8 + i][g] = half(all[lane]->b[r], i);
          }
        }
        emulator::multiply(all, a, b);
      },
      where);
}

inline uint32_t to_tf32(float x) {
  return (float_bits(x) + 0x1000u) & 0xffffe000u;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             emulator::Where where = emulator::Where::current()) {
  emulator::Mma mine{d, a, b};
  emulator::warp_collective(
      full_warp, &mine,
      [](void* const* lanes, uint32_t) {
        auto all = reinterpret_cast<emulator::Mma* const*>(lanes);
        auto value = [](uint32_t bits) {
          return bits_float(bits & 0xffffe000u);
        };  // the low bits do not count
        float a[16][8], b[8][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = value(all[lane]->a[r]);
          for (int r = 0; r < 2; ++r) b[t + r * 4][g] = value(all[lane]->b[r]);
        }
        emulator::multiply(all, a, b);
      },
      where);
}

}  // namespace arimg::cuda
