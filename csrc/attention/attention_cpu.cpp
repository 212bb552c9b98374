// See contract.h. Online softmax over key tiles. For each tile of query rows the keys of one tile are
// transposed once, so that a vector holds one channel of W keys; then groups of a few rows, whose scores and
// outputs fit the registers, pass over it: scores = Q K^T, softmax, out += P V.
#include "attention/attend_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

template <typename T>
static void attend_numbered_tile(const Attention& p, int64_t number, float* scratch) {
  int64_t per_head = attention_tiles_per_head(p);
  int64_t tile = number % per_head, head = number / per_head % p.heads, batch = number / per_head / p.heads;
  int64_t first, last;
  if (p.row_tiles != nullptr) {
    first = p.row_tiles[tile];
    last = p.row_tiles[tile + 1];
  } else {  // equally long, and whole groups of rows where possible
    int64_t groups = (p.queries + kGroup - 1) / kGroup;
    first = groups * tile / per_head * kGroup;
    last = groups * (tile + 1) / per_head * kGroup;
    if (last > p.queries) last = p.queries;
  }
  auto at = [&](const void* base, const AttentionStrides& s, int64_t h, int64_t row) {
    return (T*)base + batch * s.batch + h * s.head + row * s.row;
  };
  int64_t kv_head = head / (p.heads / p.kv_heads);
  Tile<T> t(cells<T>(at(p.k, p.k_stride, kv_head, 0), p.k_stride.row),
            cells<T>(at(p.v, p.v_stride, kv_head, 0), p.v_stride.row), visible_rows(p, batch), last - first,
            first, p.queries, p.dim, scratch);
  float scale = p.scale * (p.head_scale ? p.head_scale[head] : 1.f);
  for (int64_t r = 0; r < t.rows; ++r)
    load_row(at(p.q, p.q_stride, head, first + r), t.dim, t.padded, scale, t.queries + r * t.padded);
  attend_tile(t, 0, p.keys);
  for (int64_t r = 0; r < t.rows; ++r) {
    store_row(t.sums + r * t.padded, t.dim, inverse_weight(t, r), at(p.out, p.out_stride, head, first + r));
    if (p.lse) p.lse[(batch * p.heads + head) * p.queries + first + r] = lse_of(t, r);
  }
}

void attention(const Attention& p, int64_t begin, int64_t end, float* scratch) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number)
      attend_numbered_tile<decltype(t)>(p, number, scratch);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
