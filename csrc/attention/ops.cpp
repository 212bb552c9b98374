#include <tuple>
#include <vector>

#include "attention/describe.h"
#include "core/scratch.h"

namespace arimg {
namespace {

// Some ten microseconds of work per thread at least.
int64_t tile_grain(const Attention& p) {
  return 1 + (1 << 19) / (p.queries / attention_tiles_per_head(p) * p.keys * p.dim + 1);
}

// A plan of the rows (see contract.h): int32 [tiles + 1], rising from 0 to the number of queries in steps of
// at most tile_rows.
void describe_plan(Attention& p, const Tensor& like, const MaybeTensor& row_tiles, int64_t tile_rows) {
  if (!row_tiles.has_value()) return;
  require(row_tiles->scalar_type() == ScalarType::Int && row_tiles->is_contiguous() &&
              row_tiles->dim() == 1 && row_tiles->size(0) > 1 && tile_rows > 0 &&
              tile_rows <= kAttentionMaxRows,
          "arimg: expected a contiguous int32 plan [tiles + 1] of at most 192 rows per tile");
  p.row_tiles = (const int32_t*)row_tiles->const_data_ptr();
  p.tile_count = row_tiles->size(0) - 1;
  p.tile_rows = tile_rows;
  if (like.is_cuda()) return;  // device memory; the Python side made it
  bool valid = p.row_tiles[0] == 0 && p.row_tiles[p.tile_count] == p.queries;
  for (int64_t t = 0; t < p.tile_count; ++t) {
    int64_t rows = p.row_tiles[t + 1] - p.row_tiles[t];
    valid = valid && rows > 0 && rows <= tile_rows;
  }
  require(valid, "arimg: expected a plan that covers the rows in tiles of at most tile_rows");
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& row_start,
                   const MaybeTensor& row_end, const MaybeTensor& head_scale, int64_t sinks, bool self,
                   double scale) {
  Attention p = describe_attention(q, k, v, scale, true);
  describe_intervals(p, q, row_start, row_end);
  p.head_scale = head_factors(p, q, head_scale);
  require(sinks >= 0 && (!self || p.keys >= p.queries),
          "arimg: expected sinks >= 0, and a key per query for self");
  p.sinks = sinks;
  p.self = self;
  return p;
}

void run(const Attention& p, const Tensor& q) {
  if (nothing_to_do(p)) return;
  if (on_gpu(q)) {
    GpuScope scope(q);
    check(ARIMG_GPU(attention_cuda(p, scope.stream())), "row_interval_attention");
    return;
  }
  parallel_for(attention_tiles(p), tile_grain(p), [&](int64_t begin, int64_t end) {
    int64_t rows = p.queries < kAttentionMaxRows ? p.queries : kAttentionMaxRows;
    Scratch scratch = make_scratch(attention_scratch(rows, p.dim));
    ARIMG_CPU(attention)(p, begin, end, scratch.get());
  });
}

// The result is returned as it lies in memory, [B, L, H, D]: what the projection after it reads.
std::tuple<Tensor, Tensor> row_interval_attention_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const MaybeTensor& row_start, const MaybeTensor& row_end,
                                                     const MaybeTensor& row_tiles, int64_t tile_rows,
                                                     const MaybeTensor& head_scale, int64_t sinks, bool self,
                                                     double scale, bool with_lse) {
  Attention p = describe(q, k, v, row_start, row_end, head_scale, sinks, self, scale);
  describe_plan(p, q, row_tiles, tile_rows);
  Tensor out = empty(q, std::vector<int64_t>{p.batch, p.queries, p.heads, p.dim}, q.scalar_type());
  Tensor lse = empty(q, std::vector<int64_t>{with_lse ? p.batch : 0, p.heads, p.queries}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_stride = strides_of_rows(out);
  p.lse = with_lse ? (float*)lse.mutable_data_ptr() : nullptr;
  run(p, q);
  return {out, lse};
}

void run_backward(const AttentionBackward& b, const Tensor& q) {
  const Attention& p = b.forward;
  if (on_gpu(q)) {
    GpuScope scope(q);
    check(ARIMG_GPU(attention_backward_cuda(b, scope.stream())), "row_interval_attention_backward");
    return;
  }
  parallel_for(p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(attention_backward_scratch(p));
    ARIMG_CPU(attention_backward)(b, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor> row_interval_attention_backward_op(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const MaybeTensor& row_start, const MaybeTensor& row_end, const MaybeTensor& key_rows,
    const MaybeTensor& head_scale, int64_t sinks, bool self, double scale) {
  AttentionBackward b{};
  b.forward = describe(q, k, v, row_start, row_end, head_scale, sinks, self, scale);
  Attention& p = b.forward;
  auto like_q = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == p.batch && t.size(1) == p.heads && t.size(2) == p.queries &&
           t.size(3) == p.dim && (t.numel() == 0 || t.stride(3) == 1) && t.scalar_type() == q.scalar_type();
  };
  require(like_q(grad_out) && like_q(out), "arimg: expected grad_out and out of q's shape and dtype");
  require(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
              lse.numel() == p.batch * p.heads * p.queries,
          "arimg: expected a contiguous float32 lse [B, H, L]");
  p.out = const_cast<void*>(out.const_data_ptr());
  p.out_stride = strides(out);
  p.lse = (float*)const_cast<void*>(lse.const_data_ptr());
  b.grad_out = grad_out.const_data_ptr();
  b.grad_out_stride = strides(grad_out);
  if (key_rows.has_value()) {
    require(key_rows->scalar_type() == ScalarType::Int && key_rows->is_contiguous() &&
                key_rows->numel() == 2 * ((p.keys + kAttentionKeyRows - 1) / kAttentionKeyRows),
            "arimg: expected contiguous int32 key_rows [key tiles, 2]");
    b.key_rows = (const int32_t*)key_rows->const_data_ptr();
  }
  Tensor grad_q = empty(q, q.sizes(), q.scalar_type()), grad_k = empty(k, k.sizes(), q.scalar_type()),
         grad_v = empty(v, v.sizes(), q.scalar_type());
  Tensor delta = empty(q, std::vector<int64_t>{on_gpu(q) ? lse.numel() : 0}, ScalarType::Float);
  b.grad_q = grad_q.mutable_data_ptr();
  b.grad_k = grad_k.mutable_data_ptr();
  b.grad_v = grad_v.mutable_data_ptr();
  b.delta = (float*)delta.mutable_data_ptr();
  if (nothing_to_do(p)) {
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
  } else {
    run_backward(b, q);
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "row_interval_attention(Tensor q, Tensor k, Tensor v, Tensor? row_start, Tensor? row_end, "
      "Tensor? row_tiles, SymInt tile_rows, Tensor? head_scale, SymInt sinks, bool self_key, float scale, "
      "bool with_lse) -> (Tensor, Tensor)");
  m.def(
      "row_interval_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, "
      "Tensor? row_start, Tensor? row_end, Tensor? key_rows, Tensor? head_scale, "
      "SymInt sinks, bool self_key, float scale) -> (Tensor, Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("row_interval_attention", TORCH_BOX(&row_interval_attention_op));
  m.impl("row_interval_attention_backward", TORCH_BOX(&row_interval_attention_backward_op));
}

}  // namespace arimg
