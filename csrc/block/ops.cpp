#include "block/contract.h"
#include "core/ops.h"

namespace arimg {
namespace {

// A few microseconds of work per thread at least.
int64_t row_grain(int64_t channels) {
  return 1 + 16384 / (channels + 1);
}

void run(const NormModulate& p, const Tensor& x, const char* op) {
  if (p.rows == 0 || p.channels == 0) return;
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(norm_modulate_cuda(p, scope.stream())), op);
  } else {
    parallel_for(p.rows, row_grain(p.channels),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(norm_modulate)(p, begin, end); });
  }
}

NormModulate describe(const Tensor& x) {
  require(x.dim() == 3 && x.is_contiguous(), "arimg: expected contiguous x [B, L, C]");
  NormModulate p{};
  p.dtype = dtype_of(x);
  p.x = x.const_data_ptr();
  p.rows = x.size(0) * x.size(1);
  p.rows_per_batch = x.size(1) > 0 ? x.size(1) : 1;
  p.channels = x.size(2);
  return p;
}

// [B, 1, C] with contiguous channels; the batch stride is free, so slices of one modulation tensor need no
// copy.
const void* per_batch(const Tensor& t, const Tensor& x, int64_t& stride) {
  require(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == 1 && t.size(2) == x.size(2) &&
              (t.stride(2) == 1 || t.size(2) == 1) && t.scalar_type() == x.scalar_type(),
          "arimg: expected scale, shift and gate [B, 1, C] of x's dtype with contiguous channels");
  stride = t.stride(0);
  return t.const_data_ptr();
}

Tensor norm_modulate_op(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps, bool rms) {
  NormModulate p = describe(x);
  Tensor out = torch::stable::empty_like(x);
  p.scale = per_batch(scale, x, p.scale_stride);
  p.shift = per_batch(shift, x, p.shift_stride);
  p.out = out.mutable_data_ptr();
  p.eps = float(eps);
  p.rms = rms;
  run(p, x, "norm_modulate");
  return out;
}

void add_gated(NormModulate& p, const Tensor& x, const Tensor& y, const Tensor& gate,
               const Tensor& residual) {
  require(y.is_contiguous() && y.numel() == x.numel() && y.scalar_type() == x.scalar_type(),
          "arimg: expected contiguous y of x's shape and dtype");
  p.y = y.const_data_ptr();
  p.gate = per_batch(gate, x, p.gate_stride);
  p.residual = residual.mutable_data_ptr();
}

std::tuple<Tensor, Tensor> gated_residual_norm_op(const Tensor& x, const Tensor& y, const Tensor& gate,
                                                  const Tensor& scale, const Tensor& shift, double eps,
                                                  bool rms) {
  NormModulate p = describe(x);
  Tensor residual = torch::stable::empty_like(x);
  Tensor out = torch::stable::empty_like(x);
  add_gated(p, x, y, gate, residual);
  p.scale = per_batch(scale, x, p.scale_stride);
  p.shift = per_batch(shift, x, p.shift_stride);
  p.out = out.mutable_data_ptr();
  p.eps = float(eps);
  p.rms = rms;
  run(p, x, "gated_residual_norm");
  return {residual, out};
}

Tensor gated_residual_op(const Tensor& x, const Tensor& y, const Tensor& gate) {
  NormModulate p = describe(x);
  Tensor residual = torch::stable::empty_like(x);
  add_gated(p, x, y, gate, residual);
  run(p, x, "gated_residual");
  return residual;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps, bool rms) -> Tensor");
  m.def(
      "gated_residual_norm(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, bool rms) "
      "-> "
      "(Tensor, Tensor)");
  m.def("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate_op));
  m.impl("gated_residual_norm", TORCH_BOX(&gated_residual_norm_op));
  m.impl("gated_residual", TORCH_BOX(&gated_residual_op));
}

}  // namespace arimg
