#include <optional>
#include <vector>

#include "attention/linear_contract.h"
#include "core/ops.h"
#include "core/scratch.h"

namespace arimg {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Some ten microseconds of work per thread at least.
int64_t unit_grain(const GatedScan& p) {
  return 1 + (1 << 18) / (scan_unit_heads(p) * (p.length + 1) * p.dim * p.value_dim + 1);
}

void run(const GatedScan& p, const Tensor& v) {
  if (p.batch == 0 || p.heads == 0) return;
  if (on_gpu(v)) {
    GpuScope scope(v);
    check(ARIMG_GPU(gated_scan_cuda(p, scope.stream())), "gated_scan");
    return;
  }
  int64_t floats = ARIMG_CPU(gated_scan_scratch)(p);
  parallel_for(scan_units(p), unit_grain(p), [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(floats);
    ARIMG_CPU(gated_scan)(p, begin, end, scratch.get());
  });
}

ScanStrides strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// [batch, heads, length, channels] with contiguous channels.
ScanStrides rows(const Tensor& t, const GatedScan& p, int64_t heads, int64_t channels) {
  require(t.dim() == 4 && t.size(0) == p.batch && t.size(1) == heads && t.size(2) == p.length &&
              t.size(3) == channels && (t.stride(3) == 1 || channels == 1) && dtype_of(t) == p.dtype,
          "arimg: expected q, k [B, G, L, N] and v, base [B, H, L, P] of one dtype with contiguous channels");
  return strides(t);
}

const float* per_head(const MaybeTensor& t, const GatedScan& p) {
  if (!t) return nullptr;
  require(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == p.heads,
          "arimg: expected contiguous float32 rate and skip [H]");
  return (const float*)t->const_data_ptr();
}

GatedScan describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate) {
  require(q.dim() == 4 && v.dim() == 4, "arimg: expected q, k, v of four dimensions");
  GatedScan p{};
  p.dtype = dtype_of(v);
  p.batch = v.size(0), p.heads = v.size(1), p.length = v.size(2), p.value_dim = v.size(3);
  p.groups = q.size(1), p.dim = q.size(3);
  require(p.heads == 0 || (p.groups > 0 && p.heads % p.groups == 0), "arimg: expected whole heads per group");
  require(p.dim > 0 && p.dim <= kScanMaxDim && p.value_dim > 0 && p.value_dim <= kScanMaxDim,
          "arimg: expected 1 to 256 channels");
  p.q_stride = rows(q, p, p.groups, p.dim);
  p.k_stride = rows(k, p, p.groups, p.dim);
  p.v_stride = rows(v, p, p.heads, p.value_dim);
  require(gate.scalar_type() == ScalarType::Float && gate.dim() == 3 && gate.size(0) == p.batch &&
              gate.size(1) == p.heads && gate.size(2) == p.length,
          "arimg: expected a float32 gate [B, H, L]");
  p.gate_stride = strides(gate);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.gate = (const float*)gate.const_data_ptr();
  return p;
}

// The result lies in memory as [B, L, H, P]: what the projection after it reads.
std::tuple<Tensor, Tensor> gated_scan_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& gate, const MaybeTensor& rate, const MaybeTensor& skip,
                                         const MaybeTensor& base, const MaybeTensor& state, int64_t chunk,
                                         double scale, bool causal) {
  GatedScan p = describe(q, k, v, gate);
  require(chunk > 0 && (causal || p.length % chunk == 0), "arimg: expected whole chunks");
  p.rate = per_head(rate, p);
  p.skip = per_head(skip, p);
  if (base) {
    p.base_stride = rows(*base, p, p.heads, p.value_dim);
    p.base = base->const_data_ptr();
  }
  std::vector<int64_t> state_sizes{p.batch, p.heads, p.dim, p.value_dim};
  if (state) {
    require(state->scalar_type() == ScalarType::Float && state->is_contiguous() && state->dim() == 4 &&
                state->numel() == p.batch * p.heads * p.dim * p.value_dim,
            "arimg: expected a contiguous float32 state [B, H, N, P]");
    p.state = (const float*)state->const_data_ptr();
  }
  p.chunk = chunk;
  p.scale = float(scale);
  p.causal = causal;
  Tensor out = empty(v, std::vector<int64_t>{p.batch, p.length, p.heads, p.value_dim}, v.scalar_type());
  Tensor new_state = empty(v, state_sizes, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.out_stride = {out.stride(0), out.stride(2), out.stride(1)};
  p.new_state = (float*)new_state.mutable_data_ptr();
  run(p, v);
  return {out, new_state};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "gated_scan(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? rate, Tensor? skip, Tensor? base, "
      "Tensor? state, SymInt chunk, float scale, bool causal) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("gated_scan", TORCH_BOX(&gated_scan_op));
}

}  // namespace arimg
