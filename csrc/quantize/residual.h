// Residual depth: r_0 = x; depth q takes the code c_q nearest (l2, contract.h) to r_q, and r_(q+1) = r_q -
// c_q in fp32. `quantized` is c_0 + c_1 + ..., added in this order in fp32 and rounded once.
#pragma once

#include "quantize/contract.h"

namespace arimg {

constexpr int MAX_DEPTHS = 64;

struct ResidualCodes {
  DType dtype;    // of x and quantized
  const void* x;  // [rows, dim], contiguous
  DType book_dtype;
  const void* books[MAX_DEPTHS];  // [count, dim] each, contiguous
  int64_t depths, count, dim, rows;
  float* residual;  // [rows, dim]; unused when there is one depth
  int64_t* index;   // [rows, depths]
  void* quantized;  // [rows, dim]
};

static ARIMG_HD Codebook book_of_depth(const ResidualCodes& p, int64_t depth) {
  return {p.book_dtype, p.books[depth], p.count, p.dim, Metric::l2};
}

// CPU: rows [begin, end). residual_step subtracts the codes `chosen` [rows] of a depth and notes them in
// `index`; residual_sum adds up the codes of all depths.
ARIMG_CPU_KERNEL(void, residual_step,
                 (const ResidualCodes& p, int64_t depth, const int64_t* chosen, int64_t begin, int64_t end))
ARIMG_CPU_KERNEL(void, residual_sum, (const ResidualCodes& p, int64_t begin, int64_t end))

// GPU: one launch for the offsets, then one for all depths where the rows alone fill the device; otherwise
// two per depth, a search over parts of the codebook and a step. `offsets` is room for [depths, count],
// `parts` for [splits, rows] when splits > 1.
Status residual_codes_cuda(const ResidualCodes& p, float* offsets, uint64_t* parts, int splits, void* stream);

}  // namespace arimg
