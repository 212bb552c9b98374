#include <tuple>
#include <vector>

#include "core/ops.h"
#include "quantize/statistics.h"

namespace arimg {
namespace {

using Sizes = std::vector<int64_t>;

std::tuple<Tensor, Tensor> code_statistics_op(const Tensor& x, const Tensor& indices, int64_t count) {
  require(x.dim() == 2 && x.is_contiguous() && x.size(1) >= 1 && indices.is_contiguous() &&
              indices.numel() == x.size(0) && indices.scalar_type() == ScalarType::Long && count >= 0,
          "arimg: expected contiguous x [N, D] with D >= 1 and int64 indices [N]");
  Tensor counts = empty(x, Sizes{count}, ScalarType::Long);
  Tensor sums = empty(x, Sizes{count, x.size(1)}, ScalarType::Float);
  CodeStatistics p{dtype_of(x),
                   x.const_data_ptr(),
                   (const int64_t*)indices.const_data_ptr(),
                   x.size(0),
                   x.size(1),
                   count,
                   (int64_t*)counts.mutable_data_ptr(),
                   (float*)sums.mutable_data_ptr()};
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(code_statistics_cuda(p, scope.stream())), "code_statistics");
  } else {
    Tensor starts = empty(x, Sizes{count + 1}, ScalarType::Long);
    Tensor order = empty(x, Sizes{p.rows}, ScalarType::Long);
    int64_t* from = (int64_t*)starts.mutable_data_ptr();
    int64_t* rows = (int64_t*)order.mutable_data_ptr();
    ARIMG_CPU(sort_by_code)(p, from, rows);
    // A few tens of microseconds of additions per thread at least.
    const int64_t per_code = 1 + (p.rows + count) * p.dim / (count + 1);
    parallel_for(count, 1 + (int64_t(1) << 16) / per_code,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(code_statistics)(p, from, rows, begin, end); });
  }
  return {counts, sums};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("code_statistics(Tensor x, Tensor indices, int count) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("code_statistics", TORCH_BOX(&code_statistics_op));
}

}  // namespace arimg
