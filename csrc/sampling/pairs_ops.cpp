#include <memory>
#include <optional>
#include <tuple>

#include "sampling/pairs.h"
#include "sampling/rows.h"

namespace arimg {
namespace {

std::tuple<Tensor, Tensor> sample_bits_op(
    const Tensor& logits, const std::optional<Tensor>& seeds, int64_t first_seed,
    const std::optional<Tensor>& offset, int64_t position, double temperature, int64_t top_k, double top_p,
    double min_p, std::optional<double> guidance, const std::optional<Tensor>& guidances,
    const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks,
    const std::optional<Tensor>& top_ps, const std::optional<Tensor>& min_ps,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& allowed,
    const std::optional<Tensor>& forced, bool odds, bool facts) {
  SampleBits p{};
  static_cast<Rows&>(p) = rows_of(logits, temperature, top_k, top_p, min_p, guidance, guidances);
  const int64_t entries = logits.size(0) / (p.guided ? 2 : 1), tokens = p.tokens, width = p.vocabulary;
  static_cast<Draws&>(p) = draws_of(logits, entries, seeds, first_seed, offset, position);
  set_each(p, logits, entries, temperatures, top_ks, top_ps, min_ps);
  p.processors.bias = plane_of(bias, logits, ScalarType::Float, entries, tokens, width);
  p.processors.allowed = set_of(allowed, logits, entries, tokens, width);
  p.processed = bias.has_value() || allowed.has_value();
  require(odds || width % 2 == 0, "arimg: expected pairs of logits");
  p.odds = odds;
  p.bits = odds ? width : width / 2;
  p.forced =
      values<int64_t>(forced, logits, ScalarType::Long, p.rows * p.bits, "arimg: expected int64 forced bits");
  Tensor out = empty(logits, std::initializer_list<int64_t>{entries, tokens, p.bits}, ScalarType::Bool);
  Tensor told = empty(logits, std::initializer_list<int64_t>{facts ? 2 : 0, entries, tokens, p.bits},
                      ScalarType::Float);
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  p.facts = facts ? static_cast<float*>(told.mutable_data_ptr()) : nullptr;
  if (p.rows == 0) return {out, told};
  if (on_gpu(logits)) {
    GpuScope scope(logits);
    check(ARIMG_GPU(sample_bits_cuda(p, scope.stream())), "sample_bits");
  } else {
    parallel_for(p.rows, row_grain(width), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(width))]);
      ARIMG_CPU(sample_bits)(p, begin, end, workspace.get());
    });
  }
  return {out, told};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "sample_bits(Tensor logits, Tensor? seeds, int first_seed, Tensor? offset, int position, "
      "float temperature, int top_k, float top_p, float min_p, float? guidance, Tensor? guidances, "
      "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? bias, Tensor? allowed, "
      "Tensor? forced, bool odds, bool facts) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("sample_bits", TORCH_BOX(&sample_bits_op));
}

}  // namespace arimg
