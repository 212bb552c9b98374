// From logits to kept integer weights, one row at a time (contract.h), for *_cpu.cpp files: what `sample` and
// the acceptance of drafts share. A row is transformed once into a buffer that stays in the cache; thresholds
// are found by counting, a vector at a time, on lists that shrink with the bracket.
#pragma once

#include "core/math.h"
#include "core/simd.h"
#include "sampling/row.h"

namespace arimg {
namespace ARIMG_SIMD {

static constexpr float infinity = __builtin_inff();

// A row, or what is left of it. Arrays are padded by two vectors of x = -inf, weight 0.
struct List {
  float* x;
  int32_t* weight;
  int32_t* index;  // nullptr: entry i is token i
  int64_t count;
};

static ARIMG_INLINE void pad(const List& list) {
  for (int i = 0; i < 2; ++i) {
    F32(-infinity).store(list.x + list.count + i * W);
    I32(0).store(list.weight + list.count + i * W);
  }
}

// --- logits -> x -----------------------------------------------------------------------------------------

struct Transform {
  F32 s, t, temperature;
  bool guided, tempered;

  ARIMG_INLINE F32 operator()(F32 cond, F32 uncond) const {
    F32 x = guided ? fma(s, cond, t * uncond) : cond;
    if (tempered) x = x / temperature;
    x = x + F32(0.f);                          // -0 -> +0
    return select(x == x, x, F32(-infinity));  // NaN
  }
};

// Gives the largest x.
template <bool guided, typename T>
static float fill(const Transform& f, const T* cond, const T* uncond, const List& row) {
  F32 top(-infinity);
  int64_t i = 0;
  for (; i + W <= row.count; i += W) {
    F32 c = F32::load(cond + i);
    F32 x = f(c, guided ? F32::load(uncond + i) : c);
    x.store(row.x + i);
    top = max(top, x);
  }
  if (i < row.count) {
    int n = int(row.count - i);
    F32 c = F32::load_partial(cond + i, n);
    F32 x = f(c, guided ? F32::load_partial(uncond + i, n) : c);
    x = select(lane_index() < I32(n), float_from_bits(bits(x)), F32(-infinity));
    x.store(row.x + i);
    top = max(top, x);
  }
  pad(row);
  return reduce_max(top);
}

// --- processors, in place on a row (contract.h) ------------------------------------------------------------

// f(x, i) for the vectors of a row: tokens [i, i + W), of which those from row.count on do not matter.
template <typename F>
static ARIMG_INLINE void for_each(const List& row, F&& f) {
  for (int64_t i = 0; i < row.count; i += W) f(F32::load(row.x + i), i).store(row.x + i);
}

// The floats of tokens [i, i + W); reads nothing from `count` on.
static ARIMG_INLINE F32 floats_at(const float* p, int64_t i, int64_t count) {
  return i + W <= count ? F32::load(p + i) : F32::load_partial(p + i, int(count - i));
}

// Which of the tokens [i, i + W) are members.
static ARIMG_INLINE Mask members_at(const uint8_t* set, bool bits, int64_t i, int64_t count) {
  if (!bits) {
    const bool whole = i + W <= count;
    return (whole ? I32::load_bytes(set + i) : I32::load_bytes(set + i, int(count - i))) != I32(0);
  }
  int32_t word = set[i / 8];
  if (W > 8 && i + 8 < count) word |= set[i / 8 + 1] << 8;
  const I32 bit = lane_bit() << int(i % 8);
  return (I32(word) & bit) == bit;
}

// Gives the largest x.
static inline float process(const Rows& p, int64_t r, float temperature, const List& row) {
  const Processors& q = p.processors;
  if (auto* seen = row_at<uint8_t>(q.seen.plane, p, r)) {
    const F32 penalty(q.penalty);
    for_each(row, [&](F32 x, int64_t i) {
      F32 less = select(x < F32(0.f), x * penalty, x / penalty);
      return select(members_at(seen, q.seen.bits, i, row.count), less, x);
    });
  }
  if (auto* factor = row_at<float>(q.factor, p, r)) {
    for_each(row, [&](F32 x, int64_t i) {
      F32 by = floats_at(factor, i, row.count);
      return q.multiply_negative ? x * by : select(x < F32(0.f), x / by, x * by);
    });
  }
  if (auto* bias = row_at<float>(q.bias, p, r))
    for_each(row, [&](F32 x, int64_t i) { return x + floats_at(bias, i, row.count); });
  if (auto* allowed = row_at<uint8_t>(q.allowed.plane, p, r)) {
    for_each(row, [&](F32 x, int64_t i) {
      return select(members_at(allowed, q.allowed.bits, i, row.count), x, F32(-infinity));
    });
  }
  const Transform finish{F32(1.f), F32(0.f), F32(temperature), false, temperature != 1.f};
  return fill<false>(finish, row.x, row.x, row);
}

// --- thresholds --------------------------------------------------------------------------------------------

struct Tally {
  uint64_t mass;  // the sum of weights, or the number of entries
  int64_t count;
};

// Of the entries with x > t.
template <bool weighted>
static Tally above(const List& list, float t) {
  const F32 bound(t);
  I32 first(0), second(0);
  WideSum sum;
  for (int64_t i = 0; i < list.count; i += 2 * W) {
    I32 a((F32::load(list.x + i) > bound).m), b((F32::load(list.x + i + W) > bound).m);
    first = first - a;
    second = second - b;
    if (weighted) {
      sum.add(a & I32::load(list.weight + i));
      sum.add(b & I32::load(list.weight + i + W));
    }
  }
  int64_t count = reduce_add(first + second);
  return {weighted ? sum.total() : uint64_t(count), count};
}

// The entries with lo < x <= hi, in order, to `to` (which may be the list itself).
template <bool weighted>
static void keep_between(List& list, float lo, float hi, const List& to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < list.count; i += W) {
    F32 x = F32::load(list.x + i);
    Compress c((x > F32(lo)) & (x <= F32(hi)));
    I32 w = weighted ? I32::load(list.weight + i) : I32(0);
    c(x).store(to.x + kept);
    if (weighted) c(w).store(to.weight + kept);
    kept += c.count;
  }
  list = {to.x, to.weight, nullptr, kept};
  pad(list);
}

// Integers in the order of the floats, without NaN.
static ARIMG_INLINE int32_t key(float x) {
  int32_t b = int32_t(float_bits(x));
  return b ^ ((b >> 31) & 0x7fffffff);
}
static ARIMG_INLINE float from_key(int32_t k) {
  return bits_float(uint32_t(k ^ ((k >> 31) & 0x7fffffff)));
}

struct Cut {
  float x;         // the smallest entry with mass(> x) < budget
  uint64_t above;  // that mass
};

// For at most a few dozen entries: from the largest down, one value at a time.
template <bool weighted>
static Cut walk_down(const List& list, uint64_t budget, uint64_t passed) {
  float x = __builtin_nanf("");  // the value before; nothing is >= NaN
  for (;;) {
    float next = -infinity;
    uint64_t mass = 0;
    for (int64_t i = 0; i < list.count; ++i) {
      if (list.x[i] >= x || list.x[i] < next) continue;
      if (list.x[i] > next) mass = 0;
      next = list.x[i];
      mass += weighted ? uint32_t(list.weight[i]) : 1;
    }
    if (passed + mass >= budget) return {next, passed};
    passed += mass;
    x = next;
  }
}

// Needs lo < hi, mass(> lo) = at_lo.mass >= budget, and nothing above hi. Narrows (lo, hi] by halving and by
// interpolation in turn; halving the integers behind the floats bounds the number of steps for any data.
template <bool weighted>
static Cut find_cut(List list, const List& spare, uint64_t budget, float lo, Tally at_lo, float hi) {
  constexpr int64_t few = 24;
  Tally at_hi{0, 0}, outside{0, 0};  // outside: above the entries still listed
  for (int step = 0; at_lo.count - at_hi.count > few; ++step) {
    float mid;
    if (step < 12) {
      float part = float(at_lo.mass - budget) / float(at_lo.mass - at_hi.mass);
      part = part < 0.02f ? 0.02f : part > 0.98f ? 0.98f : part;
      mid = lo + (hi - lo) * (step % 2 ? part : 0.5f);
    } else {
      mid = from_key(int32_t((int64_t(key(lo)) + key(hi)) >> 1));
    }
    mid = mid + 0.f;  // never -0, whose neighbour below is another 0
    if (!(mid > lo && mid < hi)) {
      if (step >= 12) return {hi, at_hi.mass};  // no float lies between: one value is left
      continue;
    }
    Tally at_mid = above<weighted>(list, mid);
    at_mid = {at_mid.mass + outside.mass, at_mid.count + outside.count};
    if (at_mid.mass >= budget) {
      lo = mid;
      at_lo = at_mid;
    } else {
      hi = mid;
      at_hi = at_mid;
    }
    if ((at_lo.count - at_hi.count) * 4 <= list.count) {
      keep_between<weighted>(list, lo, hi, spare);
      outside = at_hi;
    }
  }
  keep_between<weighted>(list, lo, hi, spare);
  return walk_down<weighted>(list, budget, at_hi.mass);
}

// Nothing at or below it has a weight. Below `top` even where floats are coarser than the step.
static inline float weightless(float top) {
  float lo = top - 45.f;
  return lo < top ? lo : from_key(key(top) - 1);
}

// --- filters, in their order -------------------------------------------------------------------------------

// Drops what is below the k-th largest x, and everything without a weight.
static inline void filter_top_k(List& row, const List& spare, int32_t* index, int64_t k, float top) {
  float lo = weightless(top), least = lo;
  Tally at_lo = above<false>(row, lo);
  if (at_lo.count > k) least = find_cut<false>(row, spare, uint64_t(k), lo, at_lo, top).x;
  int64_t kept = 0;
  I32 token = lane_index();
  for (int64_t i = 0; i < row.count; i += W) {
    F32 x = F32::load(row.x + i);
    Compress c(x >= F32(least));
    c(x).store(row.x + kept);
    c(token).store(index + kept);
    kept += c.count;
    token = token + I32(W);
  }
  row = {row.x, row.weight, index, kept};
}

static inline uint64_t weigh(const List& row, float top) {
  WideSum sum;
  for (int64_t i = 0; i < row.count; i += W) {
    F32 x = F32::load(row.x + i);
    I32 w = select(x == F32(top), I32(weight_one), exp_weight(x - F32(top)));
    w.store(row.weight + i);
    sum.add(w);
  }
  return sum.total();
}

// The weights of dropped entries become 0.
static inline void filter_top_p(const List& row, const List& spare, uint64_t total, double dropped,
                                float top) {
  uint64_t limit = uint64_t(dropped * double(total));
  uint64_t budget = limit < total ? total - limit : 1;
  float lo = weightless(top);
  Tally at_lo{total, row.count};
  Cut cut = find_cut<true>(row, spare, budget, lo, at_lo, top);
  uint64_t left = budget - cut.above;  // for the entries at the cut: kept while the sum before is below
  for (int64_t i = 0; i < row.count; i += W) {
    F32 x = F32::load(row.x + i);
    I32 w = I32::load(row.weight + i);
    Mask at = x == F32(cut.x);
    I32 kept = w & I32((x >= F32(cut.x)).m);
    kept.store(row.weight + i);
    if (!any(at)) continue;
    for (uint32_t lanes = lane_bits(at); lanes; lanes &= lanes - 1) {
      int32_t& weight = row.weight[i + __builtin_ctz(lanes)];
      uint64_t taken = uint32_t(weight);
      if (left == 0) weight = 0;
      left = left > taken ? left - taken : 0;
    }
  }
}

static inline void filter_min_p(const List& row, int32_t least) {
  for (int64_t i = 0; i < row.count; i += W) {
    I32 w = I32::load(row.weight + i);
    select(w < I32(least), I32(0), w).store(row.weight + i);
  }
}

static inline int64_t first_at(const List& row, float top) {
  for (int64_t i = 0;; i += W) {
    uint32_t lanes = lane_bits(F32::load(row.x + i) == F32(top));
    if (lanes) return i + __builtin_ctz(lanes);
  }
}

// --- a whole row -------------------------------------------------------------------------------

struct Workspace {
  List row, spare;
  int32_t* index;
};

// `memory`: row_workspace(vocabulary) bytes.
static inline Workspace carve(void* memory, int64_t vocabulary) {
  const int64_t length = vocabulary + workspace_slack;
  float* floats = (float*)memory;
  int32_t* ints = (int32_t*)(floats + 2 * length);
  return {
      {floats, ints, nullptr, vocabulary}, {floats + length, ints + length, nullptr, 0}, ints + 2 * length};
}

// The row that is token i alone.
static inline List only(const Workspace& w, int64_t i) {
  List row{w.row.x, w.row.weight, w.index, 1};
  row.x[0] = row.x[i];
  row.weight[0] = weight_one;
  row.index[0] = int32_t(i);
  pad(row);
  return row;
}

static ARIMG_INLINE int64_t token_at(const List& row, int64_t i) {
  return row.index ? row.index[i] : i;
}

// The weights of row r after the filters, 0 for what was dropped: a list in the order of the tokens, never
// empty, whose largest x is `top`. It lives in the workspace, whose `spare` is free again.
struct Prepared {
  List list;
  float top;
};

// The x of row r into `row`; gives the largest.
template <typename T>
static float transform_row(const Rows& p, int64_t r, const Settings& set, const List& row) {
  const bool tempered = set.temperature != 1.f && !p.processed;
  const Transform f{F32(set.s), F32(set.t), F32(set.temperature), p.guided, tempered};
  const T* cond = (const T*)p.logits + r * p.row_stride;
  const T* uncond = cond + p.rows * p.row_stride;
  const float top = p.guided ? fill<true>(f, cond, uncond, row) : fill<false>(f, cond, cond, row);
  return p.processed ? process(p, r, set.temperature, row) : top;
}

template <typename T>
static Prepared prepare(const Rows& p, int64_t r, const Workspace& w) {
  const Settings set = settings_of(p, r / p.tokens);
  List row = w.row;
  const float top = transform_row<T>(p, r, set, row);
  if (top == -infinity) return {only(w, 0), top};
  if (set.top_k == 1) return {only(w, first_at(row, top)), top};

  if (set.top_k > 0 && set.top_k < row.count) filter_top_k(row, w.spare, w.index, set.top_k, top);
  pad(row);
  const uint64_t total = weigh(row, top);
  pad(row);
  if (set.dropped > 0) filter_top_p(row, w.spare, total, set.dropped, top);
  if (set.min_weight > 0) filter_min_p(row, set.min_weight);
  return {row, top};
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
