#include "quantize/search.h"

namespace arimg {
namespace {

bool is_matrix(const Tensor& t) {
  return t.dim() == 2 && t.is_contiguous();
}

Tensor nearest_code_op(const Tensor& x, const Tensor& codebook, int64_t metric) {
  require(is_matrix(x) && is_matrix(codebook) && x.size(1) == codebook.size(1) && codebook.numel() > 0,
          "arimg: expected contiguous x [N, D] and codebook [K, D] with K, D > 0");
  require(metric >= 0 && metric <= 2, "arimg: expected metric 0 (l2), 1 (cosine) or 2 (dot)");
  require(codebook.size(0) < (int64_t(1) << 31), "arimg: expected fewer than 2^31 codes");
  int64_t rows = x.size(0);
  Tensor index = empty(x, std::vector<int64_t>{rows}, ScalarType::Long);
  if (rows == 0) return index;
  Codebook book{dtype_of(codebook), codebook.const_data_ptr(), codebook.size(0), codebook.size(1),
                Metric(metric)};
  int64_t* out = (int64_t*)index.mutable_data_ptr();
  if (on_gpu(x)) {
    GpuScope scope(x);
    GpuCodes(book, x, scope.stream()).search(dtype_of(x), x.const_data_ptr(), rows, out);
  } else {
    PackedCodes(book).search(dtype_of(x), x.const_data_ptr(), rows, out);
  }
  return index;
}

Tensor lookup_backward_op(const Tensor& grad, const Tensor& indices, int64_t count) {
  require(is_matrix(grad) && indices.is_contiguous() && indices.numel() == grad.size(0) &&
              indices.scalar_type() == ScalarType::Long && count >= 0,
          "arimg: expected contiguous grad [N, D] and int64 indices [N]");
  int64_t dim = grad.size(1);
  Tensor out = empty(grad, std::vector<int64_t>{count, dim}, grad.scalar_type());
  if (out.numel() == 0) return out;
  LookupBackward p{dtype_of(grad),
                   grad.const_data_ptr(),
                   (const int64_t*)indices.const_data_ptr(),
                   out.mutable_data_ptr(),
                   grad.size(0),
                   dim,
                   count};
  if (on_gpu(grad)) {
    GpuScope scope(grad);
    check(ARIMG_GPU(lookup_backward_cuda(p, scope.stream())), "lookup_backward");
  } else {
    // Each thread reads all indices, so a part is not small.
    parallel_for(count, 1 + (int64_t(1) << 16) / dim, [&](int64_t begin, int64_t end) {
      Scratch sums = make_scratch((end - begin) * dim);
      ARIMG_CPU(lookup_backward)(p, sums.get(), begin, end);
    });
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("nearest_code(Tensor x, Tensor codebook, int metric) -> Tensor");
  m.def("lookup_backward(Tensor grad, Tensor indices, int count) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code_op));
  m.impl("lookup_backward", TORCH_BOX(&lookup_backward_op));
}

}  // namespace arimg
