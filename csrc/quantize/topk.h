// The k nearest codes: for each row of x the k codes with the lowest scores (those of contract.h), lowest
// first, without an N x K matrix.
//
// Equal scores: the lowest index first. A score that is NaN counts as +infinity. `value` is, for `l2`, the
// squared distance max(0, 2 score + x . x) with x . x one chain in increasing dimension; for `dot` the inner
// product, for `cosine` that over max(length(x), 1e-12). A score of +infinity gives +infinity (l2) or
// -infinity. Values are in order because each is a monotone function of the score.
#pragma once

#include "quantize/contract.h"

namespace arimg {

constexpr int MAX_NEAREST = 128;

struct NearestCodes {
  DType dtype;
  const void* x;        // [rows, dim], contiguous
  const float* packed;  // as pack_codes writes it
  int64_t count, dim;
  Metric metric;
  int k;           // 1 <= k <= min(count, MAX_NEAREST)
  float* value;    // [rows, k]
  int64_t* index;  // [rows, k]
};

// Floats of working memory that a call of nearest_codes needs.
ARIMG_CPU_KERNEL(int64_t, nearest_codes_scratch, (int64_t dim, int k))
// Rows [begin, end).
ARIMG_CPU_KERNEL(void, nearest_codes, (const NearestCodes& p, float* scratch, int64_t begin, int64_t end))

// GPU: as nearest_code_cuda, with k keys per row where it has one. `offsets` from code_offsets_cuda.
struct NearestCodesGpu {
  DType dtype;
  const void* x;  // [rows, dim], contiguous
  Codebook book;
  const float* offsets;  // [count]
  int64_t rows;
  int k;
  float* value;     // [rows, k]
  int64_t* index;   // [rows, k]
  uint64_t* parts;  // [splits, rows, k], unused when splits is 1
  int splits;
};

Status nearest_codes_cuda(const NearestCodesGpu& p, void* stream);

// What is reported for a score; `squares` is x . x.
static ARIMG_HD float value_of_score(Metric metric, float score, float squares) {
  const float infinity = __builtin_inff();
  if (score == infinity) return metric == Metric::l2 ? infinity : -infinity;
  if (metric == Metric::dot) return -score;
  if (metric == Metric::l2) {
    float distance = 2.f * score + squares;  // twice a score is exact, so fused or not is the same
    return distance < 0.f ? 0.f : distance;
  }
#if defined(__CUDA_ARCH__)
  float length = __fsqrt_rn(squares);
  return __fdiv_rn(-score, length < 1e-12f ? 1e-12f : length);
#else
  float length = __builtin_sqrtf(squares);
  return -score / (length < 1e-12f ? 1e-12f : length);
#endif
}

}  // namespace arimg
