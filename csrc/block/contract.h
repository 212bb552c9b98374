// Norms with modulation and gated residuals: the arithmetic between a block's linear layers.
//
// All tensors are rows of C contiguous elements of one storage type; row r belongs to batch entry
// r / rows_per_batch, which selects its row of scale, shift and gate. Statistics are taken in fp32 with two
// passes (mean, then squared deviations), so a large mean does not cancel. Outputs may alias inputs row for
// row.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct NormModulate {
  DType dtype;
  const void* x;      // [rows, C]
  const void* y;      // [rows, C] added as x + gate * y, or nullptr
  const void* gate;   // [batch, C], with y
  const void* scale;  // [batch, C]; nullptr: no norm, only the residual
  const void* shift;  // [batch, C]
  void* residual;     // [rows, C] receives x + gate * y (with y)
  void* out;          // [rows, C] receives LayerNorm(x + gate * y) * (1 + scale) + shift (with scale)
  int64_t rows, rows_per_batch, channels;
  int64_t scale_stride, shift_stride, gate_stride;  // elements between batch entries
  float eps;
  bool rms;  // the norm divides by the root of the mean square alone; otherwise LayerNorm
};

// Rows [begin, end).
ARIMG_CPU_KERNEL(void, norm_modulate, (const NormModulate& p, int64_t begin, int64_t end))

Status norm_modulate_cuda(const NormModulate& p, void* stream);

}  // namespace arimg
