// See pairs.h. Sixteen threads per 64 bits of a token, each with the four numbers of one counter.
#include "sampling/pairs.h"

#include "core/philox.h"
#include "sampling/row_cuda.h"

namespace arimg {
namespace {

constexpr int THREADS = 256, LANES = 16;

struct PairWeights {
  bool one_leads;
  int32_t lesser;  // the weight of the other outcome
  float below;     // how far its x is below

  __device__ __forceinline__ PairWeights(float zero, float one, int32_t least) : one_leads(one > zero) {
    const float top = one_leads ? one : zero, other = one_leads ? zero : one;
    below = zero == one ? 0.f : subtract(top, other);
    lesser = exp_weight(-below);
    if (lesser < least || top == -INFINITY) lesser = 0;
  }
  __device__ __forceinline__ int32_t of(bool bit) const { return bit == one_leads ? weight_one : lesser; }

  __device__ __forceinline__ bool draw(uint32_t number) const {
    uint32_t high, low;
    multiply_wide(number, uint32_t(weight_one) + uint32_t(lesser), high, low);
    return high >= uint32_t(of(false));
  }
  __device__ __forceinline__ float ratio() const { return multiply(to_float(lesser), 0x1p-30f); }
  __device__ __forceinline__ float logprob(bool bit) const {
    const float log = log_one_plus(ratio());
    if (bit == one_leads) return 0.f - log;
    return lesser > 0 ? 0.f - (below + log) : -INFINITY;
  }
  __device__ __forceinline__ float entropy() const {
    if (lesser == 0) return 0.f;
    return log_one_plus(ratio()) + divide(multiply(ratio(), below), ratio() + 1.f);
  }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) sample_bits_kernel(SampleBits p, int groups) {
  const int64_t unit = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const int64_t r = unit / groups;
  const int first = int(unit - r * groups) * 64 + int(threadIdx.x) % LANES;
  if (r >= p.rows || first >= p.bits) return;
  const auto row = row_of<T, false, true>(p, r, Shared<float>());
  const int32_t least = least_weight(row.set);
  const Philox4 numbers = philox(seed_of(p, r / p.tokens), position_of(p, r % p.tokens), 0,
                                 uint32_t(1 + first / 64 * LANES + first % LANES));
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int i = first + word * LANES;
    if (i >= p.bits) return;
    const float zero = p.odds ? 0.f : row.transform(2 * i), one = row.transform(p.odds ? i : 2 * i + 1);
    const PairWeights pair(zero, one, least);
    bool bit = pair.draw(numbers.word[word]);
    const int64_t at = r * p.bits + i, plane = p.rows * p.bits;
    if (p.forced != nullptr && p.forced[at] >= 0) bit = p.forced[at] > 0;
    p.out[at] = bit;
    if (p.facts == nullptr) continue;
    p.facts[at] = pair.logprob(bit);
    p.facts[plane + at] = pair.entropy();
  }
}

}  // namespace

Status sample_bits_cuda(const SampleBits& p, void* stream) {
  const int groups = int(ceil_div(p.bits, 64));
  return with_dtype(p.dtype, [&](auto t) {
    return ARIMG_LAUNCH((sample_bits_kernel<decltype(t)>), ceil_div(p.rows * groups, THREADS / LANES),
                        THREADS, 0, stream, p, groups);
  });
}

}  // namespace arimg
