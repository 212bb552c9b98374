// The mean of the codes under a softmax, without an N x K matrix: out = sum_j w_j c_j with
//
//   w_j = softmax_j(logits_j - |x - s c_j|^2 / (2 sigma^2)).
//
// |x|^2 is common to all codes, so the exponent is logits_j + a x . c_j - b |c_j|^2 / 2 with a = s / sigma^2
// and b = s a, in fp32. Codes are taken in blocks in increasing order, with a running maximum (online
// softmax). The order of all sums depends on K and D alone. A row whose exponents are all -infinity gives 0;
// one with a NaN or a +infinity gives NaN.
#pragma once

#include "quantize/contract.h"

namespace arimg {

struct SoftmaxMean {
  const float *x, *codes;  // [rows, dim] and [count, dim], contiguous
  DType logits_dtype;
  const void* logits;  // rows `logits_stride` elements apart (0: one row for all), [count] each
  int64_t logits_stride;
  const float *scale, *sigma;  // [rows]: s and sigma > 0
  float* out;                  // [rows, dim]
  int64_t rows, count, dim;
};

// CPU: `packed` as pack_codes writes it for Metric::l2; `values` the codes in panels of columns.
ARIMG_CPU_KERNEL(int64_t, value_floats, (int64_t count, int64_t dim))
ARIMG_CPU_KERNEL(void, pack_values, (const SoftmaxMean& p, float* values))
ARIMG_CPU_KERNEL(int64_t, softmax_mean_scratch, (int64_t dim))
// Rows [begin, end).
ARIMG_CPU_KERNEL(void, softmax_mean,
                 (const SoftmaxMean& p, const float* packed, const float* values, float* scratch,
                  int64_t begin, int64_t end))

// GPU: a launch over segments of the codebook, and, if there are several, one that combines them; `parts`
// holds [segments, rows, dim + 2] floats then. `offsets` [count] from code_offsets_cuda for Metric::l2.
constexpr int64_t GPU_SEGMENT = 1024;

static inline int64_t softmax_mean_segments(int64_t count) {
  return (count + GPU_SEGMENT - 1) / GPU_SEGMENT;
}

Status softmax_mean_cuda(const SoftmaxMean& p, const float* offsets, float* parts, void* stream);

}  // namespace arimg
