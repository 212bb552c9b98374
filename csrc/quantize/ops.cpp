#include <optional>

#include "quantize/search.h"

namespace arimg {
namespace {

// Each group of rows among the codes that it may have.
void search_allowed(const Codebook& book, const Allowed& allowed, const Tensor& x, int64_t* index) {
  int64_t rows = x.size(0) / allowed.groups;
  int64_t row_bytes = book.dim * (dtype_of(x) == DType::f32 ? 4 : 2);
  for (int64_t group = 0; group < allowed.groups; ++group, index += rows) {
    std::vector<int32_t> chosen;
    for (int64_t code = 0; code < book.count; ++code)
      if (allowed.codes[group * book.count + code]) chosen.push_back(int32_t(code));
    const char* first = (const char*)x.const_data_ptr() + group * rows * row_bytes;
    Codebook subset = book;
    subset.count = int64_t(chosen.size());
    if (!chosen.empty()) search_codes(subset, chosen.data(), dtype_of(x), first, rows, index);
    for (int64_t row = 0; row < rows; ++row) index[row] = chosen.empty() ? -1 : chosen[size_t(index[row])];
  }
}

// allowed: bool [groups, K], for equal runs of rows.
Tensor nearest_code_op(const Tensor& x, const Tensor& codebook, int64_t metric,
                       const std::optional<Tensor>& allowed) {
  Codebook book = codebook_of(x, codebook, metric);
  int64_t rows = x.size(0);
  Allowed groups;
  if (allowed.has_value()) {
    require(is_matrix(*allowed) && allowed->scalar_type() == ScalarType::Bool && allowed->size(0) > 0 &&
                allowed->size(1) == book.count && rows % allowed->size(0) == 0,
            "arimg: expected contiguous bool allowed [groups, K], groups a divisor of the rows");
    groups = {(const bool*)allowed->const_data_ptr(), allowed->size(0)};
  }
  Tensor index = empty(x, std::vector<int64_t>{rows}, ScalarType::Long);
  if (rows == 0) return index;
  int64_t* out = (int64_t*)index.mutable_data_ptr();
  if (on_gpu(x)) {
    GpuScope scope(x);
    GpuCodes(book, x, scope.stream(), groups).search(dtype_of(x), x.const_data_ptr(), rows, out);
  } else if (groups.codes != nullptr) {
    search_allowed(book, groups, x, out);
  } else {
    search_codes(book, nullptr, dtype_of(x), x.const_data_ptr(), rows, out);
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
  m.def("nearest_code(Tensor x, Tensor codebook, int metric, Tensor? allowed=None) -> Tensor");
  m.def("lookup_backward(Tensor grad, Tensor indices, int count) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code_op));
  m.impl("lookup_backward", TORCH_BOX(&lookup_backward_op));
}

}  // namespace arimg
