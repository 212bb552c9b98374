#include <memory>
#include <optional>

#include "core/ops.h"
#include "sampling/contract.h"

namespace arimg {
namespace {

// A few tens of microseconds of work per thread at least.
int64_t row_grain(int64_t vocabulary) {
  return 1 + 16384 / (vocabulary + 1);
}

template <typename T>
const T* values(const std::optional<Tensor>& t, const Tensor& like, ScalarType dtype, int64_t count,
                const char* message) {
  if (!t.has_value()) return nullptr;
  require(
      t->scalar_type() == dtype && t->is_contiguous() && t->numel() == count && t->device() == like.device(),
      message);
  return static_cast<const T*>(t->const_data_ptr());
}

// logits [entries, tokens, V] with contiguous rows at one stride, entries doubled by guidance.
Tensor sample_op(const Tensor& logits, const std::optional<Tensor>& seeds, int64_t first_seed,
                 const std::optional<Tensor>& offset, int64_t position, double temperature, int64_t top_k,
                 double top_p, double min_p, std::optional<double> guidance,
                 const std::optional<Tensor>& guidances) {
  Sample p{};
  p.guided = guidance.has_value() || guidances.has_value();
  const int64_t halves = p.guided ? 2 : 1;
  require(logits.dim() == 3 && logits.size(0) % halves == 0 && (logits.stride(2) == 1 || logits.size(2) == 1),
          "arimg: expected logits [entries, tokens, V] with contiguous rows");
  const int64_t entries = logits.size(0) / halves, tokens = logits.size(1);
  require(entries * halves <= 1 || tokens <= 1 || logits.stride(0) == tokens * logits.stride(1),
          "arimg: expected logits whose rows lie at one stride");
  p.dtype = dtype_of(logits);
  p.logits = logits.const_data_ptr();
  p.row_stride = tokens == 1 ? logits.stride(0) : logits.stride(1);
  p.rows = entries * tokens;
  p.vocabulary = logits.size(2);
  p.tokens = tokens;
  p.seeds =
      values<int64_t>(seeds, logits, ScalarType::Long, entries, "arimg: expected int64 seeds, one per row");
  p.first_seed = uint64_t(first_seed);
  p.offset = values<int64_t>(offset, logits, ScalarType::Long, 1, "arimg: expected an int64 position [1]");
  p.position = uint64_t(position);
  p.guidances = values<float>(guidances, logits, ScalarType::Float, entries,
                              "arimg: expected float32 guidance, one per row");
  p.guidance = float(guidance.value_or(1.0));
  p.temperature = float(temperature);
  p.top_k = top_k;
  p.dropped = top_p < 1.0 ? 1.0 - top_p : 0.0;
  p.min_weight = int32_t(__builtin_ceil(min_p * double(1 << 30)));
  Tensor out = empty(logits, std::initializer_list<int64_t>{entries, tokens}, ScalarType::Long);
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  if (p.rows == 0) return out;
  require(p.vocabulary >= 1 && p.vocabulary <= max_vocabulary, "arimg: expected 1 to 2^24 logits per row");
  if (on_gpu(logits)) {
    GpuScope scope(logits);
    check(ARIMG_GPU(sample_cuda(p, scope.stream())), "sample");
  } else {
    parallel_for(p.rows, row_grain(p.vocabulary), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(p.vocabulary))]);
      ARIMG_CPU(sample)(p, begin, end, workspace.get());
    });
  }
  return out;
}

Tensor philox_uniform_op(const Tensor& seeds, int64_t position, int64_t n, int64_t draw) {
  require(seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == ScalarType::Long && n >= 0,
          "arimg: expected contiguous int64 seeds [R] and n >= 0");
  Tensor out = empty(seeds, std::initializer_list<int64_t>{seeds.size(0), n}, ScalarType::Float);
  PhiloxUniform p{static_cast<const int64_t*>(seeds.const_data_ptr()),
                  seeds.size(0),
                  n,
                  uint64_t(position),
                  uint32_t(draw),
                  static_cast<float*>(out.mutable_data_ptr())};
  if (p.rows == 0 || n == 0) return out;
  if (on_gpu(seeds)) {
    GpuScope scope(seeds);
    check(ARIMG_GPU(philox_uniform_cuda(p, scope.stream())), "philox_uniform");
  } else {
    parallel_for(p.rows, 1 + 4096 / n,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(philox_uniform)(p, begin, end); });
  }
  return out;
}

Tensor exp_weights_op(const Tensor& d) {
  require(d.dim() == 1 && d.is_contiguous() && d.scalar_type() == ScalarType::Float,
          "arimg: expected float32 [N]");
  Tensor out = empty(d, std::initializer_list<int64_t>{d.size(0)}, ScalarType::Int);
  auto* from = static_cast<const float*>(d.const_data_ptr());
  auto* to = static_cast<int32_t*>(out.mutable_data_ptr());
  if (on_gpu(d)) {
    GpuScope scope(d);
    check(ARIMG_GPU(exp_weights_cuda(from, to, d.size(0), scope.stream())), "exp_weights");
  } else {
    ARIMG_CPU(exp_weights)(from, to, d.size(0));
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "sample(Tensor logits, Tensor? seeds, int first_seed, Tensor? offset, int position, "
      "float temperature, int top_k, float top_p, float min_p, float? guidance, Tensor? guidances) -> "
      "Tensor");
  m.def("philox_uniform(Tensor seeds, int position, int n, int draw) -> Tensor");
  m.def("exp_weights(Tensor d) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("sample", TORCH_BOX(&sample_op));
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform_op));
  m.impl("exp_weights", TORCH_BOX(&exp_weights_op));
}

}  // namespace arimg
