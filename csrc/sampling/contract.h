// One token per row of logits, in one pass over the row: guidance, temperature, top-k, top-p, min-p, draw.
//
// The result is a function of the row, its seed and its position alone, the same to the last bit on every
// backend: logits are transformed by correctly rounded operations (core/math.h), compared exactly, and
// weighed by integers, whose sums do not depend on their order.
//
//   l = s c + (1 - s) u as fma(s, c, (1 - s) * u); NaN -> -inf
//   processors, where there are any, in this order, each rounding once:
//     seen     l < 0 ? l * penalty : l / penalty, of the tokens in the set
//     factor   l < 0 ? l / factor : l * factor; with `multiply_negative` l * factor
//     bias     l + bias
//     allowed  -inf for the tokens not in the set
//   x = l / temperature; NaN -> -inf; -0 -> +0
//   weight = exp_weight(x - top), top the largest x; where x == top (also +inf) it is 2^30
//   top-k   keep x >= the k-th largest x; k == 1 keeps the first of the largest alone
//   top-p   total = sum of kept weights; the keep order is by x descending, then by index ascending;
//           keep a token while the weights before it sum to less than max(1, total - floor((1 - p) total))
//   min-p   keep weight >= min_weight
//   draw    the first index at which the running sum of kept weights exceeds draw_below(total)
//   gumbel  the first index with the smallest exponential(number of the token) / weight, which is the largest
//           log(weight) + Gumbel noise; the numbers depend on (seed, position, token) alone
// A row without any x above -inf gives 0.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

constexpr int64_t max_vocabulary = 1 << 24;  // the sum of the weights stays below 2^54

// Numbers of tokens, [vocabulary] of each row. A stride is 0 where rows share them.
struct Plane {
  const void* data;                    // nullptr: none
  int64_t entry_stride, token_stride;  // elements
};

// A set of tokens: a byte each, not 0 for the members; or, with `bits`, bit i % 8 of byte i / 8.
struct TokenSet {
  Plane plane;
  bool bits;
};

struct Processors {
  TokenSet seen;
  float penalty;
  Plane factor;  // float
  bool multiply_negative;
  Plane bias;  // float
  TokenSet allowed;
};

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
  float temperature;          // 1: not applied
  const float* temperatures;  // not above 0: the first of the largest
  int64_t top_k;              // 0: not applied
  const int64_t* top_ks;
  double dropped;  // 1 - p of top-p; 0: not applied
  const float* top_ps;
  int32_t min_weight;  // 0: not applied
  const float* min_ps;
  bool processed;  // whether there is any of the processors
  Processors processors;
};

// Row r draws at position + r % tokens under the seed of its entry.
struct Draws {
  const int64_t* seeds;   // [entries], or nullptr: first_seed + entry
  uint64_t first_seed;    // wraps
  const int64_t* offset;  // one number, or nullptr: added to position
  uint64_t position;      // wraps
};

struct Sample : Rows, Draws {
  const int64_t* forced;  // [rows], or nullptr: tokens to give instead of a draw; negative: none
  bool gumbel;            // choose by Gumbel noise
  int64_t* out;           // [rows]
  int64_t* facts;         // [rows, 3], or nullptr: the token's kept weight, the sum of the kept weights, and
                          // the sum of round(weight * (top - x)), from which the entropy follows
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

// Test hook: out[i] = exponential(words[i]), in the same way.
ARIMG_CPU_KERNEL(void, exponentials, (const int32_t* words, float* out, int64_t count))
Status exponentials_cuda(const int32_t* words, float* out, int64_t count, void* stream);

}  // namespace arimg
