#include <memory>
#include <optional>
#include <tuple>

#include "sampling/accept_window.h"

namespace arimg {
namespace {

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// logits [entries (doubled by guidance), tokens, V]. Gives weights [entries, tokens, V] and totals.
std::tuple<Tensor, Tensor> token_law_op(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                                        double min_p, std::optional<double> guidance,
                                        const std::optional<Tensor>& guidances,
                                        const std::optional<Tensor>& temperatures,
                                        const std::optional<Tensor>& top_ks,
                                        const std::optional<Tensor>& top_ps,
                                        const std::optional<Tensor>& min_ps) {
  TokenLaw p{};
  static_cast<Rows&>(p) = rows_of(logits, temperature, top_k, top_p, min_p, guidance, guidances);
  const int64_t entries = logits.size(0) / (p.guided ? 2 : 1);
  set_each(p, logits, entries, temperatures, top_ks, top_ps, min_ps);
  Tensor weights =
      empty(logits, std::initializer_list<int64_t>{entries, p.tokens, p.vocabulary}, ScalarType::Int);
  Tensor totals = empty(logits, std::initializer_list<int64_t>{entries, p.tokens}, ScalarType::Long);
  if (p.rows == 0) return {weights, totals};
  p.weights = data<int32_t>(weights);
  p.totals = data<int64_t>(totals);
  if (on_gpu(logits)) {
    GpuScope scope(logits);
    check(ARIMG_GPU(token_law_cuda(p, scope.stream())), "token_law");
  } else {
    parallel_for(p.rows, row_grain(p.vocabulary), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> workspace(new char[size_t(row_workspace(p.vocabulary))]);
      ARIMG_CPU(token_law)(p, begin, end, workspace.get());
    });
  }
  return {weights, totals};
}

// p: laws [R, n + 1, V]; q: [R, m, V]; draft [R, n]. Gives tokens [R, n + 1] and lengths [R].
std::tuple<Tensor, Tensor> speculative_accept_op(
    const Tensor& p, const Tensor& p_total, const Tensor& draft, const std::optional<Tensor>& q,
    const std::optional<Tensor>& q_total, const std::optional<Tensor>& q_start,
    const std::optional<Tensor>& p_mass, const std::optional<Tensor>& q_mass,
    const std::optional<Tensor>& seeds, int64_t first_seed, const std::optional<Tensor>& positions,
    int64_t position, const std::optional<Tensor>& steps, int64_t step, int64_t tail) {
  Accept a{};
  static_cast<Window&>(a) = window_of(p, p_total, draft, q, q_total, q_start);
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
      "Tensor? guidances, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps) -> (Tensor, "
      "Tensor)");
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
