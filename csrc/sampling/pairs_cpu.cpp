// See pairs.h. A token's logits become a row of x (row_cpu.h); then W pairs at a time.
#include "sampling/pairs.h"

#include "sampling/numbers_cpu.h"
#include "sampling/row_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

struct PairWeights {
  Mask one_leads;
  I32 lesser;  // the weight of the other outcome
  F32 below;   // how far its x is below

  ARIMG_INLINE PairWeights(F32 zero, F32 one, I32 least) : one_leads(one > zero) {
    const F32 top = max(zero, one);
    below = select(zero == one, F32(0.f), top - min(zero, one));
    lesser = exp_weight(F32(0.f) - below);
    lesser = select((lesser < least) | (top == F32(-infinity)), I32(0), lesser);
  }
  ARIMG_INLINE I32 of(Mask bit) const { return select({bit.m ^ one_leads.m}, lesser, I32(weight_one)); }
};

static ARIMG_INLINE Mask draw_bits(const PairWeights& pair, I32 numbers) {
  const I32 zero = pair.of({IntVec{}});
  const I32 total = (IntVec)((UintVec)pair.lesser.v + uint32_t(weight_one));
  I32 high, low;
  multiply_wide(numbers, total, high, low);
  return high > zero - I32(1);
}

static Mask force(Mask drawn, const int64_t* forced, int n) {
  for (int i = 0; i < n; ++i)
    if (forced[i] >= 0) drawn.m[i] = forced[i] > 0 ? -1 : 0;
  return drawn;
}

static ARIMG_INLINE void store_some(F32 x, float* p, int n) {
  if (n == W)
    x.store(p);
  else
    x.store_partial(p, n);
}

static ARIMG_INLINE void store_facts(const PairWeights& pair, Mask bit, float* logprob, float* entropy,
                                     int n) {
  const Mask some = pair.lesser > I32(0);
  const F32 r = to_float(pair.lesser) * F32(0x1p-30f), log = log_one_plus(r);
  const F32 below = select(some, pair.below, F32(0.f));
  const F32 behind = select(some, below + log, F32(infinity));
  const Mask led = {bit.m ^ pair.one_leads.m};
  store_some(F32(0.f) - select(led, behind, log), logprob, n);
  store_some(log + r * below / (r + F32(1.f)), entropy, n);
}

// `row` holds the x of the token, `numbers` has room for its random numbers, and elements before `last` may
// be written: what reaches beyond the token is written again by the next one.
static void token_bits(const SampleBits& p, int64_t r, int32_t least, const List& row, int32_t* numbers,
                       int64_t last) {
  philox_numbers(seed_of(p, r / p.tokens), position_of(p, r % p.tokens), 0, p.bits, numbers);
  const int64_t first = r * p.bits, plane = p.rows * p.bits;
  for (int64_t i = 0; i < p.bits; i += W) {
    const int n = p.bits - i < W ? int(p.bits - i) : W;
    F32 zero(0.f), one;
    if (p.odds)
      one = F32::load(row.x + i);
    else
      part_pairs(F32::load(row.x + 2 * i), F32::load(row.x + 2 * i + W), zero, one);
    const PairWeights pair(zero, one, I32(least));
    Mask set = draw_bits(pair, I32::load(numbers + i));
    const int64_t at = first + i;
    if (p.forced) set = force(set, p.forced + at, n);
    if (at + W <= last)
      store_bytes(set, p.out + at);
    else
      store_bytes(set, p.out + at, n);
    if (p.facts) store_facts(pair, set, p.facts + at, p.facts + plane + at, n);
  }
}

void sample_bits(const SampleBits& p, int64_t begin, int64_t end, void* workspace) {
  const Workspace w = carve(workspace, p.vocabulary);
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t r = begin; r < end; ++r) {
      const Settings set = settings_of(p, r / p.tokens);
      transform_row<decltype(t)>(p, r, set, w.row);
      token_bits(p, r, least_weight(set), w.row, w.index, end * p.bits);
    }
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
