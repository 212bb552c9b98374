// See contract.h; the row itself is prepared by row_cpu.h.
#include "sampling/contract.h"
#include "sampling/numbers_cpu.h"
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

// The entry with the smallest exponential(number of its token) / weight. `numbers` has room for the tokens'
// words.
static int64_t choose(const List& row, int64_t vocabulary, uint64_t seed, uint64_t position,
                      int32_t* numbers) {
  philox_numbers(seed, position, 0, vocabulary, numbers);
  F32 best(infinity);
  I32 where(0), entry = lane_index();
  for (int64_t i = 0; i < row.count; i += W) {
    I32 word;
    if (row.index) {
      for (int lane = 0; lane < W && i + lane < row.count; ++lane)
        word.v[lane] = numbers[row.index[i + lane]];
    } else {
      word = I32::load(numbers + i);
    }
    const I32 weight = I32::load(row.weight + i);
    const F32 time = select(weight > I32(0), exponential(word) / to_float(weight), F32(infinity));
    const Mask sooner = time < best;
    best = select(sooner, time, best);
    where = select(sooner, entry, where);
    entry = entry + I32(W);
  }
  int found = 0;
  for (int lane = 1; lane < W; ++lane)
    if (best[lane] < best[found] || (best[lane] == best[found] && where[lane] < where[found])) found = lane;
  return where[found];
}

static int64_t weight_of(const List& list, int64_t token) {
  if (!list.index) return token < list.count ? list.weight[token] : 0;
  for (int64_t i = 0; i < list.count; ++i)
    if (list.index[i] == token) return list.weight[i];
  return 0;
}

// See `facts` of the contract. The rounded products make a sum without an order.
static void write_facts(const Prepared& row, int64_t token, int64_t* facts) {
  const List& list = row.list;
  WideSum total, spread;
  for (int64_t i = 0; i < list.count; i += W) {
    const F32 x = F32::load(list.x + i);
    const I32 weight = I32::load(list.weight + i);
    total.add(weight);
    const F32 below = select(weight > I32(0), F32(row.top) - x, F32(0.f));
    spread.add(round_to_int(select(x == F32(row.top), F32(0.f), to_float(weight) * below)));
  }
  facts[0] = weight_of(list, token);
  facts[1] = int64_t(total.total());
  facts[2] = int64_t(spread.total());
}

template <typename T>
static int64_t sample_row(const Sample& p, int64_t r, const Workspace& w) {
  const int64_t forced = p.forced ? p.forced[r] : -1;
  if (forced >= 0 && !p.facts) return forced;
  const Prepared row = prepare<T>(p, r, w);
  const List& list = row.list;
  const uint64_t seed = seed_of(p, r / p.tokens), position = position_of(p, r % p.tokens);
  const int64_t entry = list.count == 1 ? 0
                        : p.gumbel      ? choose(list, p.vocabulary, seed, position, w.spare.weight)
                                        : draw(list, seed, position);
  const int64_t token = forced >= 0 ? forced : token_at(list, entry);
  if (p.facts) write_facts(row, token, p.facts + 3 * r);
  return token;
}

void sample(const Sample& p, int64_t begin, int64_t end, void* workspace) {
  const Workspace w = carve(workspace, p.vocabulary);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) p.out[r] = sample_row<T>(p, r, w);
  });
}

// Of W neighbouring positions from one whose low word does not wrap before the last.
static ARIMG_INLINE F32 uniforms(uint64_t seed, uint64_t position, uint32_t draw) {
  I32 c[4] = {I32((IntVec)((UintVec)lane_index().v + uint32_t(position))), I32(int32_t(position >> 32)),
              I32(int32_t(draw)), I32(0)};
  philox_rounds(c, seed);
  const F32 u = (to_float((c[0] >> 8) & I32(0xffffff)) + F32(0.5f)) * F32(0x1p-24f);
  return min(u, F32(1.f - 0x1p-24f));
}

void philox_uniform(const PhiloxUniform& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const uint64_t seed = uint64_t(p.seeds[r]);
    float* out = p.out + r * p.columns;
    for (int64_t j = 0; j < p.columns;) {
      const uint64_t position = p.position + uint64_t(j);
      if (p.columns - j >= W && uint32_t(position) <= ~uint32_t(0) - (W - 1)) {
        uniforms(seed, position, p.draw).store(out + j);
        j += W;
      } else {
        out[j++] = arimg::philox_uniform(seed, position, p.draw);
      }
    }
  }
}

void exp_weights(const float* d, int32_t* weights, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) exp_weight(F32::load(d + i)).store(weights + i);
  for (; i < count; ++i) weights[i] = exp_weight(d[i]);
}

void exponentials(const int32_t* words, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) exponential(I32::load(words + i)).store(out + i);
  for (; i < count; ++i) out[i] = exponential(words[i]);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
