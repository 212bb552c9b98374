// See accept_grouped_contract.h. A partition costs one pass over the groups' numbers; ranks cost two passes
// over p's weights, in which few tokens get beyond the first comparison.
#include "sampling/accept_grouped_contract.h"
#include "sampling/accept_masses_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

struct MassPair {
  uint64_t p, q;
};

static uint64_t sum_of(LongVec v) {
  uint64_t total = 0;
  for (int k = 0; k < W / 2; ++k) total += v[k];
  return total;
}

// Both halves of 64-bit lanes.
static ARIMG_INLINE LongVec all_masses(I32 weights, Scale s) {
  const LongVec w = (LongVec)weights.v;
  return masses(w, s) + masses(w >> 32, s);
}

static MassPair masses_of_part(const GroupMasses& g, const Spot& s) {
  const Scale p = scale_of(s.p_total), q = scale_of(s.q_total);
  const int32_t part = g.groups[s.draft];
  LongVec p_sum{}, q_sum{};
  int64_t i = 0;
  for (; i + W <= g.vocabulary; i += W) {
    const Mask same = I32::load(g.groups + i) == I32(part);
    if (!any(same)) continue;
    p_sum += all_masses(select(same, I32::load(s.p + i), I32(0)), p);
    if (s.q) q_sum += all_masses(select(same, I32::load(s.q + i), I32(0)), q);
  }
  MassPair m{sum_of(p_sum), s.q ? sum_of(q_sum) : whole_mass};
  for (; i < g.vocabulary; ++i) {
    if (g.groups[i] != part) continue;
    m.p += mass_of(s.p[i], p);
    if (s.q) m.q += mass_of(s.q[i], q);
  }
  return m;
}

// The nearest keys on one side of the draft's, nearest first.
struct Neighbours {
  TokenKey key[largest_half];
  int count = 0;

  template <typename Nearer>
  void add(TokenKey k, int most, const Nearer& nearer) {
    if (count == most && !nearer(k, key[most - 1])) return;
    int at = count < most ? count++ : most - 1;
    for (; at > 0 && nearer(k, key[at - 1]); --at) key[at] = key[at - 1];
    key[at] = k;
  }
};

// The smallest keys from `own` on, in the order of the index: of equal weights the first come first, so that
// once the list is full only smaller weights can enter.
static void look_up(const GroupMasses& g, const Spot& s, TokenKey own, Neighbours& found) {
  const auto nearer = [](TokenKey a, TokenKey b) { return a < b; };
  const int32_t least = weight_of(own);
  int32_t beyond = 0x7fffffff;
  const auto look = [&](int64_t i) {
    const TokenKey key = key_of(s.p[i], i);
    if (key < own) return;
    found.add(key, g.half, nearer);
    if (found.count == g.half) beyond = weight_of(found.key[g.half - 1]);
  };
  int64_t i = 0;
  for (; i + W <= g.vocabulary; i += W) {
    const I32 w = I32::load(s.p + i);
    for (uint32_t hits = lane_bits((w > I32(least - 1)) & (w < I32(beyond))); hits; hits &= hits - 1)
      look(i + __builtin_ctz(hits));
  }
  for (; i < g.vocabulary; ++i) look(i);
}

// The largest keys below `own`, in the opposite order.
static void look_down(const GroupMasses& g, const Spot& s, TokenKey own, Neighbours& found) {
  const auto nearer = [](TokenKey a, TokenKey b) { return a > b; };
  const int32_t most = weight_of(own);
  int32_t beyond = -1;
  const auto look = [&](int64_t i) {
    const TokenKey key = key_of(s.p[i], i);
    if (key >= own) return;
    found.add(key, g.half, nearer);
    if (found.count == g.half) beyond = weight_of(found.key[g.half - 1]);
  };
  int64_t i = g.vocabulary;
  for (; i % W != 0; --i) look(i - 1);
  for (; i > 0; i -= W) {
    const I32 w = I32::load(s.p + i - W);
    for (uint32_t hits = lane_bits((w > I32(beyond)) & (w < I32(most + 1))); hits;) {
      const int lane = 31 - __builtin_clz(hits);
      hits ^= 1u << lane;
      look(i - W + lane);
    }
  }
}

static bool within_distance(const GroupMasses& g, int64_t a, int64_t b) {
  if (!g.embedding || a == b) return true;
  double sums[distance_lanes];
  with_dtype(g.dtype, [&](auto t) {
    for (int k = 0; k < distance_lanes; ++k) sums[k] = distance_lane<decltype(t)>(g, a, b, k);
  });
  for (int half = distance_lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0] <= g.max_distance;
}

static MassPair masses_of_ranks(const GroupMasses& g, const Spot& s) {
  const Scale p = scale_of(s.p_total), q = scale_of(s.q_total);
  const TokenKey own = key_of(s.p[s.draft], s.draft);
  const uint64_t own_mass = mass_of(s.p[s.draft], p);
  Neighbours sides[2];
  look_up(g, s, own, sides[0]);
  look_down(g, s, own, sides[1]);
  MassPair m{0, 0};
  for (const Neighbours& side : sides)
    for (int k = 0; k < side.count; ++k) {
      const int64_t token = token_of(side.key[k]);
      const uint64_t mass = mass_of(weight_of(side.key[k]), p);
      if (!within_limit(mass, own_mass, g.limit) || !within_distance(g, s.draft, token)) continue;
      m.p += mass;
      m.q += q_mass_of(s, q, token);
    }
  return m;
}

void group_masses(const GroupMasses& g, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Spot s = spot_of(g, item / g.drafts, item % g.drafts);
    const MassPair m = s.draft < 0 ? MassPair{0, 0} : g.groups ? masses_of_part(g, s) : masses_of_ranks(g, s);
    g.p_mass[item] = int64_t(m.p);
    g.q_mass[item] = int64_t(m.q);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
