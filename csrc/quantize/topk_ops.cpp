#include <tuple>

#include "quantize/search.h"
#include "quantize/topk.h"

namespace arimg {
namespace {

void search_gpu(const Codebook& book, const Tensor& x, int k, const Tensor& value, const Tensor& index) {
  GpuScope scope(x);
  int64_t rows = x.size(0);
  GpuCodes codes(book, x, scope.stream());
  int splits = nearest_code_splits(rows, book.count);
  Tensor parts = empty(x, std::vector<int64_t>{splits > 1 ? splits * rows * k : 0}, ScalarType::Long);
  [[maybe_unused]] NearestCodesGpu p{dtype_of(x),
                                     x.const_data_ptr(),
                                     book,
                                     codes.offsets(),
                                     rows,
                                     k,
                                     (float*)value.mutable_data_ptr(),
                                     (int64_t*)index.mutable_data_ptr(),
                                     (uint64_t*)parts.mutable_data_ptr(),
                                     splits};
  check(ARIMG_GPU(nearest_codes_cuda(p, scope.stream())), "nearest_codes");
}

void search_cpu(const Codebook& book, const Tensor& x, int k, const Tensor& value, const Tensor& index) {
  PackedCodes codes(book);
  NearestCodes p{dtype_of(x),
                 x.const_data_ptr(),
                 codes.data(),
                 book.count,
                 book.dim,
                 book.metric,
                 k,
                 (float*)value.mutable_data_ptr(),
                 (int64_t*)index.mutable_data_ptr()};
  parallel_for(x.size(0), 1 + (int64_t(1) << 20) / (book.count * book.dim), [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(nearest_codes_scratch)(book.dim, k));
    ARIMG_CPU(nearest_codes)(p, scratch.get(), begin, end);
  });
}

std::tuple<Tensor, Tensor> nearest_codes_op(const Tensor& x, const Tensor& codebook, int64_t k,
                                            int64_t metric) {
  Codebook book = codebook_of(x, codebook, metric);
  require(k >= 1 && k <= book.count && k <= MAX_NEAREST, "arimg: expected k in [1, min(K, 128)]");
  std::vector<int64_t> shape{x.size(0), k};
  Tensor value = empty(x, shape, ScalarType::Float), index = empty(x, shape, ScalarType::Long);
  if (x.size(0) > 0) (on_gpu(x) ? search_gpu : search_cpu)(book, x, int(k), value, index);
  return {value, index};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("nearest_codes(Tensor x, Tensor codebook, int k, int metric) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("nearest_codes", TORCH_BOX(&nearest_codes_op));
}

}  // namespace arimg
