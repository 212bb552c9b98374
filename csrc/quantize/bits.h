// Sign codes and packed bits: rows of d bits, 1 <= d <= 64, and one int64 index per row.
//
// MSB first: the first bit of a row is the index's bit d - 1; otherwise the first bit is bit 0. With d = 64
// the top bit is the int64's sign. All tensors are contiguous; a row depends on itself alone.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

constexpr int max_bits = 64;

// bit = z > 0 (of 0 and NaN it is 0), code = scale where the bit is set, else -scale.
struct SignCodes {
  DType dtype;
  const void* z;  // [rows, bits]
  int64_t rows;
  int bits;
  bool msb_first;
  float scale;
  void* codes;  // [rows, bits], of z's dtype
  int64_t* index;
};

struct PackBits {
  const uint8_t* from;  // [rows, bits]; any byte but 0 is a set bit
  int64_t rows;
  int bits;
  bool msb_first;
  int64_t* index;
};

// Bits of the index above `bits` are ignored.
struct UnpackBits {
  const int64_t* index;
  int64_t rows;
  int bits;
  bool msb_first;
  bool bytes;  // out is uint8 and gets 0 or 1; otherwise it is of `dtype` and gets low or high
  DType dtype;
  float low, high;
  void* out;  // [rows, bits]
};

// Rows [begin, end).
ARIMG_CPU_KERNEL(void, sign_codes, (const SignCodes& p, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, pack_bits, (const PackBits& p, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, unpack_bits, (const UnpackBits& p, int64_t begin, int64_t end))

Status sign_codes_cuda(const SignCodes& p, void* stream);
Status pack_bits_cuda(const PackBits& p, void* stream);
Status unpack_bits_cuda(const UnpackBits& p, void* stream);

static ARIMG_HD uint64_t reversed(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __brevll(x);
#else
  x = __builtin_bswap64(x);
  x = (x >> 4 & 0x0f0f0f0f0f0f0f0full) | (x & 0x0f0f0f0f0f0f0f0full) << 4;
  x = (x >> 2 & 0x3333333333333333ull) | (x & 0x3333333333333333ull) << 2;
  return (x >> 1 & 0x5555555555555555ull) | (x & 0x5555555555555555ull) << 1;
#endif
}

// Between a row as it is read (its first bit is bit 0, nothing above bit d - 1) and its index.
static ARIMG_HD uint64_t ordered(uint64_t row, int bits, bool msb_first) {
  return msb_first ? reversed(row) >> (64 - bits) : row;
}
static ARIMG_HD uint64_t row_of_index(uint64_t index, int bits, bool msb_first) {
  return msb_first ? reversed(index << (64 - bits)) : index & (~uint64_t(0) >> (64 - bits));
}

}  // namespace arimg
