#include <optional>
#include <vector>

#include "attention/ssd_conv_contract.h"
#include "core/ops.h"
#include "core/scratch.h"

namespace arimg {
namespace {

using MaybeTensor = std::optional<Tensor>;

void run(const CausalConv& p, const Tensor& x) {
  if (p.batch == 0 || p.channels == 0) return;
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(causal_conv1d_cuda(p, scope.stream())), "causal_conv1d");
    return;
  }
  int64_t grain = 1 + (1 << 15) / (kConvRows * p.channels + 1);
  parallel_for(conv_units(p), grain, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch((p.width + 1) * p.channels);
    ARIMG_CPU(causal_conv1d)(p, begin, end, scratch.get());
  });
  ARIMG_CPU(causal_conv1d_tail)(p);
}

const void* contiguous(const MaybeTensor& t, const CausalConv& p, int64_t count) {
  if (!t) return nullptr;
  require(t->is_contiguous() && t->numel() == count && dtype_of(*t) == p.dtype,
          "arimg: expected contiguous weight [C, K], bias [C] and tail [B, K - 1, C] of x's dtype");
  return t->const_data_ptr();
}

std::tuple<Tensor, Tensor> causal_conv1d_op(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                            const MaybeTensor& tail, bool silu) {
  require(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1) && weight.dim() == 2 &&
              weight.size(0) == x.size(2) && weight.size(1) >= 1 && weight.size(1) <= kConvMaxWidth,
          "arimg: expected x [B, L, C] with contiguous channels and weight [C, 1..4]");
  CausalConv p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.length = x.size(1), p.channels = x.size(2);
  p.batch_stride = x.stride(0), p.row_stride = x.stride(1);
  p.width = int(weight.size(1));
  p.x = x.const_data_ptr();
  p.weight = contiguous(weight, p, p.channels * p.width);
  p.bias = contiguous(bias, p, p.channels);
  p.tail = contiguous(tail, p, p.batch * (p.width - 1) * p.channels);
  p.silu = silu;
  Tensor y = empty(x, std::vector<int64_t>{p.batch, p.length, p.channels}, x.scalar_type());
  Tensor new_tail = empty(x, std::vector<int64_t>{p.batch, p.width - 1, p.channels}, x.scalar_type());
  p.y = y.mutable_data_ptr();
  p.new_tail = new_tail.mutable_data_ptr();
  run(p, x);
  return {y, new_tail};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? tail, bool silu) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d_op));
}

}  // namespace arimg
