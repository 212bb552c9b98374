#include "core/ops.h"

#include <optional>
#include <vector>

#include "kv_cache/contract.h"

namespace arimg {
namespace {

using Optional = std::optional<Tensor>;

Storage storage_of(const Tensor& cache, const Tensor* qkv) {
  switch (cache.scalar_type()) {
    case ScalarType::Char:
      return Storage::int8;
    case ScalarType::Float8_e4m3fn:
      return Storage::fp8;
    default:
      require(!qkv || cache.scalar_type() == qkv->scalar_type(),
              "arimg: expected caches of qkv's dtype, int8 or float8_e4m3fn");
      return Storage::same;
  }
}

CachePart part_of(const Tensor& cache, const Optional& scale, Storage storage) {
  require(cache.dim() == 4 && cache.stride(3) == 1 && cache.stride(2) == cache.size(3),
          "arimg: expected caches [pages, H, page_size, D] with contiguous rows");
  CachePart part{cache.mutable_data_ptr(), nullptr, cache.stride(0), cache.stride(1)};
  require(scale.has_value() == (storage != Storage::same),
          "arimg: expected scales with one-byte caches, and only there");
  if (scale.has_value()) {
    require(scale->scalar_type() == ScalarType::Float && scale->is_contiguous() && scale->dim() == 3 &&
                scale->size(0) == cache.size(0) && scale->size(1) == cache.size(1) &&
                scale->size(2) == cache.size(2),
            "arimg: expected contiguous float32 scales [pages, H, page_size]");
    part.scale = (float*)scale->mutable_data_ptr();
  }
  return part;
}

Pages pages_of(const Tensor& cache, const Optional& table, int64_t batch) {
  Pages pages{nullptr, 0, cache.size(2), cache.size(0)};
  if (!table.has_value()) {
    require(cache.size(0) == batch, "arimg: expected a cache row per batch row");
    return pages;
  }
  require(table->scalar_type() == ScalarType::Int && table->is_contiguous() && table->dim() == 2 &&
              table->size(0) == batch && cache.size(2) > 0,
          "arimg: expected a contiguous int32 page_table [B, max_pages]");
  pages.table = (const int32_t*)table->const_data_ptr();
  pages.per_row = table->size(1);
  return pages;
}

// int32 [batch, tokens], or [1, tokens] for all rows.
const int32_t* per_token(const Optional& x, int64_t batch, int64_t tokens, int64_t& stride) {
  stride = 0;
  if (!x.has_value()) return nullptr;
  require(x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->dim() == 2 &&
              (x->size(0) == batch || x->size(0) == 1) && x->size(1) == tokens,
          "arimg: expected contiguous int32 [B or 1, L] positions");
  stride = x->size(0) == 1 ? 0 : tokens;
  return (const int32_t*)x->const_data_ptr();
}

const float* floats(const Optional& x, int64_t count) {
  if (!x.has_value()) return nullptr;
  require(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == count,
          "arimg: expected contiguous float32 weights and tables");
  return (const float*)x->const_data_ptr();
}

void run(const Append& p, const Tensor& qkv) {
  if (p.batch == 0 || p.tokens == 0 || p.dim == 0) return;
  if (on_gpu(qkv)) {
    GpuScope scope(qkv);
    check(ARIMG_GPU(append_cuda(p, scope.stream())), "append_");
  } else {
    int64_t grain = 1 + 32768 / ((p.q_heads + 2 * p.kv_heads) * p.dim);  // some microseconds per thread
    parallel_for(p.batch * p.tokens, grain,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(append)(p, begin, end); });
  }
}

Tensor append_op(const Tensor& k_cache, const Tensor& v_cache, const Optional& k_scale,
                 const Optional& v_scale, const Tensor& qkv, int64_t start, const Optional& positions,
                 const Optional& page_table, int64_t norm, const Optional& q_weight, const Optional& k_weight,
                 double eps, const Optional& cos, const Optional& sin, const Optional& rope_index,
                 bool interleaved) {
  require(qkv.dim() == 4 && qkv.is_contiguous(), "arimg: expected contiguous qkv [B, L, Hq + 2 Hkv, D]");
  Append p{};
  p.dtype = dtype_of(qkv);
  p.batch = qkv.size(0);
  p.tokens = qkv.size(1);
  p.kv_heads = k_cache.size(1);
  p.q_heads = qkv.size(2) - 2 * p.kv_heads;
  p.dim = qkv.size(3);
  require(p.q_heads >= 0 && p.dim <= kMaxHeadDim, "arimg: expected Hq + 2 Hkv heads of 256 channels at most");
  p.storage = storage_of(k_cache, &qkv);
  require(storage_of(v_cache, &qkv) == p.storage, "arimg: expected k_cache and v_cache of one dtype");
  p.k = part_of(k_cache, k_scale, p.storage);
  p.v = part_of(v_cache, v_scale, p.storage);
  for (int d = 0; d < 4; ++d)
    require(k_cache.size(d) == v_cache.size(d), "arimg: expected k_cache and v_cache of one shape");
  require(k_cache.size(3) == p.dim, "arimg: expected caches of qkv's head dim");
  p.pages = pages_of(k_cache, page_table, p.batch);
  p.start = start;
  p.positions = per_token(positions, p.batch, p.tokens, p.positions_stride);
  p.norm = Norm(norm);
  p.q_weight = floats(q_weight, p.norm == Norm::l2 ? p.q_heads : p.dim);
  p.k_weight = floats(k_weight, p.dim);
  p.eps = float(eps);
  if (cos.has_value()) {
    require(sin.has_value() && cos->dim() == 2 && cos->size(1) * 2 == p.dim,
            "arimg: expected cos and sin [P, D / 2]");
    p.table_rows = cos->size(0);
    p.cos = floats(cos, p.table_rows * (p.dim / 2));
    p.sin = floats(sin, p.table_rows * (p.dim / 2));
  }
  p.rope_index = per_token(rope_index, p.batch, p.tokens, p.rope_index_stride);
  p.interleaved = interleaved;
  Tensor q = empty(qkv, std::vector<int64_t>{p.batch, p.q_heads, p.tokens, p.dim}, qkv.scalar_type());
  p.qkv = qkv.const_data_ptr();
  p.q = q.mutable_data_ptr();
  run(p, qkv);
  return q;
}

Tensor read_cache_op(const Tensor& cache, const Optional& scale, const Optional& page_table,
                     const Optional& lengths, int64_t batch, int64_t start, int64_t tokens, int64_t dtype) {
  require(batch >= 0 && start >= 0 && tokens >= 0 && dtype >= 0 && dtype < 3,
          "arimg: expected sizes that are not negative");
  ReadCache p{};
  p.storage = storage_of(cache, nullptr);
  p.dtype = p.storage == Storage::same ? dtype_of(cache) : DType(dtype);
  p.part = part_of(cache, scale, p.storage);
  p.pages = pages_of(cache, page_table, batch);
  p.batch = batch;
  p.kv_heads = cache.size(1);
  p.dim = cache.size(3);
  p.start = start;
  p.tokens = tokens;
  if (lengths.has_value()) {
    require(
        lengths->scalar_type() == ScalarType::Int && lengths->is_contiguous() && lengths->numel() == batch,
        "arimg: expected contiguous int32 lengths [B]");
    p.lengths = (const int32_t*)lengths->const_data_ptr();
  }
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  Tensor out = empty(cache, std::vector<int64_t>{batch, p.kv_heads, tokens, p.dim}, types[int(p.dtype)]);
  p.out = out.mutable_data_ptr();
  if (batch == 0 || p.kv_heads == 0 || tokens == 0 || p.dim == 0) return out;
  if (on_gpu(cache)) {
    GpuScope scope(cache);
    check(ARIMG_GPU(read_cache_cuda(p, scope.stream())), "read_cache");
  } else {
    parallel_for(batch * p.kv_heads, 1 + 65536 / (tokens * p.dim),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(read_cache)(p, begin, end); });
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor qkv, "
      "SymInt start, Tensor? positions, Tensor? page_table, int norm, Tensor? q_weight, Tensor? k_weight, "
      "float eps, Tensor? cos, Tensor? sin, Tensor? rope_index, bool interleaved) -> Tensor");
  m.def(
      "read_cache(Tensor cache, Tensor? scale, Tensor? page_table, Tensor? lengths, SymInt batch, "
      "SymInt start, SymInt tokens, int dtype) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("append_", TORCH_BOX(&append_op));
  m.impl("read_cache", TORCH_BOX(&read_cache_op));
}

}  // namespace arimg
