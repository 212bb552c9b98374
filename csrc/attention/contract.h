// Softmax attention in which each query row sees one interval of keys. No mask is ever formed.
//
// q, k, v and out are [batch, heads, rows, dim] with free strides in the first three dimensions and
// contiguous channels. Row i of batch entry b sees the keys [row_start, row_end) found at b * interval_stride
// + i, cut to [0, keys); without intervals every row sees all keys. Rows that see nothing are zero. Scores
// and the softmax are fp32.
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
  const void* q;             // [batch, heads, queries, dim]
  const void* k;             // [batch, heads, keys, dim]
  const void* v;             // [batch, heads, keys, dim]
  void* out;                 // [batch, heads, queries, dim]
  const int32_t* row_start;  // [batch or 1, queries], or nullptr
  const int32_t* row_end;    // with row_start
  int64_t interval_stride;   // elements between batch entries of the intervals, 0 when shared
  int64_t batch, heads, queries, keys, dim;
  AttentionStrides q_stride, k_stride, v_stride, out_stride;
  float scale;
};

// The CPU kernel's unit of work is a tile of query rows of one head: all tiles of a call are numbered
// 0 .. attention_tiles(p) - 1. Results do not depend on how tiles are cut or spread over threads.
constexpr int64_t kAttentionMaxRows = 192;  // amortises the transposition of the keys
constexpr int64_t kAttentionKeyTile = 64;
constexpr int64_t kAttentionMaxGroup = 12;  // rows that share registers, a bound over all SIMD levels

static inline int64_t attention_tiles_per_head(int64_t queries) {
  return (queries + kAttentionMaxRows - 1) / kAttentionMaxRows;
}
// Rows of one tile: tiles of one head are equally long, and whole groups of rows where possible.
static inline int64_t attention_tile_rows(int64_t queries) {
  int64_t tiles = attention_tiles_per_head(queries);
  int64_t rows = (queries + tiles - 1) / tiles;
  return (rows + kAttentionMaxGroup - 1) / kAttentionMaxGroup * kAttentionMaxGroup;
}
static inline int64_t attention_tiles(const Attention& p) {
  int64_t rows = attention_tile_rows(p.queries);
  return p.batch * p.heads * ((p.queries + rows - 1) / rows);
}
// Floats of scratch that one thread needs, 64-byte aligned.
static inline int64_t attention_scratch(const Attention& p) {
  int64_t dim = (p.dim + 31) / 32 * 32;  // channels padded to two vectors of the widest level
  int64_t rows = attention_tile_rows(p.queries);
  return 2 * rows * dim + 2 * kAttentionKeyTile * dim + kAttentionMaxGroup * kAttentionKeyTile + 2 * rows;
}

ARIMG_CPU_KERNEL(void, attention, (const Attention& p, int64_t begin, int64_t end, float* scratch))

Status attention_cuda(const Attention& p, void* stream);

}  // namespace arimg
