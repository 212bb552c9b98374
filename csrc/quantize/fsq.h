// Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): each dimension is bounded and rounded
// to one of its levels; the digits of all dimensions make one index.
//
// With L levels, half = (L - 1)(1 + 1e-3) / 2, offset = 1/2 if L is even else 0, shift = atanh(offset /
// half):
//   k = round(tanh(z + shift) half - offset), halves to even; code = k / floor(L / 2), correctly rounded;
//   digit = k + floor(L / 2); index = sum of digit_c basis_c, basis_c = L_0 ... L_(c-1).
// Dimension 0 is the fastest. A NaN gives the code NaN and the digit 0. Every backend computes the same bits.
// All tensors are contiguous; a row depends on itself alone.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

// 2^62 codes at most. Beyond 1000 levels the margin of 1e-3 would reach the next level.
constexpr int fsq_max_dims = 62, fsq_max_level = 1000;

struct FsqLevels {
  int dims;
  int64_t count;                                                       // the product of the levels
  float shift[fsq_max_dims], half[fsq_max_dims], lower[fsq_max_dims];  // lower = -offset
  float width[fsq_max_dims], inverse[fsq_max_dims];                    // floor(L / 2) and 1 / width
  float slope[fsq_max_dims];                                           // half / width
  int64_t basis[fsq_max_dims];
  int32_t level[fsq_max_dims];
  uint64_t reciprocal[fsq_max_dims];  // floor((2^64 - 1) / L)
};

struct Fsq {
  DType dtype;
  const void* z;  // [rows, dims]
  FsqLevels levels;
  int64_t rows;
  void* codes;     // [rows, dims], of z's dtype
  int64_t* index;  // [rows]
};

// The gradient of codes, through the bound and not through the rounding: grad_z = grad sech^2(z + shift)
// slope.
struct FsqBackward {
  DType dtype;
  const void *grad, *z;  // [rows, dims]
  FsqLevels levels;
  int64_t rows;
  void* grad_z;
};

// The way back. An index is taken modulo the number of codes.
struct FsqCodes {
  DType dtype;
  const int64_t* index;  // [rows]
  FsqLevels levels;
  int64_t rows;
  void* codes;  // [rows, dims]
};

// Rows [begin, end); scratch holds fsq_scratch(dims) floats.
ARIMG_CPU_KERNEL(int64_t, fsq_scratch, (int dims))
ARIMG_CPU_KERNEL(void, fsq, (const Fsq& p, float* scratch, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, fsq_backward, (const FsqBackward& p, float* scratch, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, fsq_codes, (const FsqCodes& p, int64_t begin, int64_t end))

Status fsq_cuda(const Fsq& p, void* stream);
Status fsq_backward_cuda(const FsqBackward& p, void* stream);
Status fsq_codes_cuda(const FsqCodes& p, void* stream);

}  // namespace arimg
