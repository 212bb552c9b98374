// See accept_contract.h. The tests of a row are read once; then a token is a copy, or one pass over its law.
#include "core/math.h"
#include "sampling/accept_masses_cpu.h"
#include "sampling/numbers_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

// --- what a token is drawn from: pairs(i) are the masses of weights i .. i + W - 1, added in pairs ---------

struct Weights {
  const int32_t* p;
  ARIMG_INLINE LongVec pairs(int64_t i) const {
    LongVec w = (LongVec)I32::load(p + i).v;
    return (w & 0xffffffffu) + (w >> 32);
  }
  ARIMG_INLINE uint64_t one(int64_t i) const { return uint32_t(p[i]); }
};

struct Residual {
  const int32_t* p;
  const int32_t* q;
  Scale p_scale, q_scale;
  ARIMG_INLINE LongVec pairs(int64_t i) const {
    LongVec a = (LongVec)I32::load(p + i).v, b = (LongVec)I32::load(q + i).v;
    SignedVec even = (SignedVec)(masses(a, p_scale) - masses(b, q_scale));
    SignedVec odd = (SignedVec)(masses(a >> 32, p_scale) - masses(b >> 32, q_scale));
    return (LongVec)((even & (even > 0)) + (odd & (odd > 0)));
  }
  ARIMG_INLINE uint64_t one(int64_t i) const {
    uint64_t a = mass_of(p[i], p_scale), b = mass_of(q[i], q_scale);
    return a > b ? a - b : 0;
  }
};

template <typename M>
static uint64_t sum(const M& m, int64_t begin, int64_t end) {
  LongVec acc{};
  int64_t i = begin;
  for (; i + W <= end; i += W) acc += m.pairs(i);
  uint64_t total = 0;
  for (int k = 0; k < W / 2; ++k) total += acc[k];
  for (; i < end; ++i) total += m.one(i);
  return total;
}

// The first entry other than `without` at which the running sum exceeds draw_below(sum); -1: no mass at all.
template <typename M>
static int64_t draw(const M& m, int64_t count, int64_t without, const Spot& s, uint32_t number) {
  constexpr int blocks = 64;
  uint64_t sums[blocks];
  const int64_t length = (count / blocks / W + 1) * W;
  const int64_t left_out = without < 0 ? -1 : without / length;
  uint64_t total = 0;
  for (int64_t b = 0; b * length < count; ++b) {
    int64_t end = (b + 1) * length < count ? (b + 1) * length : count;
    sums[b] = sum(m, b * length, end);
    if (b == left_out) sums[b] -= m.one(without);
    total += sums[b];
  }
  if (total == 0) return -1;
  uint64_t target = draw_below(total, s.seed, s.position, number);
  int64_t b = 0;
  for (; target >= sums[b]; ++b) target -= sums[b];
  for (int64_t i = b * length;; ++i) {
    uint64_t mass = i == without ? 0 : m.one(i);
    if (target < mass) return i;
    target -= mass;
  }
}

static int64_t draw_from_p(const Spot& s, int64_t count, int64_t without, uint32_t number) {
  int64_t token = draw(Weights{s.p}, count, without, s, number);
  return token < 0 ? 0 : token;
}

static int64_t draw_from_residual(const Spot& s, int64_t count, uint32_t number) {
  if (s.q) {
    int64_t token = draw(Residual{s.p, s.q, scale_of(s.p_total), scale_of(s.q_total)}, count, -1, s, number);
    if (token >= 0) return token;
  }
  return draw_from_p(s, count, s.q ? -1 : s.draft, number);
}

// The token with the smallest exponential(its number) / weight; of equals the first.
static int64_t choose(const Spot& s, int64_t count) {
  constexpr int run = 64;
  const float infinity = __builtin_inff();
  F32 best(infinity);
  I32 where(0), token = lane_index();
  for (int64_t i = 0; i < count; i += run) {
    int32_t numbers[run], last[run] = {};
    const int32_t* weights = s.p + i;
    if (count - i < run) {
      __builtin_memcpy(last, weights, size_t(count - i) * sizeof(int32_t));
      weights = last;
    }
    philox_run(s.seed, s.position, 0, i, numbers);
    for (int k = 0; k < run; k += W) {
      const I32 weight = I32::load(weights + k);
      const F32 time = exponential(I32::load(numbers + k)) / to_float(weight);
      const Mask sooner = (weight > I32(0)) & (time < best);
      best = select(sooner, time, best);
      where = select(sooner, token, where);
      token = token + I32(W);
    }
  }
  int found = 0;
  for (int lane = 1; lane < W; ++lane)
    if (best[lane] < best[found] || (best[lane] == best[found] && where[lane] < where[found])) found = lane;
  return where[found];
}

static int64_t tail(const Accept& a, const Spot& s) {
  switch (a.tail) {
    case Tail::redraw:
      return draw_from_p(s, a.vocabulary, -1, 0);
    case Tail::couple: {
      if (s.draft < 0) return draw_from_p(s, a.vocabulary, -1, 0);
      const uint32_t number = coupled_draw(a);
      return accepts(s, number) ? s.draft : draw_from_residual(s, a.vocabulary, number + 1);
    }
    case Tail::gumbel:
      return choose(s, a.vocabulary);
    default:
      return -1;
  }
}

void accept(const Accept& a, int64_t begin, int64_t end) {
  const int64_t tokens = a.drafts + 1;
  int64_t row = -1, accepted = 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t r = item / tokens, j = item % tokens;
    if (r != row) {
      row = r;
      for (accepted = 0; accepted < a.drafts && accepts_draft(a, r, accepted);) ++accepted;
    }
    if (j == 0) a.length[r] = accepted + 1;
    const Spot s = spot_of(a, r, j);
    a.tokens[item] = j < accepted    ? s.draft
                     : j > accepted  ? tail(a, s)
                     : j == a.drafts ? draw_from_p(s, a.vocabulary, -1, 0)
                                     : draw_from_residual(s, a.vocabulary, 2);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
