#include <memory>
#include <optional>
#include <tuple>

#include "sampling/accept_contract.h"
#include "sampling/rows.h"

namespace arimg {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// logits [rows (doubled by guidance), V], contiguous. Gives weights [rows, V] and totals [rows].
std::tuple<Tensor, Tensor> token_law_op(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                                        double min_p, std::optional<double> guidance,
                                        const std::optional<Tensor>& guidances) {
  TokenLaw p{};
  p.guided = guidance.has_value() || guidances.has_value();
  require(logits.dim() == 2 && logits.is_contiguous() && logits.size(0) % (p.guided ? 2 : 1) == 0,
          "arimg: expected contiguous logits [rows, V]");
  p.dtype = dtype_of(logits);
  p.logits = logits.const_data_ptr();
  p.row_stride = p.vocabulary = logits.size(1);
  p.rows = logits.size(0) / (p.guided ? 2 : 1);
  p.tokens = 1;
  p.guidances = values<float>(guidances, logits, ScalarType::Float, p.rows,
                              "arimg: expected float32 guidance, one per row");
  p.guidance = float(guidance.value_or(1.0));
  p.temperature = float(temperature);
  p.top_k = top_k;
  p.dropped = top_p < 1.0 ? 1.0 - top_p : 0.0;
  p.min_weight = int32_t(__builtin_ceil(min_p * double(1 << 30)));
  Tensor weights = empty(logits, std::initializer_list<int64_t>{p.rows, p.vocabulary}, ScalarType::Int);
  Tensor totals = empty(logits, std::initializer_list<int64_t>{p.rows}, ScalarType::Long);
  if (p.rows == 0) return {weights, totals};
  require(p.vocabulary >= 1 && p.vocabulary <= max_vocabulary, "arimg: expected 1 to 2^24 logits per row");
  p.weights = data<int32_t>(weights);
  p.totals = data<int64_t>(totals);
  if (on_gpu(logits)) {
    GpuScope scope(logits);
    check(ARIMG_GPU(token_law_cuda(p, scope.stream())), "token_law");
  } else {
    parallel_for(p.rows, 1 + 16384 / (p.vocabulary + 1), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(p.vocabulary))]);
      ARIMG_CPU(token_law)(p, begin, end, workspace.get());
    });
  }
  return {weights, totals};
}

void require_law(const Tensor& weights, const Tensor& totals) {
  require(weights.dim() == 3 && weights.scalar_type() == ScalarType::Int && weights.is_contiguous() &&
              totals.dim() == 2 && totals.scalar_type() == ScalarType::Long && totals.is_contiguous() &&
              totals.size(0) == weights.size(0) && totals.size(1) == weights.size(1),
          "arimg: expected a law: int32 weights [R, N, V] and int64 totals [R, N], contiguous");
}

// p: laws [R, n + 1, V]; q: [R, m, V]; draft [R, n]. Gives tokens [R, n + 1] and lengths [R].
std::tuple<Tensor, Tensor> speculative_accept_op(
    const Tensor& p, const Tensor& p_total, const Tensor& draft, const std::optional<Tensor>& q,
    const std::optional<Tensor>& q_total, const std::optional<Tensor>& q_start,
    const std::optional<Tensor>& p_mass, const std::optional<Tensor>& q_mass,
    const std::optional<Tensor>& seeds, int64_t first_seed, const std::optional<Tensor>& positions,
    int64_t position, const std::optional<Tensor>& steps, int64_t step, int64_t tail) {
  require_law(p, p_total);
  Accept a{};
  a.rows = p.size(0);
  a.drafts = p.size(1) - 1;
  a.vocabulary = p.size(2);
  require(a.drafts >= 0 && draft.dim() == 2 && draft.size(0) == a.rows && draft.size(1) == a.drafts &&
              draft.scalar_type() == ScalarType::Long && draft.is_contiguous(),
          "arimg: expected draft int64 [R, n] for laws [R, n + 1, V]");
  a.p = static_cast<const int32_t*>(p.const_data_ptr());
  a.p_total = static_cast<const int64_t*>(p_total.const_data_ptr());
  a.draft = static_cast<const int64_t*>(draft.const_data_ptr());
  if (q.has_value()) {
    require(q_total.has_value(), "arimg: expected the totals of q");
    require_law(*q, *q_total);
    require(q->size(0) == a.rows && q->size(2) == a.vocabulary, "arimg: expected q [R, m, V] like p");
    a.q = static_cast<const int32_t*>(q->const_data_ptr());
    a.q_total = static_cast<const int64_t*>(q_total->const_data_ptr());
    a.q_laws = q->size(1);
  }
  a.q_start = values<int64_t>(q_start, p, ScalarType::Long, a.rows, "arimg: expected q_start int64 [R]");
  a.p_mass =
      values<int64_t>(p_mass, p, ScalarType::Long, a.rows * a.drafts, "arimg: expected masses int64 [R, n]");
  a.q_mass =
      values<int64_t>(q_mass, p, ScalarType::Long, a.rows * a.drafts, "arimg: expected masses int64 [R, n]");
  require((a.p_mass == nullptr) == (a.q_mass == nullptr),
          "arimg: expected masses of both p and q, or of none");
  static_cast<Stream&>(a) = stream_of(p, a.rows, seeds, first_seed, positions, position);
  a.steps = values<int64_t>(steps, p, ScalarType::Long, 1, "arimg: expected a step int64 [1]");
  a.step = uint64_t(step);
  a.tail = Tail(tail);
  Tensor tokens = empty(p, std::initializer_list<int64_t>{a.rows, a.drafts + 1}, ScalarType::Long);
  Tensor length = empty(p, std::initializer_list<int64_t>{a.rows}, ScalarType::Long);
  if (a.rows == 0) return {tokens, length};
  require(a.vocabulary >= 1 && a.vocabulary <= max_vocabulary, "arimg: expected 1 to 2^24 weights per law");
  a.tokens = data<int64_t>(tokens);
  a.length = data<int64_t>(length);
  if (on_gpu(p)) {
    GpuScope scope(p);
    check(ARIMG_GPU(accept_cuda(a, scope.stream())), "speculative_accept");
  } else {
    parallel_for(a.rows * (a.drafts + 1), 1 + 65536 / (a.vocabulary + 64),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(accept)(a, begin, end); });
  }
  return {tokens, length};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "token_law(Tensor logits, float temperature, int top_k, float top_p, float min_p, float? guidance, "
      "Tensor? guidances) -> (Tensor, Tensor)");
  m.def(
      "speculative_accept(Tensor p, Tensor p_total, Tensor draft, Tensor? q, Tensor? q_total, Tensor? "
      "q_start, Tensor? p_mass, Tensor? q_mass, Tensor? seeds, int first_seed, Tensor? positions, int "
      "position, Tensor? steps, int step, int tail) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("token_law", TORCH_BOX(&token_law_op));
  m.impl("speculative_accept", TORCH_BOX(&speculative_accept_op));
}

}  // namespace arimg
