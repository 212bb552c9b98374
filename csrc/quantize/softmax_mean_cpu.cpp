// See softmax_mean.h. Per tile of rows and block of codes: the products as in the search, the weights by a
// running maximum, and the weighted sum as a second product whose panels hold columns of the codes.
#include "core/exp.h"
#include "quantize/code_blocks.h"
#include "quantize/softmax_mean.h"

namespace arimg {
namespace ARIMG_SIMD {

static constexpr int64_t BLOCK = 8 * PANEL;  // codes

// Columns of a panel of values: one vector for few dimensions, two otherwise.
static ARIMG_INLINE int64_t value_columns(int64_t dim) {
  return dim <= W ? W : PANEL;
}
static ARIMG_INLINE int64_t value_panels(int64_t dim) {
  return (dim + value_columns(dim) - 1) / value_columns(dim);
}

int64_t value_floats(int64_t count, int64_t dim) {
  return value_panels(dim) * count * value_columns(dim);
}

void pack_values(const SoftmaxMean& p, float* values) {
  int64_t columns = value_columns(p.dim);
  for (int64_t panel = 0; panel < value_panels(p.dim); ++panel) {
    int64_t first = panel * columns, n = at_most(p.dim - first, columns);
    for (int64_t code = 0; code < p.count; ++code, values += columns) {
      const float* from = p.codes + code * p.dim + first;
      for (int64_t d = 0; d < columns; ++d) values[d] = d < n ? from[d] : 0.f;
    }
  }
}

// Running state of a tile of rows.
struct State {
  F32 sum[TILE_ROWS];      // of the weights, per lane
  float top[TILE_ROWS];    // the highest exponent
  float decay[TILE_ROWS];  // by which older sums shrink, of the block at hand
};

int64_t softmax_mean_scratch(int64_t dim) {
  int64_t padded = value_panels(dim) * value_columns(dim);
  return TILE_ROWS * (chunk_stride(dim) + padded + BLOCK) + 16;
}

// Exponents of one row into `weights`, and the state for them. n is the number of codes, `weights` holds
// minus the products and gets the weights.
template <typename T>
static void weigh_row(const SoftmaxMean& p, const float* packed, int64_t first, int64_t n, int64_t row,
                      float* weights, State& state, int r) {
  const float a = p.scale[row] / (p.sigma[row] * p.sigma[row]), b = a * p.scale[row];
  const T* logits = (const T*)p.logits + row * p.logits_stride + first;
  const int64_t floats = (p.dim + 1) * PANEL;
  F32 top(state.top[r]);
  for (int64_t i = 0; i < n; i += W) {
    F32 offset = F32::load(packed + (first + i) / PANEL * floats + i % PANEL);
    F32 exponent = fma(F32(-a), F32::load(weights + i), F32(-b) * offset);
    if (i + W <= n) {
      exponent = exponent + F32::load(logits + i);
    } else {
      exponent = exponent + F32::load_partial(logits + i, int(n - i));
      exponent = select(lane_index() < I32(int32_t(n - i)), exponent, F32(-INFINITE));
    }
    exponent.store(weights + i);
    top = max(exponent, top);  // a NaN is passed over here, and taken up by the sum
  }
  float highest = reduce_max(top), base = highest == -INFINITE ? 0.f : highest;
  float decay = exp_nonpositive(F32(state.top[r] - base))[0];
  F32 sum = F32(decay) * state.sum[r];
  for (int64_t i = 0; i < n; i += W) {
    F32 weight = exp_nonpositive(F32::load(weights + i) - F32(base));
    weight.store(weights + i);
    sum = sum + weight;
  }
  state.sum[r] = sum;
  state.top[r] = highest;
  state.decay[r] = decay;
}

// out[r] = decay[r] out[r] + weights[r] values, for one panel of columns of V vectors.
template <int V>
static void add_values(const float* weights, const State& state, const float* values, int64_t n, float* out,
                       int64_t stride) {
  F32 sum[TILE_ROWS][V];
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = F32(state.decay[r]) * F32::load(out + r * stride + v * W);
  for (int64_t k = 0; k < n; ++k, values += V * W) {
    F32 column[V];
    for (int v = 0; v < V; ++v) column[v] = F32::load(values + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; ++r) {
      F32 weight(weights[r * BLOCK + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = mul_add(weight, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int v = 0; v < V; ++v) sum[r][v].store(out + r * stride + v * W);
}

// Minus the products of the tile's rows (x holds them negated) with codes [first, first + n).
static void negated_products(const SoftmaxMean& p, const float* x, const float* packed, int64_t first,
                             int64_t n, float* out) {
  const float* panel = packed + first / PANEL * (p.dim + 1) * PANEL;
  for (int64_t i = 0; i < n; i += PANEL, panel += (p.dim + 1) * PANEL) {
    asm("" : "+r"(x));  // as in nearest_code
    Tile<TILE_ROWS> tile;
    tile.start(F32(0.f), F32(0.f));
    tile.multiply(x, chunk_stride(p.dim), panel + PANEL, p.dim);
    for (int r = 0; r < TILE_ROWS; ++r)
      for (int half = 0; half < 2; ++half) tile.sum[r][half].store(out + r * BLOCK + i + half * W);
  }
}

template <typename T>
static void mean_of_tile(const SoftmaxMean& p, const float* packed, const float* values, const float* x,
                         float* weights, float* sums, int64_t row, int rows) {
  const int64_t columns = value_columns(p.dim), panels = value_panels(p.dim), stride = panels * columns;
  State state;
  for (int r = 0; r < TILE_ROWS; ++r) {
    state.sum[r] = F32(0.f);
    state.top[r] = -INFINITE;
    state.decay[r] = 0.f;
  }
  for (int64_t i = 0; i < TILE_ROWS * stride; ++i) sums[i] = 0.f;
  for (int64_t first = 0; first < p.count; first += BLOCK) {
    int64_t n = at_most(p.count - first, BLOCK);
    negated_products(p, x, packed, first, n, weights);
    for (int r = 0; r < rows; ++r) weigh_row<T>(p, packed, first, n, row + r, weights + r * BLOCK, state, r);
    for (int64_t panel = 0; panel < panels; ++panel)
      (columns == W ? add_values<1> : add_values<2>)(weights, state,
                                                     values + (panel * p.count + first) * columns, n,
                                                     sums + panel * columns, stride);
  }
  for (int r = 0; r < rows; ++r) {
    float total = reduce_add(state.sum[r]);
    float* out = p.out + (row + r) * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = total == 0.f ? 0.f : sums[r * stride + d] / total;
  }
}

void softmax_mean(const SoftmaxMean& p, const float* packed, const float* values, float* scratch,
                  int64_t begin, int64_t end) {
  float* weights = scratch;
  float* sums = weights + TILE_ROWS * BLOCK;
  float* x = sums + TILE_ROWS * value_panels(p.dim) * value_columns(p.dim);
  for (int64_t row = begin; row < end; row += TILE_ROWS) {
    int rows = int(at_most(end - row, TILE_ROWS));
    load_rows(DType::f32, p.x, p.dim, row, rows, TILE_ROWS, x);
    with_dtype(p.logits_dtype,
               [&](auto t) { mean_of_tile<decltype(t)>(p, packed, values, x, weights, sums, row, rows); });
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
