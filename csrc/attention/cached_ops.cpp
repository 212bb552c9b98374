#include <vector>

#include "attention/cached.h"
#include "attention/describe.h"
#include "core/scratch.h"

namespace arimg {
namespace {

const int32_t* device_ints(const MaybeTensor& t, const Tensor& q, const char* message) {
  if (!t.has_value()) return nullptr;
  const int64_t rows = q.size(0);
  require(same_device(*t, q) && t->dim() > 0 && t->scalar_type() == ScalarType::Int && t->is_contiguous() &&
              t->size(0) == rows,
          message);
  return (const int32_t*)t->const_data_ptr();
}

// Lengths and pages that live on the CPU are looked at before memory is.
void check_lengths(const CachedAttention& c, int64_t pages) {
  for (int64_t b = 0; b < c.rows.batch; ++b) {
    const int64_t length = c.cache.lengths ? c.cache.lengths[b] : c.rows.keys;
    require(length >= 0 && length <= c.rows.keys, "arimg: expected lengths within the cache");
    for (int64_t n = 0; c.cache.page_table && n * c.cache.page_size < length; ++n) {
      const int64_t page = c.cache.page_table[b * c.cache.max_pages + n];
      require(page >= 0 && page < pages,
              "arimg: expected page numbers of existing pages for all cached keys");
    }
  }
}

Storage storage_of(const Tensor& cache) {
  return cache.scalar_type() == ScalarType::Char            ? Storage::int8
         : cache.scalar_type() == ScalarType::Float8_e4m3fn ? Storage::fp8
                                                            : Storage::same;
}

const float* factors(const MaybeTensor& scale, const Tensor& cache) {
  require(scale.has_value() == (storage_of(cache) != Storage::same),
          "arimg: expected scales with one-byte caches, and only there");
  if (!scale.has_value()) return nullptr;
  require(same_device(*scale, cache) && scale->scalar_type() == ScalarType::Float && scale->is_contiguous() &&
              scale->dim() == 3 && scale->size(0) == cache.size(0) && scale->size(1) == cache.size(1) &&
              scale->size(2) == cache.size(2),
          "arimg: expected contiguous float32 scales [pages, H, page_size]");
  return (const float*)scale->const_data_ptr();
}

// A one-byte cache multiplied out, for the kernels of many rows on GPUs: [B, Hkv, p.keys, D] in q's dtype,
// zero beyond a length.
Tensor multiply_out(const CachedAttention& c, const Tensor& q, const Tensor& cache, const float* scale) {
  const Attention& p = c.rows;
  require(cache.stride(2) == p.dim, "arimg: expected one-byte caches with contiguous rows");
  ReadCache r{};
  r.storage = c.cache.storage;
  r.dtype = p.dtype;
  r.part = {const_cast<void*>(cache.const_data_ptr()), const_cast<float*>(scale), cache.stride(0),
            cache.stride(1)};
  r.pages = {c.cache.page_table, c.cache.max_pages, c.cache.page_size, cache.size(0)};
  r.lengths = c.cache.lengths;
  r.batch = p.batch;
  r.kv_heads = p.kv_heads;
  r.tokens = p.keys;
  r.dim = p.dim;
  Tensor out = empty(q, std::vector<int64_t>{p.batch, p.kv_heads, p.keys, p.dim}, q.scalar_type());
  r.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  GpuScope scope(q);
  check(ARIMG_GPU(read_cache_cuda(r, scope.stream())), "cached_attention");
  return out;
}

void run(CachedAttention& c, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Attention& p = c.rows;
  if (nothing_to_do(p)) return;
  c.parts = 1;
  c.part_keys = on_gpu(q) ? kCachedGpuPartKeys : kCachedPartKeys;
  if (cached_rows(c) <= (on_gpu(q) ? kCachedGpuSplitRows : kCachedSplitRows))
    c.parts = (p.keys + c.cache.fresh + c.part_keys - 1) / c.part_keys;
  if (c.parts < 1) c.parts = 1;
  MaybeTensor partial;
  if (c.parts > 1) {
    int64_t floats = p.batch * p.heads * p.queries * c.parts * (p.dim + 2);
    partial = empty(q, std::vector<int64_t>{floats}, ScalarType::Float);
    c.partial = (float*)partial->mutable_data_ptr();
  }
  if (!q.is_cuda()) check_lengths(c, k.size(0));
  std::optional<Tensor> dense_k, dense_v;
  if (on_gpu(q) && c.cache.storage != Storage::same && cached_rows(c) > kCachedGpuSplitRows) {
    dense_k = multiply_out(c, q, k, c.cache.k_scale);
    dense_v = multiply_out(c, q, v, c.cache.v_scale);
    c.rows.k = dense_k->const_data_ptr();
    c.rows.v = dense_v->const_data_ptr();
    c.rows.k_stride = c.rows.v_stride = strides(*dense_k);
    c.cache.page_table = nullptr;
    c.cache.storage = Storage::same;
  }
  if (on_gpu(q)) {
    GpuScope scope(q);
    check(ARIMG_GPU(cached_attention_cuda(c, scope.stream())), "cached_attention");
    return;
  }
  int64_t tile_rows = cached_rows(c) < kAttentionMaxRows ? cached_rows(c) : kAttentionMaxRows;
  int64_t keys = c.parts > 1 ? c.part_keys : p.keys + c.cache.fresh;
  int64_t grain = 1 + (1 << 19) / (tile_rows * keys * p.dim + 1);
  parallel_for(cached_units(c), grain, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(attention_scratch(tile_rows, p.dim));
    ARIMG_CPU(cached_attention)(c, begin, end, scratch.get());
  });
  if (c.parts > 1)
    parallel_for(p.batch * p.heads * p.queries, 1 + (1 << 14) / (c.parts * p.dim),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(cached_combine)(c, begin, end); });
}

// The result is returned as it lies in memory, [B, Lq, H, D]: what the projection after it reads. `length`
// counts only without `lengths`.
Tensor cached_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, int64_t length,
                           const MaybeTensor& lengths, const MaybeTensor& page_table,
                           const MaybeTensor& k_new, const MaybeTensor& v_new, const MaybeTensor& row_start,
                           const MaybeTensor& row_end, const MaybeTensor& head_scale, double scale,
                           const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  CachedAttention c{};
  c.cache.storage = storage_of(k);
  c.rows = describe_attention(q, k, v, scale, !page_table.has_value(), c.cache.storage != Storage::same);
  c.cache.k_scale = factors(k_scale, k);
  c.cache.v_scale = factors(v_scale, v);
  Attention& p = c.rows;
  c.cache.lengths = device_ints(lengths, q, "arimg: expected contiguous int32 lengths [B]");
  c.cache.page_table = device_ints(page_table, q, "arimg: expected a contiguous int32 page_table [B, pages]");
  c.cache.page_size = p.keys;
  if (c.cache.page_table) {
    require(page_table->dim() == 2, "arimg: expected a contiguous int32 page_table [B, pages]");
    c.cache.max_pages = page_table->size(1);
    p.keys = c.cache.max_pages * c.cache.page_size;
  }
  if (!c.cache.lengths) {
    require(length >= 0 && length <= p.keys, "arimg: expected a length within the cache");
    p.keys = length;
  }
  require(k_new.has_value() == v_new.has_value(), "arimg: expected k_new and v_new together");
  if (k_new.has_value()) {
    Attention fresh = describe_attention(q, *k_new, *v_new, scale, true);
    require(fresh.kv_heads == p.kv_heads, "arimg: expected k_new of the cache's heads");
    c.cache.k_new = fresh.k;
    c.cache.v_new = fresh.v;
    c.cache.k_new_stride = fresh.k_stride;
    c.cache.v_new_stride = fresh.v_stride;
    c.cache.fresh = fresh.keys;
  }
  require(!row_start.has_value() || k_new.has_value(), "arimg: expected intervals only with k_new");
  describe_intervals(p, q, row_start, row_end);
  p.head_scale = head_factors(p, q, head_scale);
  Tensor out = empty(q, std::vector<int64_t>{p.batch, p.queries, p.heads, p.dim}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  p.out_stride = strides_of_rows(out);
  run(c, q, k, v);
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt length, Tensor? lengths, "
      "Tensor? page_table, Tensor? k_new, Tensor? v_new, Tensor? row_start, Tensor? row_end, "
      "Tensor? head_scale, float scale, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("cached_attention", TORCH_BOX(&cached_attention_op));
}

}  // namespace arimg
