#include "block/activate.h"
#include "core/ops.h"

namespace arimg {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements: some 10 microseconds

Tensor activate_op(const Tensor& x, const std::optional<Tensor>& factor, int64_t activation) {
  require(x.is_contiguous() && activation >= 0 && activation <= int64_t(Activation::relu),
          "arimg: expected contiguous x and a known activation");
  require(!factor || (factor->is_contiguous() && factor->numel() == x.numel() &&
                      factor->scalar_type() == x.scalar_type()),
          "arimg: expected contiguous factor of x's shape and dtype");
  Tensor out = torch::stable::empty_like(x);
  Activate p{dtype_of(x),
             Activation(activation),
             x.const_data_ptr(),
             factor ? factor->const_data_ptr() : nullptr,
             out.mutable_data_ptr(),
             x.numel()};
  if (p.count == 0) return out;
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(activate_cuda(p, scope.stream())), "activate");
  } else {
    parallel_for(p.count, kGrain, [&](int64_t begin, int64_t end) { ARIMG_CPU(activate)(p, begin, end); });
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("activate(Tensor x, Tensor? factor, int activation) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("activate", TORCH_BOX(&activate_op));
}

}  // namespace arimg
