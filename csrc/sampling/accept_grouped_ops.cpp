#include <optional>
#include <tuple>

#include "sampling/accept_grouped_contract.h"
#include "sampling/accept_window.h"

namespace arimg {
namespace {

// p: laws [R, n + 1, V]; q: [R, m, V]; draft [R, n]; groups [V]; embedding [V, D]. Gives masses [R, n] of p,
// q.
std::tuple<Tensor, Tensor> group_masses_op(const Tensor& p, const Tensor& p_total, const Tensor& draft,
                                           const std::optional<Tensor>& q,
                                           const std::optional<Tensor>& q_total,
                                           const std::optional<Tensor>& q_start,
                                           const std::optional<Tensor>& groups, int64_t half, int64_t limit,
                                           const std::optional<Tensor>& embedding, double max_distance) {
  GroupMasses g{};
  static_cast<Window&>(g) = window_of(p, p_total, draft, q, q_total, q_start);
  g.groups = values<int32_t>(groups, p, ScalarType::Int, g.vocabulary, "arimg: expected groups int32 [V]");
  require(groups.has_value() || (half >= 1 && half <= largest_half), "arimg: expected 2 to 1024 ranks");
  g.half = int(half);
  g.limit = limit;
  g.dtype = DType::f32;
  if (embedding.has_value()) {
    require(embedding->dim() == 2 && embedding->size(0) == g.vocabulary && embedding->is_contiguous() &&
                embedding->device() == p.device(),
            "arimg: expected an embedding [V, D], contiguous");
    g.embedding = embedding->const_data_ptr();
    g.dtype = dtype_of(*embedding);
    g.width = embedding->size(1);
  }
  g.max_distance = max_distance;
  Tensor p_mass = empty(p, std::initializer_list<int64_t>{g.rows, g.drafts}, ScalarType::Long);
  Tensor q_mass = empty(p, std::initializer_list<int64_t>{g.rows, g.drafts}, ScalarType::Long);
  if (g.rows == 0 || g.drafts == 0) return {p_mass, q_mass};
  require(g.vocabulary >= 1 && g.vocabulary <= max_vocabulary, "arimg: expected 1 to 2^24 weights per law");
  g.p_mass = static_cast<int64_t*>(p_mass.mutable_data_ptr());
  g.q_mass = static_cast<int64_t*>(q_mass.mutable_data_ptr());
  if (on_gpu(p)) {
    GpuScope scope(p);
    check(ARIMG_GPU(group_masses_cuda(g, scope.stream())), "group_masses");
  } else {
    parallel_for(g.rows * g.drafts, row_grain(g.vocabulary),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(group_masses)(g, begin, end); });
  }
  return {p_mass, q_mass};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "group_masses(Tensor p, Tensor p_total, Tensor draft, Tensor? q, Tensor? q_total, Tensor? q_start, "
      "Tensor? groups, int half, int limit, Tensor? embedding, float max_distance) -> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("group_masses", TORCH_BOX(&group_masses_op));
}

}  // namespace arimg
