#include <memory>
#include <optional>
#include <tuple>

#include "sampling/rows.h"

namespace arimg {
namespace {

// Draws all rows of p.
void run_sample(const Sample& p, const Tensor& logits) {
  if (p.rows == 0) return;
  if (on_gpu(logits)) {
    GpuScope scope(logits);
    check(ARIMG_GPU(sample_cuda(p, scope.stream())), "sample");
  } else {
    parallel_for(p.rows, row_grain(p.vocabulary), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(p.vocabulary))]);
      ARIMG_CPU(sample)(p, begin, end, workspace.get());
    });
  }
}

Tensor sample_op(const Tensor& logits, const std::optional<Tensor>& seeds, int64_t first_seed,
                 const std::optional<Tensor>& offset, int64_t position, double temperature, int64_t top_k,
                 double top_p, double min_p, std::optional<double> guidance,
                 const std::optional<Tensor>& guidances) {
  Sample p{};
  static_cast<Rows&>(p) = rows_of(logits, temperature, top_k, top_p, min_p, guidance, guidances);
  const int64_t entries = logits.size(0) / (p.guided ? 2 : 1);
  static_cast<Draws&>(p) = draws_of(logits, entries, seeds, first_seed, offset, position);
  Tensor out = empty(logits, std::initializer_list<int64_t>{entries, p.tokens}, ScalarType::Long);
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  run_sample(p, logits);
  return out;
}

std::tuple<Tensor, Tensor> sample_with_op(
    const Tensor& logits, const std::optional<Tensor>& seeds, int64_t first_seed,
    const std::optional<Tensor>& offset, int64_t position, double temperature, int64_t top_k, double top_p,
    double min_p, std::optional<double> guidance, const std::optional<Tensor>& guidances,
    const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
    const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps,
    const std::optional<Tensor>& seen, double penalty, const std::optional<Tensor>& factor,
    bool multiply_negative, const std::optional<Tensor>& bias, const std::optional<Tensor>& allowed,
    const std::optional<Tensor>& forced, bool gumbel, bool facts) {
  Sample p{};
  static_cast<Rows&>(p) = rows_of(logits, temperature, top_k, top_p, min_p, guidance, guidances);
  const int64_t entries = logits.size(0) / (p.guided ? 2 : 1), tokens = p.tokens, width = p.vocabulary;
  static_cast<Draws&>(p) = draws_of(logits, entries, seeds, first_seed, offset, position);
  set_each(p, logits, entries, temperatures, top_ks, top_ps, min_ps);
  p.processors = {set_of(seen, logits, entries, tokens, width),
                  float(penalty),
                  plane_of(factor, logits, ScalarType::Float, entries, tokens, width),
                  multiply_negative,
                  plane_of(bias, logits, ScalarType::Float, entries, tokens, width),
                  set_of(allowed, logits, entries, tokens, width)};
  p.processed = seen.has_value() || factor.has_value() || bias.has_value() || allowed.has_value();
  p.forced = values<int64_t>(forced, logits, ScalarType::Long, p.rows, "arimg: expected int64 forced tokens");
  p.gumbel = gumbel;
  Tensor out = empty(logits, std::initializer_list<int64_t>{entries, tokens}, ScalarType::Long);
  Tensor told =
      empty(logits, std::initializer_list<int64_t>{facts ? entries : 0, tokens, 3}, ScalarType::Long);
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  p.facts = facts ? static_cast<int64_t*>(told.mutable_data_ptr()) : nullptr;
  run_sample(p, logits);
  return {out, told};
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

Tensor exponentials_op(const Tensor& words) {
  require(words.dim() == 1 && words.is_contiguous() && words.scalar_type() == ScalarType::Int,
          "arimg: expected int32 [N]");
  Tensor out = empty(words, std::initializer_list<int64_t>{words.size(0)}, ScalarType::Float);
  auto* from = static_cast<const int32_t*>(words.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  if (on_gpu(words)) {
    GpuScope scope(words);
    check(ARIMG_GPU(exponentials_cuda(from, to, words.size(0), scope.stream())), "exponentials");
  } else {
    ARIMG_CPU(exponentials)(from, to, words.size(0));
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "sample(Tensor logits, Tensor? seeds, int first_seed, Tensor? offset, int position, "
      "float temperature, int top_k, float top_p, float min_p, float? guidance, Tensor? guidances) -> "
      "Tensor");
  m.def(
      "sample_with(Tensor logits, Tensor? seeds, int first_seed, Tensor? offset, int position, "
      "float temperature, int top_k, float top_p, float min_p, float? guidance, Tensor? guidances, "
      "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? seen, float penalty, "
      "Tensor? factor, bool multiply_negative, Tensor? bias, Tensor? allowed, Tensor? forced, bool gumbel, "
      "bool facts) -> (Tensor, Tensor)");
  m.def("exponentials(Tensor words) -> Tensor");
  m.def("philox_uniform(Tensor seeds, int position, int n, int draw) -> Tensor");
  m.def("exp_weights(Tensor d) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("sample", TORCH_BOX(&sample_op));
  m.impl("sample_with", TORCH_BOX(&sample_with_op));
  m.impl("exponentials", TORCH_BOX(&exponentials_op));
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform_op));
  m.impl("exp_weights", TORCH_BOX(&exp_weights_op));
}

}  // namespace arimg
