// Appends a block of tokens to a key/value cache and hands out their queries, in one pass over the output of
// the qkv projection.
//
// With l2_norm, q and k are divided per head by max(|x|, 1e-12) (sums in fp32) and q is multiplied by its
// head's scale. Keys and values go to rows [start, start + tokens) of the cache.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct AppendQkNorm {
  DType dtype;
  const void* qkv;       // [batch, tokens, 3, heads, dim] contiguous
  const float* q_scale;  // [heads], or nullptr: 1
  void* q;               // [batch, heads, tokens, dim] contiguous
  void* k_cache;         // [batch, heads, capacity, dim], strides below, rows of dim contiguous elements
  void* v_cache;
  int64_t batch, tokens, heads, dim, start;
  int64_t k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;  // elements
  bool l2_norm;
};

// Tokens [begin, end) of batch * tokens.
ARIMG_CPU_KERNEL(void, append_qk_norm, (const AppendQkNorm& p, int64_t begin, int64_t end))

Status append_qk_norm_cuda(const AppendQkNorm& p, void* stream);

}  // namespace arimg
