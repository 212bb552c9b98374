// Bits drawn from pairs of logits: bit b of a token is the outcome, 0 or 1, of logits 2b and 2b + 1.
//
// The pairs become x as a row of `sample` does (contract.h: guidance, bias, allowed, temperature), and so do
// their weights: 2^30 for the larger x, exp_weight of the difference for the smaller one; equal ones have
// 2^30 both, two of -inf 2^30 and 0. Top-k, top-p and min-p can only drop the smaller one (of equals that of
// outcome 1), and they do so where its weight is below one number of the row, `least_weight`.
//
// With r the ratio of the weights, smaller by larger, and x' and x the pair: log p = -log(1 + r) of the
// larger one and x' - x - log(1 + r) of the other (-inf without a weight), entropy = log(1 + r) + (x - x') r
// / (1 + r).
//
// A bit is set where floor(number b * sum of the weights / 2^32) >= the weight of outcome 0; number b is
// philox_number(seed, position, 0, b). A bit depends on its pair, seed, position and b alone.
#pragma once

#include "sampling/row.h"

namespace arimg {

struct SampleBits : Rows, Draws {
  // Of Rows, vocabulary is 2 * bits; with `odds` it is `bits`, the logits of outcome 1 where those of 0 are
  // 0.
  int64_t bits;
  bool odds;
  const int64_t* forced;  // [rows, bits], or nullptr: 0 gives 0, above 0 gives 1, below 0 draws
  uint8_t* out;           // [rows, bits], 0 or 1
  float* facts;           // [2, rows, bits], or nullptr: log-probability of the bit, entropy of its law
};

// Rows [begin, end). `workspace`: row_workspace(2 * bits) bytes, aligned for float, per thread.
ARIMG_CPU_KERNEL(void, sample_bits, (const SampleBits& p, int64_t begin, int64_t end, void* workspace))
Status sample_bits_cuda(const SampleBits& p, void* stream);

// The smaller one stays from this weight on. Top-p drops it where its share is at most 1 - p, which is
// weight <= 2^30 (1 - p) / p.
static ARIMG_HD int32_t least_weight(const Settings& set) {
  if (set.top_k == 1 || set.dropped >= 0.5) return weight_one + 1;
  if (!(set.dropped > 0)) return set.min_weight;
  const int32_t least = int32_t(set.dropped / (1 - set.dropped) * double(weight_one)) + 1;
  return least > set.min_weight ? least : set.min_weight;
}

// log(1 + r) for 0 <= r <= 1, relative error below 2^-21: 2 atanh(s) with s = r / (2 + r), by its series.
template <typename F>
static ARIMG_HD F log_one_plus(F r) {
  const F s = divide(r, F(2.f) + r), u = multiply(s, s), twice = s + s;
  F series = fma(u, F(0x1.111112p-4f), F(0x1.3b13b2p-4f));
  series = fma(u, series, F(0x1.745d18p-4f));
  series = fma(u, series, F(0x1.c71c72p-4f));
  series = fma(u, series, F(0x1.24924ap-3f));
  series = fma(u, series, F(0x1.99999ap-3f));
  series = fma(u, series, F(0x1.555556p-2f));
  return fma(multiply(twice, u), series, twice);
}

}  // namespace arimg
