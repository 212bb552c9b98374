// See contract.h. Online softmax over key tiles. For each tile of query rows the keys of one tile are
// transposed once, so that a vector holds one channel of W keys; then groups of a few rows, whose scores and
// outputs fit the registers, pass over it: scores = Q K^T, softmax, out += P V.
//
// What a row sees is summed on a fixed grid of keys: masked keys add exact zeros and skipped ones nothing, so
// a row's bits depend on its own interval and data alone, not on its neighbours, tile or thread.
#include "attention/contract.h"
#include "core/exp.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int kGroup = W == 16 ? 12 : W == 8 ? 6 : 4;  // rows: with two vectors each, the registers are full
constexpr int kPanel = 2 * W;                          // keys or channels of one register tile
constexpr int kTile = kAttentionKeyTile;
constexpr int kFew = 2;  // queries up to which keys are read as they lie
constexpr float kLowest =
    -3.4028235e38f;  // a finite start of the running maximum, so that no inf - inf occurs
static_assert(kTile % kPanel == 0 && kGroup <= kAttentionMaxGroup, "tiles are whole panels");

// One tile of query rows of one head, and the scratch it works in.
template <typename T>
struct Tile {
  const T *q, *k, *v;
  T* out;
  const int32_t *row_start, *row_end;  // of the tile's first row, or nullptr
  const Attention& p;
  int64_t rows;
  int64_t dim, padded;  // channels, and channels rounded up to whole panels
  float* queries;       // [rows, padded], times scale
  float* sums;          // [rows, padded] running outputs
  float* highest;       // [rows] running maxima
  float* weight;        // [rows] running sums of the softmax
  float* keys;          // [tile / panel, dim, panel]
  float* values;        // [tile, padded]
  float* scores;        // [group, tile]

  ARIMG_INLINE bool few() const { return p.queries <= kFew; }
  ARIMG_INLINE int64_t start(int64_t row) const {
    return row_start == nullptr || row_start[row] < 0 ? 0 : row_start[row];
  }
  ARIMG_INLINE int64_t end(int64_t row) const {
    return row_end == nullptr || row_end[row] > p.keys ? p.keys : row_end[row];
  }
};

// The keys that some row of a group sees, [low, high), and those that all see, [all_low, all_high).
struct Span {
  int64_t low, high, all_low, all_high;
};

template <typename T>
static Span span_of(const Tile<T>& t, int64_t row, int64_t count) {
  Span s{t.p.keys, 0, 0, t.p.keys};
  for (int64_t i = row; i < row + count; ++i) {
    int64_t start = t.start(i), end = t.end(i);
    if (start >= end) {  // sees nothing: its weight stays zero
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

template <typename T>
static void load_queries(const Tile<T>& t) {
  F32 scale(t.p.scale);
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* q = t.q + r * t.p.q_stride.row;
    float* to = t.queries + r * t.padded;
    int64_t d = 0;
    for (; d + W <= t.dim; d += W) (F32::load(q + d) * scale).store(to + d);
    if (d < t.dim) (F32::load_partial(q + d, int(t.dim - d)) * scale).store(to + d);
  }
}

// Keys [first, first + count), count <= tile, transposed; keys beyond count in the last panel are zero.
template <typename T>
static void load_keys(const Tile<T>& t, int64_t first, int64_t count) {
  const T* k = t.k + first * t.p.k_stride.row;
  for (int64_t n = 0; n < count; n += W) {
    float* to = t.keys + (n / kPanel) * t.dim * kPanel + n % kPanel;
    for (int64_t d = 0; d < t.dim; d += W) {
      int channels = t.dim - d < W ? int(t.dim - d) : W;
      F32 block[W];
      for (int i = 0; i < W; ++i) {
        const T* row = k + (n + i) * t.p.k_stride.row + d;
        block[i] = n + i >= count  ? F32(0.f)
                   : channels == W ? F32::load(row)
                                   : F32::load_partial(row, channels);
      }
      transpose(block);
      for (int i = 0; i < channels; ++i) block[i].store(to + (d + i) * kPanel);
    }
  }
  // Half of the last panel may be without keys.
  if ((count + W - 1) / W % 2 == 1) {
    float* to = t.keys + (count / kPanel) * t.dim * kPanel + W;
    for (int64_t d = 0; d < t.dim; ++d) F32(0.f).store(to + d * kPanel);
  }
}

template <typename T>
static void load_values(const Tile<T>& t, int64_t first, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    const T* v = t.v + (first + n) * t.p.v_stride.row;
    float* to = t.values + n * t.padded;
    int64_t d = 0;
    for (; d + W <= t.dim; d += W) F32::load(v + d).store(to + d);
    if (d < t.dim) F32::load_partial(v + d, int(t.dim - d)).store(to + d);
  }
}

// scores[r, n] = sum over d of queries[r, d] * keys[d, n] for one panel of keys.
template <int R>
static ARIMG_INLINE void score_panel(const float* queries, int64_t stride, const float* keys, int64_t dim,
                                     float* scores) {
  F32 a[R], b[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = b[r] = F32(0.f);
  for (int64_t d = 0; d < dim; ++d) {
    F32 k0 = F32::load(keys + d * kPanel), k1 = F32::load(keys + d * kPanel + W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      F32 q(queries[r * stride + d]);
      a[r] = mul_add(q, k0, a[r]);
      b[r] = mul_add(q, k1, b[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r].store(scores + r * kTile);
    b[r].store(scores + r * kTile + W);
  }
}

// The same scores from keys as they lie, W keys at once; `count` keys may be read from `keys`.
template <typename T>
static ARIMG_INLINE void score_in_place(const float* query, const T* keys, int64_t stride, int64_t dim,
                                        int from, int to, int64_t count, float* scores) {
  for (int n = from; n < to; n += W) {
    F32 sums[W];
    const T* row[W];
    for (int i = 0; i < W; ++i) {
      sums[i] = F32(0.f);
      row[i] = keys + (n + i < count ? n + i : count - 1) * stride;  // keys beyond are masked later
    }
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
      F32 q = F32::load(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sums[i] = mul_add(q, F32::load(row[i] + d), sums[i]);
    }
    if (d < dim) {
      F32 q = F32::load(query + d);  // zero beyond dim
      for (int i = 0; i < W; ++i) sums[i] = mul_add(q, F32::load_partial(row[i] + d, int(dim - d)), sums[i]);
    }
    transpose(sums);
    for (int half = W / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    sums[0].store(scores + n);
  }
}

// sums[r, d] = sums[r, d] * decay[r] + sum over n of scores[r, n] * values[n, d] for one panel of channels.
template <int R>
static ARIMG_INLINE void value_panel(float* sums, int64_t stride, const float* decay, const float* scores,
                                     const float* values, int64_t value_stride, int64_t count) {
  F32 a[R], b[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = F32::load(sums + r * stride) * F32(decay[r]);
    b[r] = F32::load(sums + r * stride + W) * F32(decay[r]);
  }
  for (int64_t n = 0; n < count; ++n) {
    F32 v0 = F32::load(values + n * value_stride), v1 = F32::load(values + n * value_stride + W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      F32 s(scores[r * kTile + n]);
      a[r] = mul_add(s, v0, a[r]);
      b[r] = mul_add(s, v1, b[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r].store(sums + r * stride);
    b[r].store(sums + r * stride + W);
  }
}

// Scores [from, to), whole panels, become exp(score - highest); returns by how much older sums shrink.
static ARIMG_INLINE float softmax_row(float* scores, int from, int to, float& highest, float& weight) {
  F32 top0(kLowest), top1(kLowest);
  for (int n = from; n < to; n += kPanel) {
    top0 = max(F32::load(scores + n), top0);
    top1 = max(F32::load(scores + n + W), top1);
  }
  float top = reduce_max(max(top0, top1));
  top = top > highest ? top : highest;
  F32 total0(0.f), total1(0.f);
  for (int n = from; n < to; n += kPanel) {
    F32 e0 = exp_nonpositive(F32::load(scores + n) - F32(top));
    F32 e1 = exp_nonpositive(F32::load(scores + n + W) - F32(top));
    e0.store(scores + n);
    e1.store(scores + n + W);
    total0 = total0 + e0;
    total1 = total1 + e1;
  }
  float decay = exp_nonpositive(F32(highest - top))[0];
  weight = weight * decay + reduce_add(total0 + total1);
  highest = top;
  return decay;
}

// Keys outside [low, high) of the panels [from, to) get the score -inf.
static ARIMG_INLINE void mask_row(float* scores, int from, int to, int64_t low, int64_t high) {
  for (int n = from; n < to; n += W) {
    I32 key = lane_index() + I32(n);
    Mask seen = (key > I32(int32_t(low - 1))) & (key < I32(int32_t(high)));
    select(seen, F32::load(scores + n), F32(-__builtin_inff())).store(scores + n);
  }
}

// Rows [row, row + R) against the keys of one tile.
template <int R, typename T>
static __attribute__((noinline)) void attend(const Tile<T>& t, int64_t row, const Span& s, int64_t first,
                                             const float* values, int64_t value_stride) {
  int64_t low = s.low > first ? s.low - first : 0;
  int64_t high = s.high - first < kTile ? s.high - first : kTile;
  if (low >= high) return;
  int from = int(low / kPanel) * kPanel, to = int((high + kPanel - 1) / kPanel) * kPanel;
  const float* queries = t.queries + row * t.padded;
  if (t.few()) {
    int64_t readable = t.p.keys - first < kTile ? t.p.keys - first : kTile;
    for (int r = 0; r < R; ++r)
      score_in_place(queries + r * t.padded, t.k + first * t.p.k_stride.row, t.p.k_stride.row, t.dim, from,
                     to, readable, t.scores + r * kTile);
  } else {
    for (int n = from; n < to; n += kPanel)
      score_panel<R>(queries, t.padded, t.keys + n * t.dim, t.dim, t.scores + n);
  }
  bool whole = s.all_low <= first + from && s.all_high >= first + to;
  float decay[R];
  for (int r = 0; r < R; ++r) {
    float* scores = t.scores + r * kTile;
    if (!whole) mask_row(scores, from, to, t.start(row + r) - first, t.end(row + r) - first);
    decay[r] = softmax_row(scores, from, to, t.highest[row + r], t.weight[row + r]);
  }
  for (int64_t d = 0; d < t.dim; d += kPanel)
    value_panel<R>(t.sums + row * t.padded + d, t.padded, decay, t.scores + low,
                   values + low * value_stride + d, value_stride, high - low);
}

template <int R, typename T>
static void attend_rows(int64_t count, const Tile<T>& t, int64_t row, const Span& s, int64_t first,
                        const float* values, int64_t value_stride) {
  if (count == R)
    attend<R>(t, row, s, first, values, value_stride);
  else if constexpr (R > 1)
    attend_rows<R - 1>(count, t, row, s, first, values, value_stride);
}

template <typename T>
static void store_rows(const Tile<T>& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    T* out = t.out + r * t.p.out_stride.row;
    const float* sums = t.sums + r * t.padded;
    F32 inverse(t.weight[r] == 0.f ? 0.f : 1.f / t.weight[r]);
    int64_t d = 0;
    for (; d + W <= t.dim; d += W) (F32::load(sums + d) * inverse).store(out + d);
    if (d < t.dim) (F32::load(sums + d) * inverse).store_partial(out + d, int(t.dim - d));
  }
}

template <typename T>
static void attend_tile(const Tile<T>& t) {
  load_queries(t);
  for (int64_t i = 0; i < t.rows * t.padded; i += W) F32(0.f).store(t.sums + i);
  for (int64_t r = 0; r < t.rows; ++r) {
    t.highest[r] = kLowest;
    t.weight[r] = 0.f;
  }
  Span tile = span_of(t, 0, t.rows);
  // fp32 values are read in place, unless their rows are so far apart that they would evict each other.
  bool in_place = sizeof(T) == 4 && t.dim == t.padded && t.p.v_stride.row == t.dim;
  for (int64_t first = tile.low / kTile * kTile; first < tile.high; first += kTile) {
    int64_t count = t.p.keys - first < kTile ? t.p.keys - first : kTile;
    if (!t.few()) load_keys(t, first, count);
    const float* values = t.values;
    if (in_place)
      values = (const float*)t.v + first * t.dim;
    else
      load_values(t, first, count);
    for (int64_t row = 0; row < t.rows; row += kGroup) {
      int64_t rows = t.rows - row < kGroup ? t.rows - row : kGroup;
      attend_rows<kGroup>(rows, t, row, span_of(t, row, rows), first, values, t.padded);
    }
  }
  store_rows(t);
}

template <typename T>
static void attend_numbered_tile(const Attention& p, int64_t number, float* scratch) {
  int64_t tile_rows = attention_tile_rows(p.queries);
  int64_t per_head = (p.queries + tile_rows - 1) / tile_rows;
  int64_t first = number % per_head * tile_rows;
  int64_t head = number / per_head % p.heads;
  int64_t batch = number / per_head / p.heads;
  auto at = [&](const void* base, const AttentionStrides& s, int64_t row) {
    return (T*)base + batch * s.batch + head * s.head + row * s.row;
  };
  int64_t rows = p.queries - first < tile_rows ? p.queries - first : tile_rows;
  int64_t padded = (p.dim + kPanel - 1) / kPanel * kPanel;
  int64_t interval = batch * p.interval_stride + first;
  float* queries = scratch;
  float* sums = queries + rows * padded;
  float* keys = sums + rows * padded;
  float* values = keys + kTile * padded;
  float* scores = values + kTile * padded;
  float* highest = scores + kGroup * kTile;
  attend_tile(Tile<T>{at(p.q, p.q_stride, first), at(p.k, p.k_stride, 0), at(p.v, p.v_stride, 0),
                      at(p.out, p.out_stride, first), p.row_start ? p.row_start + interval : nullptr,
                      p.row_end ? p.row_end + interval : nullptr, p, rows, p.dim, padded, queries, sums,
                      highest, highest + rows, keys, values, scores});
}

void attention(const Attention& p, int64_t begin, int64_t end, float* scratch) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number)
      attend_numbered_tile<decltype(t)>(p, number, scratch);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
