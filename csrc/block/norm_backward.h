// The gradient of norm_modulate, gated_residual and gated_residual_norm (contract.h).
//
// With n the normed row, d = grad_out (1 + scale) and < > means over C:
//   g        = grad_residual + inverse (d - <d> - n <d n>)     (an RMS norm has no <d>)
//   grad_x   = g,   grad_y = gate g,   grad_gate = sum g y,   grad_scale = sum grad_out n,
//   grad_shift = sum grad_out
// with sums over the rows of a batch entry: PART_ROWS rows at a time, in order, then the parts in order, so
// the result depends on rows_per_batch alone. Sums are fp32 until they are stored.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

constexpr int64_t PART_ROWS = 16;
constexpr int NORM_SUMS = 3;  // scale, shift, gate

struct NormBackward {
  DType dtype;                // of all but parts
  const void* x;              // [rows, C] what was normed: the sum, with y
  const void* grad_out;       // [rows, C] or nullptr: no norm
  const void* grad_residual;  // [rows, C] or nullptr
  const void* y;              // [rows, C] or nullptr: no gated residual
  const void* scale;          // [batch, C], with grad_out
  const void* gate;           // [batch, C], with y
  void* grad_x;               // [rows, C]
  void* grad_y;               // [rows, C], with y
  void* sums[NORM_SUMS];      // [batch, C] gradients of scale and shift (with grad_out) and gate (with y)
  float* parts;               // [batch, parts, NORM_SUMS, C]
  int64_t batch, rows_per_batch, channels;
  int64_t scale_stride, gate_stride;  // elements between batch entries
  float eps;
  bool rms;
};

constexpr int64_t parts_of(const NormBackward& p) {
  return (p.rows_per_batch + PART_ROWS - 1) / PART_ROWS;
}

// Parts [begin, end) of batch * parts_of(p), then the sums of batch entries [begin, end).
ARIMG_CPU_KERNEL(void, norm_backward, (const NormBackward& p, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, norm_backward_sums, (const NormBackward& p, int64_t begin, int64_t end))

constexpr int64_t NORM_BACKWARD_CHANNELS = 7168;  // at most: the GPU keeps a part in shared memory
Status norm_backward_cuda(const NormBackward& p, void* stream);

}  // namespace arimg
