#include <tuple>
#include <vector>

#include "core/ops.h"
#include "pyramid/merge.h"

namespace arimg {
namespace {

using Sizes = std::vector<int64_t>;

Merge merge_of(const Tensor& maps, const Tensor& is_fine) {
  require(maps.dim() == 4 && maps.is_contiguous() && is_fine.dim() == 3 && is_fine.is_contiguous() &&
              is_fine.scalar_type() == ScalarType::Bool && maps.size(0) == is_fine.size(0) &&
              maps.size(2) == 2 * is_fine.size(1) && maps.size(3) == 2 * is_fine.size(2),
          "arimg: expected contiguous maps [B, C, 2h, 2w] and is_fine [B, h, w]");
  return {(const uint8_t*)is_fine.const_data_ptr(), maps.size(0), maps.size(1), is_fine.size(1),
          is_fine.size(2)};
}

// Rows of a few thousand elements in all for a thread.
template <typename F>
void for_rows(const Merge& p, F&& f) {
  parallel_for(p.images * p.channels * p.height, 1 + 8192 / (4 * p.width), f);
}

Tensor merge_op(const Tensor& coarse, const Tensor& fine, const Tensor& is_fine) {
  Merge p = merge_of(fine, is_fine);
  require(coarse.is_contiguous() && coarse.scalar_type() == fine.scalar_type() &&
              coarse.numel() * 4 == fine.numel(),
          "arimg: expected contiguous coarse [B, C, h, w] of fine's dtype");
  Tensor out = torch::stable::empty_like(fine);
  if (out.numel() == 0) return out;
  const int64_t bytes = int64_t(fine.element_size());
  GpuScope scope(fine);
  const void *from_coarse = coarse.const_data_ptr(), *from_fine = fine.const_data_ptr();
  void* to = out.mutable_data_ptr();
  if (on_gpu(fine)) {
    check(ARIMG_GPU(merge_cuda(p, from_coarse, from_fine, to, bytes, scope.stream())), "merge");
    return out;
  }
  for_rows(p, [&](int64_t begin, int64_t end) {
    ARIMG_CPU(merge)(p, from_coarse, from_fine, to, bytes, begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> merge_backward_op(const Tensor& grad, const Tensor& is_fine) {
  Merge p = merge_of(grad, is_fine);
  Tensor to_coarse = empty(grad, Sizes{p.images, p.channels, p.height, p.width}, grad.scalar_type());
  Tensor to_fine = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return {to_coarse, to_fine};
  GpuScope scope(grad);
  const void* from = grad.const_data_ptr();
  void *coarse = to_coarse.mutable_data_ptr(), *fine = to_fine.mutable_data_ptr();
  const DType dtype = dtype_of(grad);
  if (on_gpu(grad)) {
    check(ARIMG_GPU(merge_backward_cuda(p, dtype, from, coarse, fine, scope.stream())), "merge_backward");
    return {to_coarse, to_fine};
  }
  for_rows(p, [&](int64_t begin, int64_t end) {
    ARIMG_CPU(merge_backward)(p, dtype, from, coarse, fine, begin, end);
  });
  return {to_coarse, to_fine};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("merge_two_levels(Tensor coarse, Tensor fine, Tensor is_fine) -> Tensor");
  m.def("merge_two_levels_backward(Tensor grad, Tensor is_fine) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("merge_two_levels", TORCH_BOX(&merge_op));
  m.impl("merge_two_levels_backward", TORCH_BOX(&merge_backward_op));
}

}  // namespace arimg
