// A linear layer of a few rows: out = activation(x W^T + bias) [* (x V^T + bias of V)] [+ residual].
//
// At 1 to 16 rows the time is that of reading the weights once, so they are read once, whatever the number of
// rows, in the order in which they lie: rows of `in` weights, as torch keeps them. Quantized weights are
// codes of 8 or 4 bits with a scale for `group` inputs of an output; their rows are padded to whole blocks of
// BLOCK inputs. An int4 block is 16 bytes: byte j has input j in its low half and input 16 + j in its high
// half, as value + 8.
//
// Each element of out is one sum in fp32 whose order depends on `in` and `group` alone, so a row has the same
// bits in any number of rows and with any number of threads. Weights times the inputs of a group are summed
// first and scaled once, so the codes enter exactly.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

enum class WeightType : int { f32, bf16, f16, int8, int4 };
enum class Activation : int { none, gelu, gelu_tanh, silu, relu };

constexpr int64_t LINEAR_BLOCK = 32;  // inputs
constexpr int64_t LINEAR_ROWS = 16;   // at most

constexpr int64_t whole_blocks(int64_t in) {
  return (in + LINEAR_BLOCK - 1) / LINEAR_BLOCK * LINEAR_BLOCK;
}

struct LinearRows {
  struct Weight {
    const void* data;    // [outs] rows
    int64_t row_bytes;   // from row to row
    const float* scale;  // [outs, groups], for int8 and int4
    const void* bias;    // [outs] or nullptr
  };
  DType dtype;  // of x, bias, residual and out
  WeightType weight_type;
  Activation activation;
  const void* x;         // [rows, in]
  Weight weight;         // what the activation is applied to
  Weight factor;         // data nullptr: none
  const void* residual;  // [rows, outs] or nullptr; added last
  void* out;             // [rows, outs]
  int64_t rows, in, outs;
  int64_t group;  // inputs under one scale: a multiple of LINEAR_BLOCK, or at least `in`
  bool bf16_dot;  // the CPU has AVX512-BF16, x is bf16, and so are the weights or they are codes
};

constexpr int64_t linear_groups(const LinearRows& p) {
  return p.group >= p.in ? 1 : (p.in + p.group - 1) / p.group;
}

// Floats of the working copy of x, and that copy: rows padded with zeros to whole blocks and to a number of
// rows that the kernel has a tile for.
ARIMG_CPU_KERNEL(int64_t, linear_rows_floats, (const LinearRows& p))
ARIMG_CPU_KERNEL(void, linear_rows_copy, (const LinearRows& p, float* x))
// Outputs [begin, end).
ARIMG_CPU_KERNEL(void, linear_rows, (const LinearRows& p, const float* x, int64_t begin, int64_t end))

Status linear_rows_cuda(const LinearRows& p, void* stream);

}  // namespace arimg
