// Attention of new queries over a cache of ragged lengths, contiguous or in pages, and over uncommitted keys
// that follow it ("fresh").
//
// Batch entry b has lengths[b] cached keys. Contiguous: k and v [batch, kv_heads, capacity, dim]. Paged: k
// and v [pages, kv_heads, page_size, dim], and key n of entry b is key n % page_size of page page_table[b, n
// / page_size]. Every query sees all cached keys and, of the fresh ones, its interval (all without
// intervals). Nothing beyond a length is read. One-byte caches (kv_cache/codes.h) are multiplied out on the
// way; fresh keys are always in q's dtype.
//
// Few queries are split over keys in parts of fixed size, whose sums are then combined in order: a result
// depends neither on the other batch entries nor on the machine.
#pragma once

#include "attention/contract.h"
#include "kv_cache/contract.h"

namespace arimg {

// Where the keys and values of a cache lie, and those that follow it.
struct Cache {
  const int32_t* lengths;     // [batch], or nullptr: all of the capacity
  const int32_t* page_table;  // [batch, max_pages], or nullptr
  int64_t page_size, max_pages;
  const void *k_new, *v_new;  // [batch, kv_heads, fresh, dim]
  int64_t fresh;
  AttentionStrides k_new_stride, v_new_stride;
  Storage storage;
  const float *k_scale, *v_scale;  // [batch or pages, kv_heads, page_size], of one-byte storage
};

struct CachedAttention {
  Attention rows;  // q, out, scale; k and v of the cache, `keys` its capacity; intervals of fresh keys
  Cache cache;
  int64_t parts, part_keys;  // pieces of the keys, and keys of each; one part may have any number of keys
  float* partial;  // [batch, heads, queries, parts, dim + 2]: sums, maximum (on GPUs in powers of two),
                   // weight; if parts > 1
};

// Rows of a key head (queries times heads of the group) up to which keys are split, and keys of a part, a
// multiple of kAttentionKeyTile.
constexpr int64_t kCachedSplitRows = 64, kCachedPartKeys = 1024;
constexpr int64_t kCachedGpuSplitRows = 16, kCachedGpuPartKeys = 256;  // on GPUs, where a part is one block

static inline int64_t cached_rows(const CachedAttention& c) {  // of one key head
  return c.rows.queries * (c.rows.heads / c.rows.kv_heads);
}
static inline int64_t cached_tiles(const CachedAttention& c) {
  return (cached_rows(c) + kAttentionMaxRows - 1) / kAttentionMaxRows;
}
// Units of work: (batch, key head, tile of rows, part of the keys).
static inline int64_t cached_units(const CachedAttention& c) {
  return c.rows.batch * c.rows.kv_heads * cached_tiles(c) * c.parts;
}

ARIMG_CPU_KERNEL(void, cached_attention,
                 (const CachedAttention& c, int64_t begin, int64_t end, float* scratch))
// Rows [begin, end) of [batch, heads, queries].
ARIMG_CPU_KERNEL(void, cached_combine, (const CachedAttention& c, int64_t begin, int64_t end))

Status cached_attention_cuda(const CachedAttention& c, void* stream);

}  // namespace arimg
