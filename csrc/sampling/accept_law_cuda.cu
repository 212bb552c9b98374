// See accept_contract.h: the weights that `sample` would draw from, written out. One block per row.
#include "sampling/accept_contract.h"
#include "sampling/row_cuda.h"

namespace arimg {
namespace {

constexpr size_t largest_cache = 160 * 1024;

template <typename T, bool cached>
__global__ void __launch_bounds__(1024, 1) token_law_kernel(TokenLaw p) {
  SharedArena arena;
  const Tools tools = take_tools(arena);
  const int64_t r = blockIdx.x;
  const auto row = row_of<T, cached, false>(p, r, arena.take<float>(cached ? int(p.vocabulary) : 0));
  const Kept kept = prepare(row, tools);
  Mass total = 0;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const uint32_t weight = kept.weight(row[i], i);
    p.weights[r * row.count + i] = int32_t(weight);
    total += weight;
  }
  total = block_reduce_sum(total, tools.scratch);
  if (threadIdx.x == 0) p.totals[r] = int64_t(total);
}

}  // namespace

Status token_law_cuda(const TokenLaw& p, void* stream) {
  const int threads = p.vocabulary <= 8192 ? 256 : p.vocabulary <= 32768 ? 512 : 1024;
  const size_t cache = shared_bytes<float>(size_t(p.vocabulary));
  const bool cached = cache <= largest_cache && tools_bytes + cache <= max_shared_bytes();
  const size_t shared = tools_bytes + (cached ? cache : 0);
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (cached) return ARIMG_LAUNCH((token_law_kernel<T, true>), p.rows, threads, shared, stream, p);
    return ARIMG_LAUNCH((token_law_kernel<T, false>), p.rows, threads, shared, stream, p);
  });
}

}  // namespace arimg
