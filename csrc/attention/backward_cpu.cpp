// See contract.h. One key head at a time, key tile by key tile: the weights of a block of rows are computed
// again from the scores and the lse, and with them the three products
//
//   grad_v += P^T grad_out    grad_k += S^T q    grad_q += S k,    S = P (grad_out v^T - delta)
//
// where delta is the sum of grad_out times out. grad_k and grad_v of the tile and grad_q of all rows stay in
// scratch memory, so no two units write to one place.
#include "attention/tile_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int kKeys = kBackwardKeys, kRows = kBackwardRows;
static_assert(kKeys % kPanel == 0 && kRows % kGroup == 0, "steps are whole register tiles");

// Rows that are treated together: neighbours with nearly the same interval.
struct Block {
  int64_t row, count;
  Span span;
};
static_assert(sizeof(Block) <= 16 * sizeof(float), "room in attention_backward_scratch");

// Blocks are cut where the interval jumps, such as between long levels, so that few pairs are computed in
// vain; short levels share a block.
static int64_t cut_blocks(const Visible& v, int64_t rows, int64_t wrap, Block* blocks) {
  int64_t n = 0;
  auto far = [](int64_t a, int64_t b) { return a - b > kKeys || b - a > kKeys; };
  for (int64_t row = 0; row < rows;) {
    int64_t start = v.start(row % wrap), end = v.end(row % wrap), count = 1;
    while (count < kRows && row + count < rows) {
      int64_t i = (row + count) % wrap;
      if (count >= kGroup && (far(v.start(i), start) || far(v.end(i), end))) break;
      ++count;
    }
    blocks[n++] = {row, count, span_of(v, row, count, wrap)};
    row += count;
  }
  return n;
}

struct Backward {
  Visible visible;
  int64_t rows, wrap, dim, padded;
  float *q, *grad, *grad_q;            // [rows, padded]; q times scale
  float *lse, *delta;                  // [rows]
  float *keys_across, *values_across;  // [panels, dim, panel]
  float* keys;                         // [kKeys, padded]
  float *grad_k, *grad_v;              // [kKeys, padded]
  float *weight, *slope;               // [kRows, kKeys]: P and S
};

// R rows of a block, `at` of them before: their weights and slopes, and their part of grad_q.
template <int R>
static __attribute__((noinline)) void backward_rows(const Backward& t, const Block& block, int64_t at,
                                                    const Part& part, int64_t first, const float* keys) {
  const int64_t row = block.row + at;
  float *weight = t.weight + at * kKeys, *slope = t.slope + at * kKeys;
  for (int n = part.from; n < part.to; n += kPanel) {
    multiply_panel<R>(t.q + row * t.padded, t.padded, 1, t.keys_across + n * t.dim, kPanel, t.dim, nullptr,
                      weight + n, kKeys);
    multiply_panel<R>(t.grad + row * t.padded, t.padded, 1, t.values_across + n * t.dim, kPanel, t.dim,
                      nullptr, slope + n, kKeys);
  }
  float keep[R];
  for (int r = 0; r < R; ++r) {
    keep[r] = 1.f;
    float *w = weight + r * kKeys, *s = slope + r * kKeys;
    if (!part.whole) mask_row(w, part, t.visible, (row + r) % t.wrap, first);
    F32 lse(t.lse[row + r]), delta(t.delta[row + r]);
    for (int n = part.from; n < part.to; n += W) {
      F32 p = exp_difference(F32::load(w + n) - lse);
      p.store(w + n);
      (p * (F32::load(s + n) - delta)).store(s + n);
    }
  }
  for (int64_t d = 0; d < t.dim; d += kPanel)
    multiply_panel<R>(slope + part.low, kKeys, 1, keys + part.low * t.padded + d, t.padded,
                      part.high - part.low, keep, t.grad_q + row * t.padded + d, t.padded);
}

// R keys: their part of grad_k and grad_v from one block.
template <int R>
static __attribute__((noinline)) void backward_keys(const Backward& t, const Block& block, int key) {
  float keep[R];
  for (int r = 0; r < R; ++r) keep[r] = 1.f;
  for (int64_t d = 0; d < t.dim; d += kPanel) {
    const int64_t from = block.row * t.padded + d, to = key * t.padded + d;
    multiply_panel<R>(t.weight + key, 1, kKeys, t.grad + from, t.padded, block.count, keep, t.grad_v + to,
                      t.padded);
    multiply_panel<R>(t.slope + key, 1, kKeys, t.q + from, t.padded, block.count, keep, t.grad_k + to,
                      t.padded);
  }
}

static void backward_block(const Backward& t, const Block& block, const Part& part, int64_t first,
                           const float* keys) {
  for (int64_t at = 0; at < block.count; at += kGroup)
    with_rows<kGroup>(block.count - at < kGroup ? block.count - at : kGroup,
                      [&](auto rows) { backward_rows<rows.value>(t, block, at, part, first, keys); });
  for (int key = part.low; key < part.high; key += kGroup)
    with_rows<kGroup>(part.high - key < kGroup ? part.high - key : kGroup,
                      [&](auto count) { backward_keys<count.value>(t, block, key); });
}

// Queries, incoming gradients and their sums, all heads of the group one after another.
template <typename T>
static void load_rows(const Backward& t, const AttentionBackward& b, int64_t batch, int64_t kv_head) {
  const Attention& p = b.forward;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t head = kv_head * group + r / p.queries, i = r % p.queries;
    auto at = [&](const void* base, const AttentionStrides& s) {
      return (const T*)base + batch * s.batch + head * s.head + i * s.row;
    };
    float *q = t.q + r * t.padded, *grad = t.grad + r * t.padded, *out = t.grad_q + r * t.padded;
    load_row(at(p.q, p.q_stride), t.dim, t.padded, p.scale * (p.head_scale ? p.head_scale[head] : 1.f), q);
    load_row(at(b.grad_out, b.grad_out_stride), t.dim, t.padded, 1.f, grad);
    load_row(at(p.out, p.out_stride), t.dim, t.padded, 1.f, out);
    F32 sum(0.f);
    for (int64_t d = 0; d < t.padded; d += W) {
      sum = mul_add(F32::load(grad + d), F32::load(out + d), sum);
      F32(0.f).store(out + d);
    }
    t.delta[r] = reduce_add(sum);
    float lse = p.lse[(batch * p.heads + head) * p.queries + i];
    t.lse[r] = lse == -__builtin_inff() ? 0.f : lse;  // sees nothing: all its scores are -inf
  }
}

template <typename T>
static void backward_unit(const AttentionBackward& b, int64_t number, float* scratch) {
  const Attention& p = b.forward;
  const int64_t group = p.heads / p.kv_heads, kv_head = number % p.kv_heads, batch = number / p.kv_heads;
  Backward t;
  t.visible = visible_rows(p, batch);
  t.rows = group * p.queries;
  t.wrap = p.queries;
  t.dim = p.dim;
  t.padded = (p.dim + kPanel - 1) / kPanel * kPanel;
  auto take = [&](int64_t floats) {
    float* at = scratch;
    scratch += (floats + 15) / 16 * 16;
    return at;
  };
  Block* blocks = (Block*)take(16 * (t.rows / kGroup + 1));
  t.q = take(t.rows * t.padded);
  t.grad = take(t.rows * t.padded);
  t.grad_q = take(t.rows * t.padded);
  t.keys_across = take(kKeys * t.padded);
  t.values_across = take(kKeys * t.padded);
  t.keys = take(kKeys * t.padded);
  t.grad_k = take(kKeys * t.padded);
  t.grad_v = take(kKeys * t.padded);
  t.weight = take(kRows * kKeys);
  t.slope = take(kRows * kKeys);
  t.lse = take(t.rows);
  t.delta = take(t.rows);

  load_rows<T>(t, b, batch, kv_head);
  const int64_t block_count = cut_blocks(t.visible, t.rows, t.wrap, blocks);
  auto k = cells<T>((const T*)p.k + batch * p.k_stride.batch + kv_head * p.k_stride.head, p.k_stride.row);
  auto v = cells<T>((const T*)p.v + batch * p.v_stride.batch + kv_head * p.v_stride.head, p.v_stride.row);
  T *grad_k = (T*)b.grad_k + (batch * p.kv_heads + kv_head) * p.keys * p.dim,
    *grad_v = (T*)b.grad_v + (batch * p.kv_heads + kv_head) * p.keys * p.dim;
  for (int64_t first = 0; first < p.keys; first += kKeys) {
    const int64_t count = p.keys - first < kKeys ? p.keys - first : kKeys;
    for (int64_t i = 0; i < kKeys * t.padded; i += W) {
      F32(0.f).store(t.grad_k + i);
      F32(0.f).store(t.grad_v + i);
    }
    load_transposed(k, first, count, t.dim, t.keys_across);
    load_transposed(v, first, count, t.dim, t.values_across);
    for (int64_t n = 0; n < count; ++n)
      load_row(k.at(first + n), t.dim, t.padded, 1.f, t.keys + n * t.padded);
    for (int64_t i = 0; i < block_count; ++i) {
      Part part(blocks[i].span, t.visible.sinks, first, count);
      if (!part.empty()) backward_block(t, blocks[i], part, first, t.keys);
    }
    for (int64_t n = 0; n < count; ++n) {
      store_row(t.grad_k + n * t.padded, t.dim, 1.f, grad_k + (first + n) * p.dim);
      store_row(t.grad_v + n * t.padded, t.dim, 1.f, grad_v + (first + n) * p.dim);
    }
  }
  T* grad_q = (T*)b.grad_q + (batch * p.heads + kv_head * group) * p.queries * p.dim;
  for (int64_t r = 0; r < t.rows; ++r) store_row(t.grad_q + r * t.padded, t.dim, p.scale, grad_q + r * p.dim);
}

void attention_backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  with_dtype(p.forward.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) backward_unit<decltype(t)>(p, number, scratch);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
