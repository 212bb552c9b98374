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
constexpr int kFew = 4;  // rows of a tile up to which keys and values are read as they lie
constexpr int kMaxGroups = (kAttentionMaxRows + kGroup - 1) / kGroup;
constexpr int64_t kNoKey = -(int64_t(1) << 40);
constexpr float kLowest =
    -3.4028235e38f;  // a finite start of the running maximum, so that no inf - inf occurs
static_assert(kTile % kPanel == 0 && kGroup <= kAttentionMaxGroup && kGroup <= W, "tiles are whole panels");

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
  float* scores;     // [group, tile]

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
    highest = scores + kGroup * kTile;
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

// sums[i] += the products with channels [d, d + V * W) of key i, key after key as they lie in memory.
template <int V, typename T>
static ARIMG_INLINE void score_channels(const float* query, const T* const (&row)[W], int64_t d,
                                        F32 (&sums)[W]) {
  F32 q[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) q[j] = F32::load(query + d + j * W);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i] = mul_add(q[j], load_stored(row[i] + d + j * W), sums[i]);
}

// Lane i becomes the sum of the lanes of vector i: half the shuffles of a transposition.
template <int Distance>
static ARIMG_INLINE F32 sum_lanes(F32 (&rows)[W], int i) {
  if constexpr (Distance == 0) {
    return rows[i];
  } else {
    F32 a = sum_lanes<Distance / 2>(rows, i), b = sum_lanes<Distance / 2>(rows, i + Distance);
    if constexpr (W == 16)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
    else if constexpr (W == 8)
      exchange<Distance, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
    else
      exchange<Distance, 0, 1, 2, 3>(a, b);
    return a + b;
  }
}

// Scores of one row from keys as they lie, W keys at once. row: the addresses of W keys.
template <typename T>
static ARIMG_INLINE void score_in_place(const float* query, const T* const (&row)[W], int64_t dim,
                                        float* scores) {
  F32 sums[W];
  for (int i = 0; i < W; ++i) sums[i] = F32(0.f);
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) score_channels<4>(query, row, d, sums);
  if (d + 2 * W <= dim) score_channels<2>(query, row, d, sums), d += 2 * W;
  if (d + W <= dim) score_channels<1>(query, row, d, sums);
  sum_lanes<W / 2>(sums, 0).store(scores);
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
  float lanes[2 * W], out[W] = {};
  for (int r = 0; r < R; ++r) {
    F32 x = rows[r];
    for (int half = W / 2; half > 0; half /= 2) {
      x.store(lanes);
      x = op(x, F32::load(lanes + half));  // the upper half is of no meaning
    }
    out[r] = x[0];
  }
  return F32::load(out);
}

// The scores of R rows, whole panels, become exp(score - highest); decay[r]: by how much older sums shrink.
// What a step costs per row besides the scores (maxima, exponentials, sums) is done for all rows at once.
template <int R>
static ARIMG_INLINE void softmax_rows(float* scores, int from, int to, float* highest, float* weight,
                                      float* decay) {
  F32 reduced[W];
  for (int r = 0; r < W; ++r) reduced[r] = F32(kLowest);
  for (int r = 0; r < R; ++r) {
    F32 top0(kLowest), top1(kLowest);
    for (int n = from; n < to; n += kPanel) {
      top0 = max(F32::load(scores + r * kTile + n), top0);
      top1 = max(F32::load(scores + r * kTile + n + W), top1);
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
      float* at = scores + r * kTile + n;
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

template <typename T>
static ARIMG_INLINE void mask_rows(const Tile<T>& t, int64_t row, int64_t count, const Part& part,
                                   int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    int64_t i = t.offset + row + r;
    mask_row(t.scores + r * kTile, part, t.visible, i < t.wrap ? i : i % t.wrap, first);
  }
}

// Rows [row, row + R) against the transposed keys of one tile.
template <int R, typename T>
static __attribute__((noinline)) void attend(const Tile<T>& t, int64_t row, const Part& part, int64_t first,
                                             const float* values) {
  for (int n = part.from; n < part.to; n += kPanel)
    multiply_panel<R>(t.queries + row * t.padded, t.padded, 1, t.keys + n * t.dim, kPanel, t.dim, nullptr,
                      t.scores + n, kTile);
  if (!part.whole) mask_rows(t, row, R, part, first);
  float decay[W];
  softmax_rows<R>(t.scores, part.from, part.to, t.highest + row, t.weight + row, decay);
  for (int64_t d = 0; d < t.dim; d += kPanel)
    multiply_panel<R>(t.scores + part.low, kTile, 1, values + part.low * t.padded + d, t.padded,
                      part.high - part.low, decay, t.sums + row * t.padded + d, t.padded);
}

// Channels [d, d + V * W) of the sums of R rows, from values as they lie; meanwhile the keys of the next tile
// are asked for, if they come from far.
template <int R, int V, typename T>
static ARIMG_INLINE void values_in_place(const Tile<T>& t, const Part& part, int64_t first,
                                         const T* const* values, const float* decay, int64_t d) {
  F32 sum[R][V];
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[r][i] = F32::load(t.sums + r * t.padded + d + i * W) * F32(decay[r]);
  const T* run = t.v.run(first + part.low, part.high - part.low);
  for (int n = part.low; n < part.high; ++n) {
    const T* v = (run != nullptr ? run + (n - part.low) * t.v.stride : values[n]) + d;
    if (t.far) t.k.prefetch(first + kTile + n, d, V * W);
    F32 value[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) value[i] = load_stored(v + i * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F32 weight(t.scores[r * kTile + n]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[r][i] = mul_add(weight, value[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[r][i].store(t.sums + r * t.padded + d + i * W);
}

// Scores or weights of R rows times the factors of the keys; NaN where a factor is NaN or infinite, as the
// values are then.
template <int R>
static ARIMG_INLINE void multiply_factors(const Part& part, const float* factor, float* scores) {
  for (int n = part.from; n < part.to; n += W) {
    const F32 f = F32::load(factor + n), nan = f - f;
    for (int r = 0; r < R; ++r)
      mul_add(F32::load(scores + r * kTile + n), f, nan).store(scores + r * kTile + n);
  }
}

// All R rows of a tile of few rows against keys and values as they lie; channels are whole vectors.
template <int R, typename T>
static __attribute__((noinline)) void attend_few(const Tile<T>& t, const Part& part, int64_t first) {
  const int64_t begin = first + part.low, count = part.high - part.low;
  const T *run = t.k.run(begin, count), *key_at[kTile], *value_at[kTile];
  if (run == nullptr) {
    t.k.places(begin, count, key_at + part.low);
    t.v.places(begin, count, value_at + part.low);
  }
  for (int n = part.from; n < part.to; n += W) {
    const T* keys[W];
    for (int i = 0; i < W; ++i) {
      int key = n + i < part.low ? part.low : n + i < part.high ? n + i : part.high - 1;  // masked later
      if (t.far) t.v.prefetch(first + key, 0, t.dim);
      keys[i] = run != nullptr ? run + (key - part.low) * t.k.stride : key_at[key];
    }
    for (int r = 0; r < R; ++r)
      score_in_place(t.queries + r * t.padded, keys, t.dim, t.scores + r * kTile + n);
  }
  alignas(64) float factor[kTile];
  if constexpr (is_code<T>) {
    for (int n = part.from; n < part.to; n += W) F32(0.f).store(factor + n);
    t.k.factors(begin, count, factor + part.low);
    multiply_factors<R>(part, factor, t.scores);
  }
  if (!part.whole) mask_rows(t, 0, R, part, first);
  float decay[W];
  softmax_rows<R>(t.scores, part.from, part.to, t.highest, t.weight, decay);
  if constexpr (is_code<T>) {
    t.v.factors(begin, count, factor + part.low);
    multiply_factors<R>(part, factor, t.scores);
  }
  int64_t d = 0;
  for (; d + 4 * W <= t.dim; d += 4 * W) values_in_place<R, 4>(t, part, first, value_at, decay, d);
  if (d + 2 * W <= t.dim) values_in_place<R, 2>(t, part, first, value_at, decay, d), d += 2 * W;
  if (d + W <= t.dim) values_in_place<R, 1>(t, part, first, value_at, decay, d);
}

// All rows of the tile against the keys [begin, end); begin is a multiple of the key tile.
template <typename T>
static void attend_tile(const Tile<T>& t, int64_t begin, int64_t end) {
  Span spans[kMaxGroups], all = span_of(t.visible, t.offset, t.rows, t.wrap);
  for (int64_t row = 0; row < t.rows; row += kGroup)
    spans[row / kGroup] =
        span_of(t.visible, t.offset + row, t.rows - row < kGroup ? t.rows - row : kGroup, t.wrap);
  const bool few = t.rows <= kFew && t.dim % W == 0;
  const int64_t sinks = t.visible.sinks;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = end - first < kTile ? end - first : kTile;
    const Part used(all, sinks, first, count);
    if (used.empty()) continue;
    if (few) {
      with_rows<kFew>(t.rows, [&](auto rows) { attend_few<rows.value>(t, used, first); });
      continue;
    }
    load_transposed(t.k, first + used.from, used.high - used.from, t.dim, t.keys + used.from * t.dim);
    // fp32 values are read in place, unless their rows are so far apart that they would evict each other.
    const float* values = t.values;
    if (sizeof(T) == 4 && t.dim == t.padded && t.v.stride == t.dim && t.v.run(first, count) != nullptr) {
      values = (const float*)t.v.at(first);
    } else {
      float factor[kTile];
      if constexpr (is_code<T>) t.v.factors(first + used.low, used.high - used.low, factor + used.low);
      for (int64_t n = used.low; n < used.high; ++n)
        load_row(t.v.at(first + n), t.dim, t.padded, is_code<T> ? factor[n] : 1.f, t.values + n * t.padded);
    }
    for (int64_t row = 0; row < t.rows; row += kGroup) {
      const Part part(spans[row / kGroup], sinks, first, count);
      if (part.empty()) continue;
      with_rows<kGroup>(t.rows - row < kGroup ? t.rows - row : kGroup,
                        [&](auto group) { attend<group.value>(t, row, part, first, values); });
    }
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
