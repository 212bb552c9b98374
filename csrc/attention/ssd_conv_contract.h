// The depthwise causal convolution before a state space model, with its tail carried from call to call.
//
// y[b, t, c] = act(bias[c] + sum over i of weight[c, i] x[b, t - width + 1 + i, c]), where the rows before
// the first are those of `tail` (the last width - 1 rows of the calls before), or zeros. new_tail is a copy
// of the last width - 1 rows of tail and x together. Sums in float32, in increasing i; a row's bits depend
// neither on where the sequence is cut into calls nor on the batch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

constexpr int kConvMaxWidth = 4;
constexpr int64_t kConvRows = 32;  // rows of a unit of work

struct CausalConv {
  DType dtype;
  const void* x;       // [batch, length, channels], contiguous channels, other strides free
  const void* weight;  // [channels, width] contiguous
  const void* bias;    // [channels], or nullptr
  const void* tail;    // [batch, width - 1, channels] contiguous, or nullptr
  void* y;             // [batch, length, channels] contiguous
  void* new_tail;      // [batch, width - 1, channels] contiguous
  int64_t batch, length, channels, batch_stride, row_stride;
  int width;
  bool silu;
};

static inline int64_t conv_units(const CausalConv& p) {
  return p.batch * ((p.length + kConvRows - 1) / kConvRows);
}

// Units [begin, end) of the result; causal_conv1d_tail makes the tails of all batch entries. Scratch:
// (width + 1) * channels floats per thread.
ARIMG_CPU_KERNEL(void, causal_conv1d, (const CausalConv& p, int64_t begin, int64_t end, float* scratch))
ARIMG_CPU_KERNEL(void, causal_conv1d_tail, (const CausalConv& p))

Status causal_conv1d_cuda(const CausalConv& p, void* stream);

}  // namespace arimg
