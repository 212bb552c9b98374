#include "block/norm_backward.h"
#include "core/ops.h"

namespace arimg {
namespace {

const void* rows_like(const Tensor& t, const Tensor& x) {
  require(t.is_contiguous() && t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) &&
              t.size(2) == x.size(2) && t.scalar_type() == x.scalar_type(),
          "arimg: expected contiguous gradients and y of x's shape and dtype");
  return t.const_data_ptr();
}

const void* entries_like(const Tensor& t, const Tensor& x, int64_t& stride) {
  require(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == 1 && t.size(2) == x.size(2) &&
              (t.stride(2) == 1 || t.size(2) == 1) && t.scalar_type() == x.scalar_type(),
          "arimg: expected scale and gate [B, 1, C] of x's dtype with contiguous channels");
  stride = t.stride(0);
  return t.const_data_ptr();
}

void run(const NormBackward& p, const Tensor& x) {
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(norm_backward_cuda(p, scope.stream())), "norm_backward");
    return;
  }
  int64_t grain = 1 + 16384 / (PART_ROWS * p.channels);
  parallel_for(p.batch * parts_of(p), grain,
               [&](int64_t begin, int64_t end) { ARIMG_CPU(norm_backward)(p, begin, end); });
  parallel_for(p.batch, 1 + 16384 / (p.channels * (parts_of(p) + 1)),
               [&](int64_t begin, int64_t end) { ARIMG_CPU(norm_backward_sums)(p, begin, end); });
}

// Gradients of x, scale, shift, y and gate; without grad_out (or y) those of the norm (or the residual) are
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_op(
    const Tensor& x, const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_residual,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& y, const std::optional<Tensor>& gate,
    double eps, bool rms) {
  require(x.dim() == 3 && x.is_contiguous(), "arimg: expected contiguous x [B, L, C]");
  require(grad_out.has_value() == scale.has_value() && y.has_value() == gate.has_value() &&
              (grad_out || grad_residual),
          "arimg: expected scale with grad_out, gate with y, and a gradient");
  NormBackward p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.rows_per_batch = x.size(1);
  p.channels = x.size(2);
  p.eps = float(eps);
  p.rms = rms;
  p.x = x.const_data_ptr();
  if (grad_residual) p.grad_residual = rows_like(*grad_residual, x);
  auto entries = [&](bool wanted) {
    return empty(x, std::vector<int64_t>{p.batch, wanted ? 1 : 0, p.channels}, x.scalar_type());
  };
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_y =
      empty(x, std::vector<int64_t>{p.batch, y ? p.rows_per_batch : 0, p.channels}, x.scalar_type());
  Tensor grads[NORM_SUMS] = {entries(grad_out.has_value()), entries(grad_out.has_value()),
                             entries(y.has_value())};
  p.grad_x = grad_x.mutable_data_ptr();
  if (grad_out) {
    p.grad_out = rows_like(*grad_out, x);
    p.scale = entries_like(*scale, x, p.scale_stride);
    p.sums[0] = grads[0].mutable_data_ptr();
    p.sums[1] = grads[1].mutable_data_ptr();
  }
  if (y) {
    p.y = rows_like(*y, x);
    p.gate = entries_like(*gate, x, p.gate_stride);
    p.grad_y = grad_y.mutable_data_ptr();
    p.sums[2] = grads[2].mutable_data_ptr();
  }
  if (p.batch > 0 && p.channels > 0) {
    Tensor parts =
        empty(x, std::vector<int64_t>{p.batch, parts_of(p), NORM_SUMS, p.channels}, ScalarType::Float);
    p.parts = (float*)parts.mutable_data_ptr();
    run(p, x);
  }
  return {grad_x, grads[0], grads[1], grad_y, grads[2]};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "norm_backward(Tensor x, Tensor? grad_out, Tensor? grad_residual, Tensor? scale, Tensor? y, Tensor? "
      "gate, float eps, bool rms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("norm_backward", TORCH_BOX(&norm_backward_op));
}

}  // namespace arimg
