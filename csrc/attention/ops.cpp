#include "attention/contract.h"

#include <memory>
#include <vector>

#include "core/ops.h"

namespace arimg {
namespace {

// Some ten microseconds of work per thread at least.
int64_t tile_grain(const Attention& p) {
  return 1 + (1 << 19) / (attention_tile_rows(p.queries) * p.keys * p.dim + 1);
}

void run(const Attention& p, const Tensor& q, const char* op) {
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.dim == 0) return;
  if (on_gpu(q)) {
    GpuScope scope(q);
    check(ARIMG_GPU(attention_cuda(p, scope.stream())), op);
    return;
  }
  parallel_for(attention_tiles(p), tile_grain(p), [&](int64_t begin, int64_t end) {
    size_t bytes = size_t(attention_scratch(p)) * sizeof(float) + 64;
    auto memory = std::unique_ptr<char[]>(new char[bytes]);
    float* scratch = (float*)((uintptr_t(memory.get()) + 63) / 64 * 64);
    ARIMG_CPU(attention)(p, begin, end, scratch);
  });
}

AttentionStrides strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  auto like_q = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(3) == q.size(3) &&
           t.stride(3) == 1 && t.scalar_type() == q.scalar_type();
  };
  require(q.dim() == 4 && like_q(q) && like_q(k) && like_q(v) && k.size(2) == v.size(2),
          "arimg: expected q, k, v [B, H, L, D] of one dtype with contiguous channels");
  require(q.size(3) % 8 == 0, "arimg: expected a head dim that is a multiple of 8");
  Attention p{};
  p.dtype = dtype_of(q);
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.dim = q.size(3);
  p.q_stride = strides(q);
  p.k_stride = strides(k);
  p.v_stride = strides(v);
  p.scale = float(scale);
  return p;
}

const int32_t* intervals(const Tensor& t, const Attention& p) {
  require(t.scalar_type() == ScalarType::Int && t.is_contiguous() &&
              ((t.dim() == 1 && t.size(0) == p.queries) ||
               (t.dim() == 2 && t.size(0) == p.batch && t.size(1) == p.queries)),
          "arimg: expected contiguous int32 intervals [L] or [B, L]");
  return (const int32_t*)t.const_data_ptr();
}

Tensor row_interval_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_start,
                                 const Tensor& row_end, double scale) {
  Attention p = describe(q, k, v, scale);
  require(row_start.dim() == row_end.dim(), "arimg: expected row_start and row_end of one shape");
  p.row_start = intervals(row_start, p);
  p.row_end = intervals(row_end, p);
  p.interval_stride = row_start.dim() == 2 ? p.queries : 0;
  Tensor out = empty(q, q.sizes(), q.scalar_type());
  p.out = out.mutable_data_ptr();
  p.out_stride = strides(out);
  run(p, q, "row_interval_attention");
  return out;
}

// The result is returned as it lies in memory, [B, Lq, H, D]: what the projection after it reads.
Tensor cached_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, int64_t length,
                           double scale) {
  Attention p = describe(q, k_cache, v_cache, scale);
  require(length >= 0 && length <= p.keys, "arimg: expected a length within the cache");
  p.keys = length;
  Tensor out = empty(q, std::vector<int64_t>{p.batch, p.queries, p.heads, p.dim}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  p.out_stride = {out.stride(0), out.stride(2), out.stride(1)};
  run(p, q, "cached_attention");
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "row_interval_attention(Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor row_end, float scale) "
      "-> "
      "Tensor");
  m.def("cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt length, float scale) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("row_interval_attention", TORCH_BOX(&row_interval_attention_op));
  m.impl("cached_attention", TORCH_BOX(&cached_attention_op));
}

}  // namespace arimg
