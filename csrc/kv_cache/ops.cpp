#include "core/ops.h"

#include <optional>
#include <vector>

#include "kv_cache/contract.h"

namespace arimg {
namespace {

void run(const AppendQkNorm& p, const Tensor& qkv) {
  if (p.batch == 0 || p.tokens == 0 || p.heads == 0 || p.dim == 0) return;
  if (on_gpu(qkv)) {
    GpuScope scope(qkv);
    check(ARIMG_GPU(append_qk_norm_cuda(p, scope.stream())), "append_qk_norm_");
  } else {
    int64_t grain = 1 + 16384 / (p.heads * p.dim);  // a few microseconds of work per thread at least
    parallel_for(p.batch * p.tokens, grain,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(append_qk_norm)(p, begin, end); });
  }
}

void require_cache(const Tensor& cache, const Tensor& qkv, int64_t start) {
  require(cache.dim() == 4 && cache.size(0) == qkv.size(0) && cache.size(1) == qkv.size(3) &&
              cache.size(3) == qkv.size(4) && cache.scalar_type() == qkv.scalar_type(),
          "arimg: expected caches [B, H, Lmax, D] of qkv's dtype");
  require(cache.stride(3) == 1 && cache.stride(2) == cache.size(3),
          "arimg: expected caches with contiguous rows");
  require(start >= 0 && start + qkv.size(1) <= cache.size(2),
          "arimg: expected tokens that fit into the cache");
}

Tensor append_qk_norm_op(const Tensor& k_cache, const Tensor& v_cache, const Tensor& qkv, int64_t start,
                         const std::optional<Tensor>& q_scale, bool l2_norm) {
  require(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.is_contiguous(),
          "arimg: expected contiguous qkv [B, L, 3, H, D]");
  require_cache(k_cache, qkv, start);
  require_cache(v_cache, qkv, start);
  AppendQkNorm p{};
  p.dtype = dtype_of(qkv);
  p.batch = qkv.size(0);
  p.tokens = qkv.size(1);
  p.heads = qkv.size(3);
  p.dim = qkv.size(4);
  p.start = start;
  p.l2_norm = l2_norm;
  Tensor q = empty(qkv, std::vector<int64_t>{p.batch, p.heads, p.tokens, p.dim}, qkv.scalar_type());
  p.qkv = qkv.const_data_ptr();
  p.q = q.mutable_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.k_batch_stride = k_cache.stride(0);
  p.k_head_stride = k_cache.stride(1);
  p.v_batch_stride = v_cache.stride(0);
  p.v_head_stride = v_cache.stride(1);
  if (q_scale.has_value()) {
    require(q_scale->scalar_type() == ScalarType::Float && q_scale->is_contiguous() &&
                q_scale->numel() == p.heads,
            "arimg: expected contiguous float32 q_scale [H]");
    p.q_scale = (const float*)q_scale->const_data_ptr();
  }
  run(p, qkv);
  return q;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "append_qk_norm_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor qkv, SymInt start, Tensor? q_scale, "
      "bool "
      "l2_norm) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("append_qk_norm_", TORCH_BOX(&append_qk_norm_op));
}

}  // namespace arimg
