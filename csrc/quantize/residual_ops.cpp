#include "quantize/residual.h"

#include <tuple>

#include "quantize/search.h"

namespace arimg {
namespace {

void run_cpu(const ResidualCodes& p) {
  std::vector<int64_t> chosen(size_t(p.rows));
  const int64_t grain = 1 + 65536 / p.dim;
  for (int64_t depth = 0; depth < p.depths; ++depth) {
    search_codes(book_of_depth(p, depth), nullptr, depth == 0 ? p.dtype : DType::f32,
                 depth == 0 ? p.x : p.residual, p.rows, chosen.data());
    parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
      ARIMG_CPU(residual_step)(p, depth, chosen.data(), begin, end);
    });
  }
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) { ARIMG_CPU(residual_sum)(p, begin, end); });
}

void run_gpu(const ResidualCodes& p, const Tensor& x) {
  GpuScope scope(x);
  const int splits = nearest_code_splits(p.rows, p.count);
  Tensor offsets = empty(x, std::vector<int64_t>{p.depths * p.count}, ScalarType::Float);
  Tensor parts = empty(x, std::vector<int64_t>{splits > 1 ? splits * p.rows : 0}, ScalarType::Long);
  [[maybe_unused]] float* to = (float*)offsets.mutable_data_ptr();
  [[maybe_unused]] uint64_t* keys = (uint64_t*)parts.mutable_data_ptr();
  check(ARIMG_GPU(residual_codes_cuda(p, to, keys, splits, scope.stream())), "residual_codes");
}

// codebooks: [K, D] each.
std::tuple<Tensor, Tensor> residual_codes_op(const Tensor& x, std::vector<Tensor> codebooks) {
  const int64_t depths = int64_t(codebooks.size());
  require(depths >= 1 && depths <= MAX_DEPTHS, "arimg: expected 1 to 64 codebooks");
  const Codebook first = codebook_of(x, codebooks[0], int64_t(Metric::l2));
  const int64_t rows = x.size(0);
  Tensor index = empty(x, std::vector<int64_t>{rows, depths}, ScalarType::Long);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor residual = empty(x, std::vector<int64_t>{depths > 1 ? rows : 0, first.dim}, ScalarType::Float);
  ResidualCodes p{};
  p.dtype = dtype_of(x);
  p.x = x.const_data_ptr();
  p.book_dtype = first.dtype;
  for (int64_t q = 0; q < depths; ++q) {
    const Codebook book = codebook_of(x, codebooks[size_t(q)], int64_t(Metric::l2));
    require(book.dtype == first.dtype && book.count == first.count,
            "arimg: expected codebooks of one shape and dtype");
    p.books[q] = book.codes;
  }
  p.depths = depths;
  p.count = first.count;
  p.dim = first.dim;
  p.rows = rows;
  p.residual = (float*)residual.mutable_data_ptr();
  p.index = (int64_t*)index.mutable_data_ptr();
  p.quantized = quantized.mutable_data_ptr();
  if (rows == 0) return {index, quantized};
  if (on_gpu(x))
    run_gpu(p, x);
  else
    run_cpu(p);
  return {index, quantized};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("residual_codes(Tensor x, Tensor[] codebooks) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("residual_codes", TORCH_BOX(&residual_codes_op));
}

}  // namespace arimg
