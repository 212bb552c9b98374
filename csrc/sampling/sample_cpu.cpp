// See contract.h; the row itself is prepared by row_cpu.h.
#include "core/philox.h"
#include "sampling/contract.h"
#include "sampling/row_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

// The first entry at which the running sum exceeds `target` = floor(u * sum).
static int64_t draw(const List& row, uint64_t seed, uint64_t position) {
  constexpr int blocks = 64;
  uint64_t sums[blocks];
  int64_t length = (row.count / blocks / W + 1) * W;
  uint64_t total = 0;
  for (int b = 0; b < blocks; ++b) {
    WideSum sum;
    int64_t end = (b + 1) * length < row.count ? (b + 1) * length : row.count;
    for (int64_t i = b * length; i < end; i += W) sum.add(I32::load(row.weight + i));
    total += sums[b] = sum.total();
  }
  uint64_t target = draw_below(total, seed, position, 0);
  int64_t i = 0;
  for (int b = 0; target >= sums[b]; ++b) {
    target -= sums[b];
    i += length;
  }
  for (; target >= uint32_t(row.weight[i]); ++i) target -= uint32_t(row.weight[i]);
  return i;
}

template <typename T>
static int64_t sample_row(const Sample& p, int64_t r, const Workspace& w) {
  const List row = prepare<T>(p, r, w).list;
  if (row.count == 1) return token_at(row, 0);
  return token_at(row, draw(row, seed_of(p, r / p.tokens), position_of(p, r % p.tokens)));
}

void sample(const Sample& p, int64_t begin, int64_t end, void* workspace) {
  const Workspace w = carve(workspace, p.vocabulary);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) p.out[r] = sample_row<T>(p, r, w);
  });
}

void philox_uniform(const PhiloxUniform& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t j = 0; j < p.columns; ++j)
      p.out[r * p.columns + j] =
          arimg::philox_uniform(uint64_t(p.seeds[r]), p.position + uint64_t(j), p.draw);
}

void exp_weights(const float* d, int32_t* weights, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) exp_weight(F32::load(d + i)).store(weights + i);
  for (; i < count; ++i) weights[i] = exp_weight(d[i]);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
