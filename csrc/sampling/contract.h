// One token per row of logits, in one pass over the row: guidance, temperature, top-k, top-p, min-p, draw.
//
// The result is a function of the row, its seed and its position alone, the same to the last bit on every
// backend: logits are transformed by correctly rounded operations (core/math.h), compared exactly, and
// weighed by integers, whose sums do not depend on their order.
//
//   l = s c + (1 - s) u as fma(s, c, (1 - s) * u); x = l / temperature; NaN -> -inf; -0 -> +0
//   weight = exp_weight(x - top), top the largest x; where x == top (also +inf) it is 2^30
//   top-k   keep x >= the k-th largest x; k == 1 keeps the first of the largest alone
//   top-p   total = sum of kept weights; the keep order is by x descending, then by index ascending;
//           keep a token while the weights before it sum to less than max(1, total - floor((1 - p) total))
//   min-p   keep weight >= min_weight
//   draw    the first index at which the running sum of kept weights exceeds draw_below(total)
// A row without any x above -inf gives 0.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

constexpr int64_t max_vocabulary = 1 << 24;  // the sum of the weights stays below 2^54

// Rows of logits and what becomes of them before a draw. A setting is one number, or (where the pointer is
// not nullptr) one of each entry; an entry has `tokens` rows that follow each other.
struct Rows {
  DType dtype;
  const void* logits;  // [rows, vocabulary]; with `guided` [2 rows, vocabulary], the conditional ones first
  int64_t row_stride;  // elements
  int64_t rows, vocabulary;
  int64_t tokens;  // row r belongs to entry r / tokens
  bool guided;
  float guidance;
  const float* guidances;
  float temperature;   // 1: not applied
  int64_t top_k;       // 0: not applied
  double dropped;      // 1 - p of top-p; 0: not applied
  int32_t min_weight;  // 0: not applied
};

// Row r draws at position + r % tokens under the seed of its entry.
struct Draws {
  const int64_t* seeds;   // [entries], or nullptr: first_seed + entry
  uint64_t first_seed;    // wraps
  const int64_t* offset;  // one number, or nullptr: added to position
  uint64_t position;      // wraps
};

struct Sample : Rows, Draws {
  int64_t* out;  // [rows]
};

// Rows [begin, end). `workspace`: row_workspace(vocabulary) bytes, aligned for float, per thread.
ARIMG_CPU_KERNEL(void, sample, (const Sample& p, int64_t begin, int64_t end, void* workspace))

constexpr int64_t workspace_slack = 64;  // elements that whole vectors may touch behind a row
inline int64_t row_workspace(int64_t vocabulary) {
  return 5 * (vocabulary + workspace_slack) * 4;
}

Status sample_cuda(const Sample& p, void* stream);

// out[r, j] = the uniform number of (seeds[r], position + j, draw).
struct PhiloxUniform {
  const int64_t* seeds;  // [rows]
  int64_t rows, columns;
  uint64_t position;
  uint32_t draw;
  float* out;  // [rows, columns]
};

ARIMG_CPU_KERNEL(void, philox_uniform, (const PhiloxUniform& p, int64_t begin, int64_t end))
Status philox_uniform_cuda(const PhiloxUniform& p, void* stream);

// Test hook: weights[i] = exp_weight(d[i]), as the kernels compute it (whole vectors, then one by one).
ARIMG_CPU_KERNEL(void, exp_weights, (const float* d, int32_t* weights, int64_t count))
Status exp_weights_cuda(const float* d, int32_t* weights, int64_t count, void* stream);

}  // namespace arimg
