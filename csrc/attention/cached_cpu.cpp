// See cached.h. The rows of all query heads that share a key head form one tile, so its keys are read once.
#include "attention/cached.h"

#include "attention/tile_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int64_t kFarBytes = 16 << 20;  // larger caches are asked for ahead; smaller ones lose by it

// Row r of a key head.
struct RowPlace {
  int64_t batch, head, query;
  ARIMG_INLINE RowPlace(const Attention& p, int64_t batch, int64_t kv_head, int64_t r)
      : batch(batch), head(kv_head * (p.heads / p.kv_heads) + r / p.queries), query(r % p.queries) {}
  template <typename T>
  ARIMG_INLINE T* at(const void* base, const AttentionStrides& s) const {
    return (T*)base + batch * s.batch + head * s.head + query * s.row;
  }
};

template <typename T>
static Cells<T> cache_cells(const CachedAttention& c, int64_t batch, int64_t kv_head, const void* cached,
                            const AttentionStrides& s, const void* fresh, const AttentionStrides& f,
                            int64_t old) {
  const T* base = (const T*)cached + kv_head * s.head;
  const T* next = fresh ? (const T*)fresh + batch * f.batch + kv_head * f.head : nullptr;
  if (c.cache.page_table != nullptr)
    return {base,  s.row, c.cache.page_table + batch * c.cache.max_pages, c.cache.page_size, s.batch, next,
            f.row, old};
  return {base + batch * s.batch, s.row, nullptr, 1, 0, next, f.row, old};
}

template <typename T>
static void store_partial(const CachedAttention& c, const Tile<T>& t, int64_t r, const RowPlace& place,
                          int64_t part) {
  const Attention& p = c.rows;
  float* to =
      c.partial +
      (((place.batch * p.heads + place.head) * p.queries + place.query) * c.parts + part) * (p.dim + 2);
  store_row(t.sums + r * t.padded, t.dim, 1.f, to);
  to[p.dim] = t.highest[r];
  to[p.dim + 1] = t.weight[r];
}

template <typename T>
static void cached_unit(const CachedAttention& c, int64_t number, float* scratch) {
  const Attention& p = c.rows;
  const int64_t part = number % c.parts, tiles = cached_tiles(c), tile = number / c.parts % tiles;
  const int64_t kv_head = number / c.parts / tiles % p.kv_heads,
                batch = number / c.parts / tiles / p.kv_heads;
  const int64_t rows = cached_rows(c), groups = (rows + kGroup - 1) / kGroup;
  const int64_t first = groups * tile / tiles * kGroup;
  int64_t last = groups * (tile + 1) / tiles * kGroup;
  if (last > rows) last = rows;

  const int64_t old = c.cache.lengths ? c.cache.lengths[batch] : p.keys;
  Visible visible = visible_rows(p, batch);
  visible.shift = old;
  visible.keys = old + c.cache.fresh;
  visible.sinks = old;
  Tile<T> t(cache_cells<T>(c, batch, kv_head, p.k, p.k_stride, c.cache.k_new, c.cache.k_new_stride, old),
            cache_cells<T>(c, batch, kv_head, p.v, p.v_stride, c.cache.v_new, c.cache.v_new_stride, old),
            visible, last - first, first, p.queries, p.dim, scratch);
  t.far = 2 * p.batch * p.kv_heads * p.keys * p.dim * int64_t(sizeof(T)) > kFarBytes;
  for (int64_t r = 0; r < t.rows; ++r) {
    RowPlace place(p, batch, kv_head, first + r);
    const float factor = p.scale * (p.head_scale ? p.head_scale[place.head] : 1.f);
    load_row(place.at<const T>(p.q, p.q_stride), t.dim, t.padded, factor, t.queries + r * t.padded);
  }
  int64_t end = c.parts > 1 ? (part + 1) * c.part_keys : visible.keys;
  attend_tile(t, part * c.part_keys, end < visible.keys ? end : visible.keys);
  for (int64_t r = 0; r < t.rows; ++r) {
    RowPlace place(p, batch, kv_head, first + r);
    if (c.parts > 1)
      store_partial(c, t, r, place, part);
    else
      store_row(t.sums + r * t.padded, t.dim, inverse_weight(t, r), place.at<T>(p.out, p.out_stride));
  }
}

void cached_attention(const CachedAttention& c, int64_t begin, int64_t end, float* scratch) {
  with_dtype(c.rows.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) cached_unit<decltype(t)>(c, number, scratch);
  });
}

template <typename T>
static void combine_row(const CachedAttention& c, int64_t row) {
  const Attention& p = c.rows;
  const int64_t dim = p.dim, step = dim + 2;
  float* parts = c.partial + row * c.parts * step;
  float top = kLowest, weight = 0.f;
  for (int64_t i = 0; i < c.parts; ++i) top = parts[i * step + dim] > top ? parts[i * step + dim] : top;
  for (int64_t i = 0; i < c.parts; ++i) {
    float* part = parts + i * step;
    const float share = exp_difference(F32(part[dim] - top))[0];
    weight += part[dim + 1] * share;
    for (int64_t d = 0; d < dim; ++d) parts[d] = (i == 0 ? 0.f : parts[d]) + part[d] * share;
  }
  RowPlace place(p, row / (p.heads * p.queries), 0, row % (p.heads * p.queries));
  store_row(parts, dim, weight == 0.f ? 0.f : 1.f / weight, place.at<T>(p.out, p.out_stride));
}

void cached_combine(const CachedAttention& c, int64_t begin, int64_t end) {
  with_dtype(c.rows.dtype, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) combine_row<decltype(t)>(c, row);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
