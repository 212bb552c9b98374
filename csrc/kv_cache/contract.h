// Writes to and reads from a key/value cache.
//
// A cache is [pages, kv_heads, page_size, dim]. Position i of a batch row lies in page table[row][i /
// page_size] at offset i % page_size; without a table each row is one page ("contiguous"). Positions without
// a page (-1 in the table, negative, beyond the end) are not written and read as zero.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

// How a cache holds numbers: in the dtype of the input, or one byte each with a factor per token and head
// (codes.h).
enum class Storage : int { same, int8, fp8 };
enum class Norm : int { none, l2, rms };

constexpr int64_t kMaxHeadDim = 256;

struct Pages {
  const int32_t* table;  // [batch, per_row], or nullptr: page = batch row
  int64_t per_row, size, count;
};

struct CachePart {                   // the keys or the values
  void* data;                        // [pages, kv_heads, page_size, dim], rows of dim contiguous elements
  float* scale;                      // [pages, kv_heads, page_size] contiguous, for one-byte storage
  int64_t page_stride, head_stride;  // elements
};

struct Slot {
  int64_t page, offset;  // page -1: nowhere
};

// The n-th page of a row, or -1.
static ARIMG_HD int64_t find_page(const Pages& p, int64_t batch, int64_t n) {
  if (!p.table) return n == 0 ? batch : -1;
  if (n >= p.per_row) return -1;
  const int64_t page = p.table[batch * p.per_row + n];
  return page < p.count ? page : -1;
}

static ARIMG_HD Slot find_slot(const Pages& p, int64_t batch, int64_t position) {
  if (position < 0) return {-1, 0};
  if (!p.table) return {position < p.size ? batch : -1, position};
  const int64_t number = position / p.size;
  return {find_page(p, batch, number), position - number * p.size};
}

// Appends a block of tokens and hands out their queries, in one pass over the output of the qkv projection:
// per head of q and k the norm, then the rotation, in fp32 and rounded once; v is copied.
//
// Norm::l2: x / max(|x|, 1e-12), queries times q_weight[head]. Norm::rms: x / sqrt(mean(x^2) + eps) times
// weight[channel]. Rotation: the pair (a, b) of channels becomes (a cos - b sin, b cos + a sin) with row
// rope_index of the tables (default: the position), NaN where there is no such row; the pairs are (2i, 2i +
// 1) or (i, i + dim / 2).
struct Append {
  DType dtype;
  const void* qkv;  // [batch, tokens, q_heads + 2 kv_heads, dim] contiguous
  void* q;          // [batch, q_heads, tokens, dim] contiguous
  CachePart k, v;
  Pages pages;
  Storage storage;
  int64_t batch, tokens, q_heads, kv_heads, dim;
  int64_t start;             // the first position, used without `positions`
  const int32_t* positions;  // [batch or 1, tokens], or nullptr
  int64_t positions_stride;  // 0 when shared
  Norm norm;
  const float* q_weight;  // l2: [q_heads], rms: [dim], or nullptr: 1
  const float* k_weight;  // rms: [dim], or nullptr: 1
  float eps;
  const float* cos;  // [table_rows, dim / 2] contiguous, or nullptr: no rotation
  const float* sin;
  int64_t table_rows;
  const int32_t* rope_index;  // [batch or 1, tokens], or nullptr
  int64_t rope_index_stride;  // 0 when shared
  bool interleaved;
};

static ARIMG_HD int64_t append_position(const Append& p, int64_t batch, int64_t token) {
  return p.positions ? p.positions[batch * p.positions_stride + token] : p.start + token;
}
static ARIMG_HD int64_t append_rope_index(const Append& p, int64_t batch, int64_t token) {
  return p.rope_index ? p.rope_index[batch * p.rope_index_stride + token] : append_position(p, batch, token);
}

// Tokens [begin, end) of batch * tokens.
ARIMG_CPU_KERNEL(void, append, (const Append& p, int64_t begin, int64_t end))

Status append_cuda(const Append& p, void* stream);

// Positions [start, start + tokens) of each row as one tensor, one-byte storage multiplied out.
struct ReadCache {
  DType dtype;  // of `out`, and of the cache unless it is one-byte
  CachePart part;
  Pages pages;
  Storage storage;
  void* out;               // [batch, kv_heads, tokens, dim] contiguous
  const int32_t* lengths;  // [batch] or nullptr: positions from there on are zero
  int64_t batch, kv_heads, tokens, dim, start;
};

// Rows [begin, end) of batch * kv_heads.
ARIMG_CPU_KERNEL(void, read_cache, (const ReadCache& p, int64_t begin, int64_t end))

Status read_cache_cuda(const ReadCache& p, void* stream);

}  // namespace arimg
