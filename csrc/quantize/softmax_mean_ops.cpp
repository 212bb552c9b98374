#include "quantize/search.h"
#include "quantize/softmax_mean.h"

namespace arimg {
namespace {

void run_gpu(const SoftmaxMean& p, const Codebook& book, const Tensor& x) {
  GpuScope scope(x);
  GpuCodes codes(book, x, scope.stream());
  int64_t segments = softmax_mean_segments(p.count);
  Tensor parts =
      empty(x, std::vector<int64_t>{segments > 1 ? segments * p.rows * (p.dim + 2) : 0}, ScalarType::Float);
  [[maybe_unused]] float* at = (float*)parts.mutable_data_ptr();
  check(ARIMG_GPU(softmax_mean_cuda(p, codes.offsets(), at, scope.stream())), "softmax_mean");
}

void run_cpu(const SoftmaxMean& p, const Codebook& book) {
  PackedCodes codes(book);
  Scratch values = make_scratch(ARIMG_CPU(value_floats)(p.count, p.dim));
  ARIMG_CPU(pack_values)(p, values.get());
  parallel_for(p.rows, 1 + (int64_t(1) << 18) / (p.count * p.dim), [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(softmax_mean_scratch)(p.dim));
    ARIMG_CPU(softmax_mean)(p, codes.data(), values.get(), scratch.get(), begin, end);
  });
}

Tensor softmax_mean_op(const Tensor& x, const Tensor& codebook, const Tensor& logits, const Tensor& scale,
                       const Tensor& sigma) {
  Codebook book = codebook_of(x, codebook, int64_t(Metric::l2));
  int64_t rows = x.size(0);
  auto per_row = [&](const Tensor& t) {
    return t.dim() == 1 && t.size(0) == rows && t.is_contiguous() && t.scalar_type() == ScalarType::Float;
  };
  require(dtype_of(x) == DType::f32 && book.dtype == DType::f32,
          "arimg: expected float32 x [N, D] and codebook [K, D]");
  require(
      is_matrix(logits) && logits.size(1) == book.count && (logits.size(0) == rows || logits.size(0) == 1),
      "arimg: expected contiguous logits [N, K] or [1, K]");
  require(per_row(scale) && per_row(sigma), "arimg: expected contiguous float32 scale and sigma [N]");
  Tensor out = empty(x, std::vector<int64_t>{rows, book.dim}, ScalarType::Float);
  if (rows == 0) return out;
  SoftmaxMean p{(const float*)x.const_data_ptr(),
                (const float*)codebook.const_data_ptr(),
                dtype_of(logits),
                logits.const_data_ptr(),
                logits.size(0) == rows ? book.count : 0,
                (const float*)scale.const_data_ptr(),
                (const float*)sigma.const_data_ptr(),
                (float*)out.mutable_data_ptr(),
                rows,
                book.count,
                book.dim};
  if (on_gpu(x))
    run_gpu(p, book, x);
  else
    run_cpu(p, book);
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "codebook_softmax_mean(Tensor x, Tensor codebook, Tensor logits, Tensor scale, Tensor sigma) -> "
      "Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("codebook_softmax_mean", TORCH_BOX(&softmax_mean_op));
}

}  // namespace arimg
