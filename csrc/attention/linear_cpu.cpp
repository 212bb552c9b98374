// See linear_contract.h. A chunk is a handful of small products, all of them the register tile of
// gemm_tile.h: scores = Q K^T (once for the heads of a group), out = exp(A) Q S + weights V, and
// S = exp(a) S + K^T V. Keys are turned once, so that a vector holds one channel of several keys; the same
// panels then serve as the rows of K^T. States stay in the cache from the first chunk to the last.
//
// Sums of log decays are taken in double and kept as two floats, so that a difference of two large sums is as
// exact as a short product of decays.
#include "attention/linear_contract.h"
#include "core/exp.h"
#include "core/gemm_tile.h"
#include "core/transpose.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The sizes of a call and the pieces of its scratch.
struct Plan {
  int64_t chunk, heads;       // rows of a chunk, heads of a unit
  int64_t keys, dim, values;  // chunk, dim and value_dim, rounded up to panels or vectors
  int64_t query_at, key_at, value_at, state_at, score_at, weight_at, sum_at, decay_at, size;

  explicit Plan(const GatedScan& p) {
    chunk = p.chunk < p.length ? p.chunk : p.length;
    heads = scan_unit_heads(p);
    keys = round_up(chunk, PANEL);
    dim = round_up(p.dim, W);
    values = round_up(p.value_dim, PANEL);
    query_at = 0;
    key_at = query_at + round_up(chunk * dim, 16);
    value_at = key_at + keys * dim;
    state_at = value_at + keys * values;
    score_at = state_at + heads * p.dim * values;
    weight_at = score_at + (p.causal ? round_up(chunk * keys, 16) : 0);
    sum_at = weight_at + (p.causal ? TILE_ROWS * keys : 0);
    decay_at = sum_at + round_up(TILE_ROWS * values, 16);
    size = decay_at + 3 * keys;
  }
};

int64_t gated_scan_scratch(const GatedScan& p) {
  return Plan(p).size;
}

// One chunk of `rows` rows in scratch.
struct Chunk {
  const GatedScan& p;
  const Plan& plan;
  int64_t rows;
  float* queries;       // [rows, plan.dim]
  float* keys;          // [keys / PANEL, dim, PANEL]
  float* values;        // [values / PANEL, rows, PANEL], times w
  float* states;        // [heads, values / PANEL, dim, PANEL]
  float* scores;        // [rows, keys]
  float* weights;       // [TILE_ROWS, keys]
  float* sums;          // [TILE_ROWS, values]
  float *total, *rest;  // [keys] sums of the log decays: total + rest
  float* decay;         // [keys] exp of a difference of sums

  ARIMG_INLINE float* state(int64_t head) const { return states + head * p.dim * plan.values; }
};

// f(Count<R>) with R = count, 1 <= count <= Most.
template <int R>
struct Count {
  static constexpr int value = R;
};
template <int Most, typename F>
static ARIMG_INLINE void with_count(int64_t count, F&& f) {
  if (count == Most)
    f(Count<Most>{});
  else if constexpr (Most > 1)
    with_count<Most - 1>(count, f);
}

template <typename T>
static void load_queries(const Chunk& c, const T* q) {
  for (int64_t i = 0; i < c.rows; ++i) {
    const T* from = q + i * c.p.q_stride.row;
    float* to = c.queries + i * c.plan.dim;
    int64_t d = 0;
    for (; d + W <= c.p.dim; d += W) F32::load(from + d).store(to + d);
    if (d < c.p.dim) F32::load_partial(from + d, int(c.p.dim - d)).store(to + d);
  }
}

// Keys turned into panels; those beyond the chunk are zero.
template <typename T>
static void load_keys(const Chunk& c, const T* k) {
  for (int64_t first = 0; first < c.rows; first += PANEL) {
    float* to = c.keys + first * c.p.dim;
    int64_t count = c.rows - first < PANEL ? c.rows - first : PANEL;
    if (count < PANEL)
      for (int64_t i = 0; i < c.p.dim * PANEL; i += W) F32(0.f).store(to + i);
    transposed_copy(k + first * c.p.k_stride.row, c.p.k_stride.row, count, c.p.dim, to, PANEL);
  }
}

// Lanes [column, column + W) of a row of `width` elements, zero beyond.
template <typename T>
static ARIMG_INLINE F32 load_lanes(const T* row, int64_t column, int64_t width) {
  if (column + W <= width) return F32::load(row + column);
  return column < width ? F32::load_partial(row + column, int(width - column)) : F32(0.f);
}
template <typename T>
static ARIMG_INLINE void store_lanes(F32 x, T* row, int64_t column, int64_t width) {
  if (column + W <= width)
    x.store(row + column);
  else if (column < width)
    x.store_partial(row + column, int(width - column));
}

// f(place in scratch, row, column) for each vector of `rows` rows held in panels.
template <typename F>
static ARIMG_INLINE void for_panels(float* panels, int64_t rows, int64_t width, F&& f) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; column += W)
      f(panels + column / PANEL * rows * PANEL + row * PANEL + column % PANEL, row, column);
}

// The log decay of a token and the weight of its values.
struct Gate {
  float log_decay, weight;
  ARIMG_INLINE Gate(const GatedScan& p, float gate, int64_t head) {
    log_decay = p.rate != nullptr ? gate * p.rate[head] : gate;
    if (log_decay < kScanLowest) log_decay = kScanLowest;
    weight = p.rate != nullptr ? p.scale * gate : p.scale;
  }
};

// The sums of a head's log decays, and its values times their weights. The rows of the next head lie a page
// apart and are asked for in advance.
template <typename T>
static void load_values(const Chunk& c, const T* v, const float* gate, int64_t head, bool next) {
  const GatedScan& p = c.p;
  double total = 0;
  for (int64_t i = 0; i < c.rows; ++i) {
    Gate g(p, gate[i * p.gate_stride.row], head);
    total += g.log_decay;
    c.total[i] = float(total);
    c.rest[i] = float(total - double(c.total[i]));
    c.decay[i] = g.weight;
  }
  for (int64_t i = c.rows; i < round_up(c.rows, PANEL); ++i) c.total[i] = c.rest[i] = 0.f;
  for_panels(c.values, c.rows, c.plan.values, [&](float* to, int64_t row, int64_t column) {
    const T* from = v + row * p.v_stride.row;
    if (next) __builtin_prefetch(from + p.v_stride.head + column);
    (load_lanes(from, column, p.value_dim) * F32(c.decay[row])).store(to);
  });
}

// exp of the sum of the log decays after row j up to row i.
static ARIMG_INLINE F32 decay_between(const Chunk& c, float total, float rest, int64_t j) {
  F32 high = F32(total) - F32::load(c.total + j), low = F32(rest) - F32::load(c.rest + j);
  return exp_nonpositive(high + low);
}

// scores = Q K^T where a key is not later than a query of its tile of rows.
static __attribute__((noinline)) void score(const Chunk& c) {
  for (int64_t row = 0; row < c.rows; row += TILE_ROWS) {
    int64_t count = c.rows - row < TILE_ROWS ? c.rows - row : TILE_ROWS;
    with_count<TILE_ROWS>(count, [&](auto n) {
      constexpr int R = decltype(n)::value;
      for (int64_t first = 0; first < row + R; first += PANEL) {
        Tile<R> tile;
        tile.start(F32(0.f), F32(0.f));
        tile.multiply(c.queries + row * c.plan.dim, c.plan.dim, c.keys + first * c.p.dim, c.p.dim);
        for (int r = 0; r < R; ++r) {
          float* to = c.scores + (row + r) * c.plan.keys + first;
          tile.sum[r][0].store(to);
          tile.sum[r][1].store(to + W);
        }
      }
    });
  }
}

// The scores of rows [row, row + count) times the decays between key and query, zero for later keys.
static __attribute__((noinline)) void weigh(const Chunk& c, int64_t row, int64_t count) {
  for (int64_t i = row; i < row + count; ++i) {
    float total = c.total[i], rest = c.rest[i];
    for (int64_t j = 0; j < row + count; j += W) {
      Mask seen = lane_index() < I32(int32_t(i + 1 - j));
      F32 weight = F32::load(c.scores + i * c.plan.keys + j) * decay_between(c, total, rest, j);
      select(seen, weight, F32(0.f)).store(c.weights + (i - row) * c.plan.keys + j);
    }
  }
}

// sums = exp(A) Q S + weights V for rows [row, row + R).
template <int R>
static ARIMG_INLINE void output_rows(const Chunk& c, const float* state, int64_t row) {
  for (int64_t column = 0; column < c.plan.values; column += PANEL) {
    Tile<R> tile;
    tile.start(F32(0.f), F32(0.f));
    tile.multiply(c.queries + row * c.plan.dim, c.plan.dim, state + column * c.p.dim, c.p.dim);
    for (int r = 0; r < R; ++r) {
      F32 decay(c.decay[row + r]);
      tile.sum[r][0] = tile.sum[r][0] * decay;
      tile.sum[r][1] = tile.sum[r][1] * decay;
    }
    if (c.p.causal) tile.multiply(c.weights, c.plan.keys, c.values + column * c.rows, row + R);
    for (int r = 0; r < R; ++r) {
      tile.sum[r][0].store(c.sums + r * c.plan.values + column);
      tile.sum[r][1].store(c.sums + r * c.plan.values + column + W);
    }
  }
}
static __attribute__((noinline)) void output(const Chunk& c, const float* state, int64_t row, int64_t count) {
  with_count<TILE_ROWS>(count, [&](auto n) { output_rows<decltype(n)::value>(c, state, row); });
}

// Writes the rows of `sums`, with base and skip added.
template <typename T>
static void store_rows(const Chunk& c, const T* v, const T* base, T* out, float skip, int64_t count) {
  const GatedScan& p = c.p;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t column = 0; column < p.value_dim; column += W) {
      F32 sum = F32::load(c.sums + r * c.plan.values + column);
      if (p.skip != nullptr)
        sum = mul_add(F32(skip), load_lanes(v + r * p.v_stride.row, column, p.value_dim), sum);
      if (base != nullptr) sum = sum + load_lanes(base + r * p.base_stride.row, column, p.value_dim);
      store_lanes(sum, out + r * p.out_stride.row, column, p.value_dim);
    }
}

// state = decay * state + K^T V.
static __attribute__((noinline)) void update(const Chunk& c, float* state, float decay) {
  for (int64_t column = 0; column < c.plan.values; column += PANEL) {
    const float* values = c.values + column * c.rows;
    for (int64_t d = 0; d < c.p.dim; d += TILE_ROWS) {
      int64_t count = c.p.dim - d < TILE_ROWS ? c.p.dim - d : TILE_ROWS;
      float* at = state + column * c.p.dim + d * PANEL;
      with_count<TILE_ROWS>(count, [&](auto n) {
        constexpr int R = decltype(n)::value;
        Tile<R> tile;
        for (int r = 0; r < R; ++r) {
          tile.sum[r][0] = F32::load(at + r * PANEL) * F32(decay);
          tile.sum[r][1] = F32::load(at + r * PANEL + W) * F32(decay);
        }
        for (int64_t first = 0; first < c.rows; first += PANEL)
          tile.multiply(c.keys + first * c.p.dim + d * PANEL, PANEL, values + first * PANEL,
                        c.rows - first < PANEL ? c.rows - first : PANEL);
        for (int r = 0; r < R; ++r) {
          tile.sum[r][0].store(at + r * PANEL);
          tile.sum[r][1].store(at + r * PANEL + W);
        }
      });
    }
  }
}

// decay = exp(A), what the state before the chunk is worth at each row.
static void decay_from_start(const Chunk& c) {
  for (int64_t i = 0; i < c.rows; i += W)
    exp_nonpositive(F32::load(c.total + i) + F32::load(c.rest + i)).store(c.decay + i);
}

// Each value times what is left of it at the end of the chunk.
static void decay_to_end(const Chunk& c) {
  float total = c.total[c.rows - 1], rest = c.rest[c.rows - 1];
  for (int64_t j = 0; j < c.rows; j += W) decay_between(c, total, rest, j).store(c.decay + j);
  for_panels(c.values, c.rows, c.plan.values,
             [&](float* at, int64_t row, int64_t) { (F32::load(at) * F32(c.decay[row])).store(at); });
}

template <typename T>
static void scan_chunk(const Chunk& c, int64_t batch, int64_t first_head, int64_t first) {
  const GatedScan& p = c.p;
  auto at = [&](const void* base, const ScanStrides& s, int64_t head) {
    return base == nullptr ? nullptr : (T*)base + batch * s.batch + head * s.head + first * s.row;
  };
  int64_t group = first_head / (p.heads / p.groups);
  load_queries(c, at(p.q, p.q_stride, group));
  load_keys(c, at(p.k, p.k_stride, group));
  if (p.causal) score(c);
  for (int64_t h = 0; h < c.plan.heads; ++h) {
    int64_t head = first_head + h;
    const ScanStrides& g = p.gate_stride;
    T *v = at(p.v, p.v_stride, head), *base = at(p.base, p.base_stride, head),
      *out = at(p.out, p.out_stride, head);
    load_values(c, v, p.gate + batch * g.batch + head * g.head + first * g.row, head, h + 1 < c.plan.heads);
    decay_from_start(c);
    for (int64_t row = 0; row < c.rows; row += TILE_ROWS) {
      int64_t count = c.rows - row < TILE_ROWS ? c.rows - row : TILE_ROWS;
      if (p.causal) weigh(c, row, count);
      output(c, c.state(h), row, count);
      store_rows(c, v + row * p.v_stride.row, base == nullptr ? base : base + row * p.base_stride.row,
                 out + row * p.out_stride.row, p.skip != nullptr ? p.skip[head] : 0.f, count);
    }
    float end = c.total[c.rows - 1] + c.rest[c.rows - 1];
    if (p.causal)
      decay_to_end(c);
    else
      end /= float(c.rows);
    update(c, c.state(h), exp_nonpositive(F32(end))[0]);
  }
}

// One token of one head: the state is decayed, added to and multiplied in one pass. q and k as floats.
template <typename T>
static void step(const GatedScan& p, const float* q, const float* k, int64_t batch, int64_t head) {
  auto at = [&](const void* base, const ScanStrides& s) {
    return (T*)base + batch * s.batch + head * s.head;
  };
  int64_t place = (batch * p.heads + head) * p.dim * p.value_dim, width = p.value_dim;
  Gate gate(p, p.gate[batch * p.gate_stride.batch + head * p.gate_stride.head], head);
  F32 decay(exp_nonpositive(F32(gate.log_decay))[0]), weight(gate.weight);
  F32 skip(p.skip != nullptr ? p.skip[head] : 0.f);
  for (int64_t first = 0; first < width; first += 4 * W) {
    int64_t vectors = (width - first + W - 1) / W;
    with_count<4>(vectors < 4 ? vectors : 4, [&](auto n) {
      constexpr int R = decltype(n)::value;
      F32 value[R], sum[R];
      for (int i = 0; i < R; ++i) {
        F32 v = load_lanes(at(p.v, p.v_stride), first + i * W, width);
        value[i] = v * weight;
        sum[i] = p.skip != nullptr ? v * skip : F32(0.f);
      }
      for (int64_t d = 0; d < p.dim; ++d)
        for (int i = 0; i < R; ++i) {
          int64_t column = first + i * W;
          F32 s(0.f);
          if (p.state != nullptr) s = load_lanes(p.state + place + d * width, column, width);
          s = mul_add(F32(k[d]), value[i], s * decay);
          store_lanes(s, p.new_state + place + d * width, column, width);
          sum[i] = mul_add(F32(q[d]), s, sum[i]);
        }
      for (int i = 0; i < R; ++i) store_lanes(sum[i], at(p.out, p.out_stride), first + i * W, width);
    });
  }
}

template <typename T>
static void step_unit(const GatedScan& p, const Plan& plan, int64_t unit, float* scratch) {
  int64_t per_batch = p.heads / plan.heads;
  int64_t batch = unit / per_batch, first_head = unit % per_batch * plan.heads;
  int64_t group = first_head / (p.heads / p.groups);
  const T* q = (const T*)p.q + batch * p.q_stride.batch + group * p.q_stride.head;
  const T* k = (const T*)p.k + batch * p.k_stride.batch + group * p.k_stride.head;
  float *queries = scratch + plan.query_at, *keys = scratch + plan.key_at;
  for (int64_t d = 0; d < p.dim; d += W) {
    load_lanes(q, d, p.dim).store(queries + d);
    load_lanes(k, d, p.dim).store(keys + d);
  }
  for (int64_t h = 0; h < plan.heads; ++h) step<T>(p, queries, keys, batch, first_head + h);
}

template <typename T>
static void scan_unit(const GatedScan& p, const Plan& plan, int64_t unit, float* scratch) {
  int64_t per_batch = p.heads / plan.heads;
  int64_t batch = unit / per_batch, first_head = unit % per_batch * plan.heads;
  int64_t size = p.dim * p.value_dim, place = (batch * p.heads + first_head) * size;
  float* states = scratch + plan.state_at;
  for (int64_t h = 0; h < plan.heads; ++h)
    for_panels(states + h * p.dim * plan.values, p.dim, plan.values,
               [&](float* to, int64_t d, int64_t column) {
                 const float* from = p.state + place + h * size + d * p.value_dim;
                 (p.state == nullptr ? F32(0.f) : load_lanes(from, column, p.value_dim)).store(to);
               });
  for (int64_t first = 0; first < p.length; first += plan.chunk) {
    int64_t rows = p.length - first < plan.chunk ? p.length - first : plan.chunk;
    scan_chunk<T>(Chunk{p, plan, rows, scratch + plan.query_at, scratch + plan.key_at,
                        scratch + plan.value_at, states, scratch + plan.score_at, scratch + plan.weight_at,
                        scratch + plan.sum_at, scratch + plan.decay_at, scratch + plan.decay_at + plan.keys,
                        scratch + plan.decay_at + 2 * plan.keys},
                  batch, first_head, first);
  }
  for (int64_t h = 0; h < plan.heads; ++h)
    for_panels(
        states + h * p.dim * plan.values, p.dim, plan.values, [&](float* from, int64_t d, int64_t column) {
          store_lanes(F32::load(from), p.new_state + place + h * size + d * p.value_dim, column, p.value_dim);
        });
}

void gated_scan(const GatedScan& p, int64_t begin, int64_t end, float* scratch) {
  const Plan plan(p);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    bool one = p.length == 1 && p.causal && p.base == nullptr;
    for (int64_t unit = begin; unit < end; ++unit)
      one ? step_unit<T>(p, plan, unit, scratch) : scan_unit<T>(p, plan, unit, scratch);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
