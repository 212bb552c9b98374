// Softmax attention in which each query row sees one interval of keys, and with it, where asked for, the
// first keys of all ("sinks") and its own key. No mask is ever formed.
//
// q and out are [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim]; query head h reads key
// head h / (heads / kv_heads). Strides are free in the first three dimensions, channels contiguous. Row i of
// batch entry b sees the keys [row_start, row_end) found at b * interval_stride + i, cut to [0, keys), the
// keys [0, sinks), and with `self` key i + keys - queries; without intervals every row sees all keys. Rows
// that see nothing are zero, their lse -inf. Scores and the softmax are fp32.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct AttentionStrides {
  int64_t batch, head, row;  // in elements
};

struct Attention {
  DType dtype;
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;                // [batch, heads, queries]: log of the sum of exp(score), or nullptr
  const int32_t* row_start;  // [batch or 1, queries], or nullptr
  const int32_t* row_end;    // with row_start
  const int32_t*
      row_tiles;  // a plan: tile t of a head is the rows [row_tiles[t], row_tiles[t + 1]), or nullptr
  const float* head_scale;  // [heads], a factor of the scores, or nullptr
  int64_t tile_count;       // tiles of the plan
  int64_t tile_rows;        // rows of its longest
  int64_t interval_stride;  // elements between batch entries of the intervals, 0 when shared
  int64_t batch, heads, kv_heads, queries, keys, dim;
  int64_t sinks;
  bool self;
  AttentionStrides q_stride, k_stride, v_stride, out_stride;
  float scale;
};

// The gradients of `out` with respect to q, k and v, given that of `out`; deterministic. grad_q leaves out
// the factor head_scale, so that the gradient of head_scale is the sum of q times grad_q.
struct AttentionBackward {
  Attention forward;        // out and lse are read
  const void* grad_out;     // as out
  void* grad_q;             // as q, contiguous
  void* grad_k;             // as k, contiguous
  void* grad_v;             // as v, contiguous
  float* delta;             // CUDA: room for [batch, heads, queries]
  const int32_t* key_rows;  // CUDA, a plan: some row in [key_rows[2t], key_rows[2t+1]) sees a key of the
                            // kAttentionKeyRows keys from t * kAttentionKeyRows on, no other; or nullptr
  AttentionStrides grad_out_stride;
};

// The CUDA kernels compute powers of two.
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// The CPU kernel's unit of work is a tile of query rows of one head: all tiles of a call are numbered
// 0 .. attention_tiles(p) - 1. Results do not depend on how tiles are cut or spread over threads.
constexpr int64_t kAttentionMaxRows = 192;  // amortises the transposition of the keys
constexpr int64_t kAttentionKeyTile = 128;
constexpr int64_t kAttentionMaxGroup = 12;  // rows that share registers, a bound over all SIMD levels
// Rows of a tile up to which keys and values are read as they lie, keys of a step then, and floats from one
// row of scores to the next.
constexpr int64_t kAttentionFewRows = 4, kAttentionFewTile = 512,
                  kAttentionFewStride = kAttentionFewTile + 16;
constexpr int64_t kAttentionScores = kAttentionFewRows * kAttentionFewStride;
static_assert(kAttentionScores >= kAttentionMaxGroup * kAttentionKeyTile);
constexpr int64_t kAttentionKeyRows = 64;  // keys per entry of a plan's key_rows

static inline int64_t attention_padded(int64_t dim) {
  return (dim + 31) / 32 * 32;  // channels padded to two vectors of the widest level
}
static inline int64_t attention_tiles_per_head(const Attention& p) {
  return p.row_tiles != nullptr ? p.tile_count : (p.queries + kAttentionMaxRows - 1) / kAttentionMaxRows;
}
static inline int64_t attention_tiles(const Attention& p) {
  return p.batch * p.heads * attention_tiles_per_head(p);
}
// Floats of scratch, 64-byte aligned, for tiles of up to `rows` rows.
static inline int64_t attention_scratch(int64_t rows, int64_t dim) {
  int64_t padded = attention_padded(dim);
  int64_t rows_padded = rows + 16;  // maxima are read a vector at a time
  return 2 * rows * padded + 2 * kAttentionKeyTile * padded + kAttentionScores + 2 * rows_padded + 64;
}

ARIMG_CPU_KERNEL(void, attention, (const Attention& p, int64_t begin, int64_t end, float* scratch))

// The backward kernel's unit is one key head of one batch entry with all its query heads.
constexpr int64_t kBackwardKeys = 96, kBackwardRows = 48;  // of a step; whole register tiles on every level

static inline int64_t attention_backward_scratch(const Attention& p) {
  int64_t padded = attention_padded(p.dim), rows = p.queries * (p.heads / p.kv_heads);
  return (3 * rows + 5 * kBackwardKeys) * padded + 2 * kBackwardRows * kBackwardKeys + 2 * (rows + 16) +
         4 * rows + 64;  // 16 for each block of rows
}

ARIMG_CPU_KERNEL(void, attention_backward,
                 (const AttentionBackward& p, int64_t begin, int64_t end, float* scratch))

Status attention_cuda(const Attention& p, void* stream);
Status attention_backward_cuda(const AttentionBackward& p, void* stream);

}  // namespace arimg
