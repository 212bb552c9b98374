// See cached.h. The rows of all query heads that share a key head form one tile, so its keys are read once.
#include "attention/cached.h"

#include "attention/attend_cpu.h"

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

// What is stored as T: the cached keys, the fresh ones, or both.
template <typename T>
static Cells<T> cache_cells(const CachedAttention& c, int64_t batch, int64_t kv_head, const void* cached,
                            const AttentionStrides& s, const float* scale, const void* fresh,
                            const AttentionStrides& f, int64_t old) {
  const bool paged = c.cache.page_table != nullptr;
  const int64_t first = paged ? 0 : batch, scale_stride = c.rows.kv_heads * c.cache.page_size;
  Cells<T> cells{};
  cells.data = (const T*)cached + first * s.batch + kv_head * s.head;
  cells.stride = s.row;
  cells.page_size = 1;
  if (paged) {
    cells.page = c.cache.page_table + batch * c.cache.max_pages;
    cells.page_size = c.cache.page_size;
    cells.page_stride = s.batch;
  }
  if (!is_code<T> && fresh) cells.fresh = (const T*)fresh + batch * f.batch + kv_head * f.head;
  cells.fresh_stride = f.row;
  cells.old = old;
  if (is_code<T>) cells.scale = scale + first * scale_stride + kv_head * c.cache.page_size;
  cells.scale_stride = scale_stride;
  return cells;
}
template <typename T>
static Cells<T> key_cells(const CachedAttention& c, int64_t batch, int64_t kv_head, int64_t old) {
  return cache_cells<T>(c, batch, kv_head, c.rows.k, c.rows.k_stride, c.cache.k_scale, c.cache.k_new,
                        c.cache.k_new_stride, old);
}
template <typename T>
static Cells<T> value_cells(const CachedAttention& c, int64_t batch, int64_t kv_head, int64_t old) {
  return cache_cells<T>(c, batch, kv_head, c.rows.v, c.rows.v_stride, c.cache.v_scale, c.cache.v_new,
                        c.cache.v_new_stride, old);
}

template <typename S>
static void store_partial(const CachedAttention& c, const Tile<S>& t, int64_t r, const RowPlace& place,
                          int64_t part) {
  const Attention& p = c.rows;
  float* to =
      c.partial +
      (((place.batch * p.heads + place.head) * p.queries + place.query) * c.parts + part) * (p.dim + 2);
  store_row(t.sums + r * t.padded, t.dim, 1.f, to);
  to[p.dim] = t.highest[r];
  to[p.dim + 1] = t.weight[r];
}

// T: of queries, results and fresh keys; S: of the cache.
template <typename T, typename S>
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
  Tile<S> t(key_cells<S>(c, batch, kv_head, old), value_cells<S>(c, batch, kv_head, old), visible,
            last - first, first, p.queries, p.dim, scratch);
  t.far = 2 * p.batch * p.kv_heads * p.keys * p.dim * int64_t(sizeof(S)) > kFarBytes;
  for (int64_t r = 0; r < t.rows; ++r) {
    RowPlace place(p, batch, kv_head, first + r);
    const float factor = p.scale * (p.head_scale ? p.head_scale[place.head] : 1.f);
    load_row(place.at<const T>(p.q, p.q_stride), t.dim, t.padded, factor, t.queries + r * t.padded);
  }
  const int64_t begin = part * c.part_keys;
  int64_t end = c.parts > 1 ? begin + c.part_keys : visible.keys;
  if (end > visible.keys) end = visible.keys;
  if constexpr (is_code<S>) {
    t.visible = {nullptr, nullptr, 0, old, old, kNoKey};
    attend_tile(t, begin, end < old ? end : old);
    if (end > old)
      attend_tile(
          Tile<T>(t, key_cells<T>(c, batch, kv_head, old), value_cells<T>(c, batch, kv_head, old), visible),
          begin > old ? begin : old, end);
  } else {
    attend_tile(t, begin, end);
  }
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
    using T = decltype(t);
    for (int64_t number = begin; number < end; ++number) switch (c.cache.storage) {
        case Storage::int8:
          cached_unit<T, Int8Code>(c, number, scratch);
          break;
        case Storage::fp8:
          cached_unit<T, Fp8Code>(c, number, scratch);
          break;
        default:
          cached_unit<T, T>(c, number, scratch);
      }
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
