// Tensors -> Window (accept_contract.h), for the family's ops files.
#pragma once

#include "sampling/accept_contract.h"
#include "sampling/rows.h"

namespace arimg {

inline void require_law(const Tensor& weights, const Tensor& totals) {
  require(weights.dim() == 3 && weights.scalar_type() == ScalarType::Int && weights.is_contiguous() &&
              totals.dim() == 2 && totals.scalar_type() == ScalarType::Long && totals.is_contiguous() &&
              totals.size(0) == weights.size(0) && totals.size(1) == weights.size(1),
          "arimg: expected a law: int32 weights [R, N, V] and int64 totals [R, N], contiguous");
}

// p: laws [R, n + 1, V]; q: [R, m, V]; draft [R, n].
inline Window window_of(const Tensor& p, const Tensor& p_total, const Tensor& draft,
                        const std::optional<Tensor>& q, const std::optional<Tensor>& q_total,
                        const std::optional<Tensor>& q_start) {
  require_law(p, p_total);
  Window a{};
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
  return a;
}

}  // namespace arimg
