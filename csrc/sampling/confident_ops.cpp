#include <memory>
#include <optional>

#include "sampling/confident.h"
#include "sampling/rows.h"

namespace arimg {
namespace {

bool has_rows(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1);
}

Tensor keep_confident_op(const Tensor& confidence, const std::optional<Tensor>& counts, int64_t count,
                         const std::optional<Tensor>& candidates) {
  require(has_rows(confidence) && confidence.size(1) <= max_vocabulary,
          "arimg: expected confidence [R, L] with contiguous rows");
  KeepConfident p{};
  p.dtype = dtype_of(confidence);
  p.confidence = confidence.const_data_ptr();
  p.row_stride = confidence.stride(0);
  p.rows = confidence.size(0);
  p.length = confidence.size(1);
  if (candidates.has_value()) {
    require(has_rows(*candidates) && candidates->scalar_type() == ScalarType::Bool &&
                candidates->device() == confidence.device() && candidates->size(0) == p.rows &&
                candidates->size(1) == p.length,
            "arimg: expected bool candidates [R, L] with contiguous rows");
    p.candidates = static_cast<const uint8_t*>(candidates->const_data_ptr());
    p.candidate_stride = candidates->stride(0);
  }
  p.counts = values<int64_t>(counts, confidence, ScalarType::Long, p.rows,
                             "arimg: expected int64 counts, one per row");
  p.count = count;
  Tensor out = empty(confidence, std::initializer_list<int64_t>{p.rows, p.length}, ScalarType::Bool);
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (p.rows == 0 || p.length == 0) return out;
  if (on_gpu(confidence)) {
    GpuScope scope(confidence);
    check(ARIMG_GPU(keep_confident_cuda(p, scope.stream())), "keep_confident");
  } else {
    parallel_for(p.rows, row_grain(p.length), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(p.length))]);
      ARIMG_CPU(keep_confident)(p, begin, end, workspace.get());
    });
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("keep_confident(Tensor confidence, Tensor? counts, int count, Tensor? candidates) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("keep_confident", TORCH_BOX(&keep_confident_op));
}

}  // namespace arimg
