// Attention that carries a gated state of constant size instead of keys and values: one scan for gated linear
// attention (with or without a softmax inside its chunks) and for the state space model of Mamba-2 (SSD).
//
// Per batch entry and head, with the log decay a_t = gate_t (times rate where there is one), the weight
// w_t = scale (times gate_t where there is a rate) and the state S [dim, value_dim] in float32:
//   causal   S_t = exp(a_t) S_(t-1) + w_t k_t v_t^T;  out_t = q_t S_t + skip v_t
//            computed in chunks: what lies within one is a masked product of matrices.
//   chunked  out_t = base_t + exp(A_t) q_t S, where S is the state before t's chunk and A_t the sum of a from
//            the chunk's start to t; after a chunk S = exp(mean of a) S + sum of w_j k_j v_j^T over it.
// A decay below exp(-1e4), also of -inf, forgets the state.
//
// q and k are [batch, groups, length, dim]: heads in equal blocks share a group. v, base and out are
// [batch, heads, length, value_dim]. Channels are contiguous, other strides free; out and new_state alias
// nothing. Row and state bits depend on neither batch, heads beside, nor threads.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct ScanStrides {
  int64_t batch, head, row;  // in elements
};

struct GatedScan {
  DType dtype;         // of q, k, v, base and out
  const void* q;       // [batch, groups, length, dim]
  const void* k;       // [batch, groups, length, dim]
  const void* v;       // [batch, heads, length, value_dim]
  const void* base;    // [batch, heads, length, value_dim], or nullptr (zeros)
  const float* gate;   // [batch, heads, length], any strides
  const float* rate;   // [heads], or nullptr
  const float* skip;   // [heads], or nullptr (zeros)
  const float* state;  // [batch, heads, dim, value_dim] contiguous, or nullptr (zeros)
  void* out;
  float* new_state;  // [batch, heads, dim, value_dim] contiguous
  int64_t batch, heads, groups, length, dim, value_dim;
  int64_t chunk;  // where causal a matter of speed and rounding alone
  ScanStrides q_stride, k_stride, v_stride, base_stride, gate_stride, out_stride;
  float scale;
  bool causal;
};

constexpr int64_t kScanMaxDim = 256;
constexpr float kScanLowest =
    -1e4f;  // log decays are cut here, so that sums and their differences stay finite

// The CPU kernel's unit of work: up to four heads of one group, which share the products of q and k.
constexpr int64_t kScanMaxHeads = 4;
static inline int64_t scan_unit_heads(const GatedScan& p) {
  if (!p.causal) return 1;
  int64_t shared = p.heads / p.groups, heads = shared < kScanMaxHeads ? shared : kScanMaxHeads;
  while (shared % heads != 0) --heads;
  return heads;
}
static inline int64_t scan_units(const GatedScan& p) {
  return p.batch * (p.heads / scan_unit_heads(p));
}

// Units [begin, end). gated_scan_scratch: floats of scratch of one thread, 64-byte aligned.
ARIMG_CPU_KERNEL(void, gated_scan, (const GatedScan& p, int64_t begin, int64_t end, float* scratch))
ARIMG_CPU_KERNEL(int64_t, gated_scan_scratch, (const GatedScan& p))

Status gated_scan_cuda(const GatedScan& p, void* stream);

}  // namespace arimg
