// See contract.h. A row is transformed once into a buffer that stays in the cache; thresholds are found by
// counting, a vector at a time, on lists that shrink with the bracket.
#include "core/math.h"
#include "core/philox.h"
#include "core/simd.h"
#include "sampling/contract.h"

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
static float weightless(float top) {
  float lo = top - 45.f;
  return lo < top ? lo : from_key(key(top) - 1);
}

// --- filters, in their order
// ---------------------------------------------------------------------------------

// Drops what is below the k-th largest x, and everything without a weight.
static void filter_top_k(List& row, const List& spare, int32_t* index, int64_t k, float top) {
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

static uint64_t weigh(const List& row, float top) {
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
static void filter_top_p(const List& row, const List& spare, uint64_t total, double dropped, float top) {
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

static void filter_min_p(const List& row, int32_t least) {
  for (int64_t i = 0; i < row.count; i += W) {
    I32 w = I32::load(row.weight + i);
    select(w < I32(least), I32(0), w).store(row.weight + i);
  }
}

// --- the draw
// ------------------------------------------------------------------------------------------------

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

static int64_t first_at(const List& row, float top) {
  for (int64_t i = 0;; i += W) {
    uint32_t lanes = lane_bits(F32::load(row.x + i) == F32(top));
    if (lanes) return i + __builtin_ctz(lanes);
  }
}

template <bool guided, typename T>
static int64_t sample_row(const Sample& p, int64_t r, List row, const List& spare, int32_t* index) {
  const int64_t entry = r / p.rows_per_seed;
  const float s = guided && p.guidances ? p.guidances[entry] : p.guidance;
  const Transform f{F32(s), F32(1.f - s), F32(p.temperature), guided, p.temperature != 1.f};
  const T* cond = (const T*)p.logits + r * p.row_stride;
  const T* uncond = cond + p.rows * p.row_stride;
  const float top = fill<guided>(f, cond, uncond, row);
  if (top == -infinity) return 0;
  if (p.top_k == 1) return first_at(row, top);

  if (p.top_k > 0 && p.top_k < row.count) filter_top_k(row, spare, index, p.top_k, top);
  pad(row);
  const uint64_t total = weigh(row, top);
  pad(row);
  if (p.dropped > 0) filter_top_p(row, spare, total, p.dropped, top);
  if (p.min_weight > 0) filter_min_p(row, p.min_weight);
  const uint64_t seed = p.seeds ? uint64_t(p.seeds[entry]) : p.first_seed + uint64_t(entry);
  const uint64_t position = p.position + uint64_t(r % p.rows_per_seed) + (p.offset ? uint64_t(*p.offset) : 0);
  const int64_t i = draw(row, seed, position);
  return row.index ? row.index[i] : i;
}

void sample(const Sample& p, int64_t begin, int64_t end, void* workspace) {
  const int64_t length = p.vocabulary + workspace_slack;
  float* floats = (float*)workspace;
  int32_t* ints = (int32_t*)(floats + 2 * length);
  const List row{floats, ints, nullptr, p.vocabulary};
  const List spare{floats + length, ints + length, nullptr, 0};
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r)
      p.out[r] = p.guided ? sample_row<true, T>(p, r, row, spare, ints + 2 * length)
                          : sample_row<false, T>(p, r, row, spare, ints + 2 * length);
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
