// See accept_contract.h: the weights that `sample` would draw from, written out.
#include "sampling/accept_contract.h"
#include "sampling/row_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

static void write_law(const List& row, int64_t vocabulary, int32_t* out, int64_t* total) {
  uint64_t sum = 0;
  if (row.index || row.count < vocabulary) {
    __builtin_memset(out, 0, size_t(vocabulary) * sizeof(int32_t));
    for (int64_t i = 0; i < row.count; ++i) out[token_at(row, i)] = row.weight[i];
  } else {
    __builtin_memcpy(out, row.weight, size_t(vocabulary) * sizeof(int32_t));
  }
  for (int64_t i = 0; i < row.count; ++i) sum += uint32_t(row.weight[i]);
  *total = int64_t(sum);
}

void token_law(const TokenLaw& p, int64_t begin, int64_t end, void* workspace) {
  const Workspace w = carve(workspace, p.vocabulary);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r)
      write_law(prepare<T>(p, r, w).list, p.vocabulary, p.weights + r * p.vocabulary, p.totals + r);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
