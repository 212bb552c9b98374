// What the CPU attention kernels share: the register tile of their products, which keys a group of rows sees,
// and the online softmax of one tile of query rows.
//
// What a row sees is summed on a fixed grid of keys: masked keys add exact zeros and skipped ones nothing, so
// a row's bits depend on its own keys and data alone, not on its neighbours, tile or thread.
#pragma once

#include "attention/cells_cpu.h"
#include "core/exp.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int kGroup = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows: with two vectors each, the registers are full
constexpr int kMaxGroups = (kAttentionMaxRows + kGroup - 1) / kGroup;
constexpr int64_t kNoKey = -(int64_t(1) << 40);
constexpr float kLowest =
    -3.4028235e38f;  // a finite start of the running maximum, so that no inf - inf occurs
constexpr int kFew = kAttentionFewRows, kFewTile = kAttentionFewTile, kFewStride = kAttentionFewStride;
static_assert(kTile % kPanel == 0 && kFewTile % kPanel == 0 && kGroup <= kAttentionMaxGroup && kGroup <= W,
              "tiles are whole panels");
static_assert(kFewStride >= kFewTile + W, "a score may be written up to a vector late");

// to[r, c] = to[r, c] * keep[r] + sum over n of a[r * row + n * step] * b[n, c] for R rows and one panel of
// columns, n in [0, count) in order. keep == nullptr: 0. The strides `row` or `step` are often constants.
template <int R>
static ARIMG_INLINE void multiply_panel(const float* a, int64_t row, int64_t step, const float* b,
                                        int64_t b_stride, int64_t count, const float* keep, float* to,
                                        int64_t to_stride) {
  F32 left[R], right[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (keep == nullptr) {
      left[r] = right[r] = F32(0.f);
    } else {
      left[r] = F32::load(to + r * to_stride) * F32(keep[r]);
      right[r] = F32::load(to + r * to_stride + W) * F32(keep[r]);
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    F32 b0 = F32::load(b + n * b_stride), b1 = F32::load(b + n * b_stride + W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      F32 x(a[r * row + n * step]);
      left[r] = mul_add(x, b0, left[r]);
      right[r] = mul_add(x, b1, right[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    left[r].store(to + r * to_stride);
    right[r].store(to + r * to_stride + W);
  }
}

// Calls f with the constant `count`, 1..R: with_rows<R>(count, [&](auto rows) { ... rows.value ... }).
template <int N>
struct Rows {
  static constexpr int value = N;
};
template <int R, typename F>
static ARIMG_INLINE void with_rows(int64_t count, F&& f) {
  if (count == R)
    f(Rows<R>{});
  else if constexpr (R > 1)
    with_rows<R - 1>(count, f);
}

// ---------------------------------------------------------------------------------------------------------
// What rows see

struct Visible {
  const int32_t *row_start, *row_end;  // of query 0, or nullptr: all keys
  int64_t shift;                       // added to both
  int64_t keys, sinks;                 // sinks <= keys
  int64_t self;                        // the own key of query 0, or kNoKey

  ARIMG_INLINE int64_t start(int64_t row) const {
    int64_t n = row_start == nullptr ? 0 : row_start[row] + shift;
    return n < 0 ? 0 : n;
  }
  ARIMG_INLINE int64_t end(int64_t row) const {
    int64_t n = row_end == nullptr ? keys : row_end[row] + shift;
    return n > keys ? keys : n;
  }
};

static ARIMG_INLINE Visible visible_rows(const Attention& p, int64_t batch) {
  int64_t at = batch * p.interval_stride;
  return {p.row_start ? p.row_start + at : nullptr, p.row_end ? p.row_end + at : nullptr, 0, p.keys,
          p.sinks < p.keys ? p.sinks : p.keys,      p.self ? p.keys - p.queries : kNoKey};
}

// Over a group of rows: the hull of the intervals, [low, high), their intersection, [all_low, all_high), and
// the rows' own keys.
struct Span {
  int64_t low, high, all_low, all_high, self_low, self_high;
};

// `wrap`: row r has the interval of row r % wrap.
static Span span_of(const Visible& v, int64_t row, int64_t count, int64_t wrap) {
  Span s{v.keys, 0, 0, v.keys, v.keys, 0};
  for (int64_t r = row; r < row + count; ++r) {
    int64_t i = r < wrap ? r : r % wrap, start = v.start(i), end = v.end(i), self = v.self + i;
    if (self >= 0 && self < v.keys) {
      if (self < s.self_low) s.self_low = self;
      if (self + 1 > s.self_high) s.self_high = self + 1;
    }
    if (start >= end) {
      s.all_high = 0;
      continue;
    }
    if (start < s.low) s.low = start;
    if (end > s.high) s.high = end;
    if (start > s.all_low) s.all_low = start;
    if (end < s.all_high) s.all_high = end;
  }
  return s;
}

// The keys of [first, first + count) that some row of the group sees, relative to first, and as whole panels.
struct Part {
  int low, high, from, to;
  bool whole;  // every row sees every key of the panels

  ARIMG_INLINE Part(const Span& s, int64_t sinks, int64_t first, int64_t count) {
    int64_t least = count, most = 0;
    auto add = [&](int64_t a, int64_t b) {
      a = a > first ? a - first : 0;
      b = b - first < count ? b - first : count;
      if (a >= b) return;
      if (a < least) least = a;
      if (b > most) most = b;
    };
    add(s.low, s.high);
    add(0, sinks);
    add(s.self_low, s.self_high);
    low = int(least);
    high = int(most);
    from = low / kPanel * kPanel;
    to = (high + kPanel - 1) / kPanel * kPanel;
    whole = (s.all_low <= first + from && s.all_high >= first + to) || sinks >= first + to;
  }
  ARIMG_INLINE bool empty() const { return low >= high; }
};

// Keys that row i does not see get the score -inf; key n is first + n.
static ARIMG_INLINE void mask_row(float* scores, const Part& part, const Visible& v, int64_t i,
                                  int64_t first) {
  int64_t limit = v.keys - first;  // all that follows fits 32 bits
  auto relative = [&](int64_t n) {
    return I32(int32_t(n < first - 1 ? -1 : n - first < limit ? n - first : limit));
  };
  I32 start = relative(v.start(i)), end = relative(v.end(i)), sinks = relative(v.sinks),
      self = relative(v.self + i);
  for (int n = part.from; n < part.to; n += W) {
    I32 key = lane_index() + I32(n);
    Mask seen = ((key > start - I32(1)) & (key < end)) | (key < sinks) | (key == self);
    select(seen, F32::load(scores + n), F32(-__builtin_inff())).store(scores + n);
  }
}

// ---------------------------------------------------------------------------------------------------------
// The online softmax

// A tile of query rows, those from `offset` on of one head or of all heads that share a key head, one head
// after another (row r is query r % wrap), and the scratch it works in.
template <typename T>
struct Tile {
  Cells<T> k, v;
  Visible visible;
  int64_t rows, offset, wrap, dim, padded;
  bool far = false;  // keys and values are too large for the caches
  float* queries;    // [rows, padded], times scale
  float* sums;       // [rows, padded] running outputs
  float* highest;    // [rows + W] running maxima
  float* weight;     // [rows + W] running sums of the softmax
  float* keys;       // [tile / panel, dim, panel]
  float* values;     // [tile, padded]
  float* scores;     // [group, tile], or of few rows [few, few stride]

  Tile(const Cells<T>& k, const Cells<T>& v, const Visible& visible, int64_t rows, int64_t offset,
       int64_t wrap, int64_t dim, float* scratch)
      : k(k),
        v(v),
        visible(visible),
        rows(rows),
        offset(offset),
        wrap(wrap),
        dim(dim),
        padded((dim + kPanel - 1) / kPanel * kPanel) {
    queries = scratch;
    sums = queries + rows * padded;
    keys = sums + rows * padded;
    values = keys + kTile * padded;
    scores = values + kTile * padded;
    highest = scores + kAttentionScores;
    weight = highest + rows + W;
    for (int64_t i = 0; i < rows * padded; i += W) F32(0.f).store(sums + i);
    for (int64_t r = 0; r < rows + W; ++r) {
      highest[r] = kLowest;
      weight[r] = 0.f;
    }
  }
  // Goes on with the sums of another tile, over other keys.
  template <typename S>
  ARIMG_INLINE Tile(const Tile<S>& t, const Cells<T>& k, const Cells<T>& v, const Visible& visible)
      : k(k),
        v(v),
        visible(visible),
        rows(t.rows),
        offset(t.offset),
        wrap(t.wrap),
        dim(t.dim),
        padded(t.padded),
        queries(t.queries),
        sums(t.sums),
        highest(t.highest),
        weight(t.weight),
        keys(t.keys),
        values(t.values),
        scores(t.scores) {}
};

// Row r of the result: the sums divided by the weight.
template <typename T>
static ARIMG_INLINE float inverse_weight(const Tile<T>& t, int64_t r) {
  return t.weight[r] == 0.f ? 0.f : 1.f / t.weight[r];
}
template <typename T>
static ARIMG_INLINE float lse_of(const Tile<T>& t, int64_t r) {
  return t.weight[r] == 0.f ? -__builtin_inff() : t.highest[r] + __builtin_logf(t.weight[r]);
}

// Lane 0 and, for what does not depend on the order, all others: the reduction of the lanes, by halves.
template <int Half, typename Op, int... Lane>
static ARIMG_INLINE F32 fold_lanes(F32 x, Op op) {
  return op(x, F32(__builtin_shufflevector(x.v, x.v, (Lane ^ Half)...)));
}
template <int Half, typename Op>
static ARIMG_INLINE F32 fold(F32 x, Op op) {
  if constexpr (Half == 0)
    return x;
  else if constexpr (W == 16)
    return fold<Half / 2>(fold_lanes<Half, Op, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(x, op),
                          op);
  else if constexpr (W == 8)
    return fold<Half / 2>(fold_lanes<Half, Op, 0, 1, 2, 3, 4, 5, 6, 7>(x, op), op);
  else
    return fold<Half / 2>(fold_lanes<Half, Op, 0, 1, 2, 3>(x, op), op);
}

// Lane i: the reduction of the lanes of vector i, i < R, in one order whatever R is.
template <int R, typename Op>
static ARIMG_INLINE F32 reduce_rows(F32 (&rows)[W], Op op) {
  if constexpr (R > 2) {
    transpose(rows);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) rows[i] = op(rows[i], rows[i + half]);
    return rows[0];
  }
  F32 first = fold<W / 2>(rows[0], op);
  if constexpr (R == 1) return first;
  return select(lane_index() < I32(1), first, fold<W / 2>(rows[1], op));
}

// The scores of R rows, whole panels, become exp(score - highest); decay[r]: by how much older sums shrink.
// What a step costs per row besides the scores (maxima, exponentials, sums) is done for all rows at once.
template <int R, int stride>
static ARIMG_INLINE void softmax_rows(float* scores, int from, int to, float* highest, float* weight,
                                      float* decay) {
  F32 reduced[W];
  for (int r = 0; r < W; ++r) reduced[r] = F32(kLowest);
  for (int r = 0; r < R; ++r) {
    F32 top0(kLowest), top1(kLowest);
    for (int n = from; n < to; n += kPanel) {
      top0 = max(F32::load(scores + r * stride + n), top0);
      top1 = max(F32::load(scores + r * stride + n + W), top1);
    }
    reduced[r] = max(top0, top1);
  }
  F32 old = F32::load(highest),
      top = max(reduce_rows<R>(reduced, [](F32 a, F32 b) { return max(a, b); }), old);
  F32 shrink = exp_difference(old - top);
  float tops[W];
  top.store(tops);
  for (int r = 0; r < W; ++r) reduced[r] = F32(0.f);
  for (int r = 0; r < R; ++r) {
    F32 total0(0.f), total1(0.f), base(tops[r]);
    for (int n = from; n < to; n += kPanel) {
      float* at = scores + r * stride + n;
      F32 e0 = exp_difference(F32::load(at) - base), e1 = exp_difference(F32::load(at + W) - base);
      e0.store(at);
      e1.store(at + W);
      total0 = total0 + e0;
      total1 = total1 + e1;
    }
    reduced[r] = total0 + total1;
  }
  F32 total = mul_add(F32::load(weight), shrink, reduce_rows<R>(reduced, [](F32 a, F32 b) { return a + b; }));
  Mask mine = lane_index() < I32(R);  // the lanes beyond belong to rows of other groups
  select(mine, total, F32::load(weight)).store(weight);
  select(mine, top, old).store(highest);
  shrink.store(decay);
}

template <int stride, typename T>
static ARIMG_INLINE void mask_rows(const Tile<T>& t, int64_t row, int64_t count, const Part& part,
                                   int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    int64_t i = t.offset + row + r;
    mask_row(t.scores + r * stride, part, t.visible, i < t.wrap ? i : i % t.wrap, first);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
