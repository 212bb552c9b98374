// See contract.h. One block per row, which is prepared by row_cuda.h.
#include "core/philox.h"
#include "sampling/contract.h"
#include "sampling/row_cuda.h"

namespace arimg {
namespace {

constexpr size_t largest_cache = 160 * 1024;

template <typename T, bool cached>
__global__ void __launch_bounds__(1024, 1) sample_kernel(Sample p) {
  SharedArena arena;
  const Tools tools = take_tools(arena);
  const int64_t r = blockIdx.x;
  const auto row = row_of<T, cached>(p, r, arena.take<float>(cached ? int(p.vocabulary) : 0));
  const Kept kept = prepare(row, tools);
  const uint64_t seed = seed_of(p, r / p.tokens), position = position_of(p, r % p.tokens);
  const int token = find_index(
      row.count, tools, [&](int i) { return Mass(kept.weight(row[i], i)); },
      [&](Mass total) { return Mass(draw_below(total, seed, position, 0)); });
  if (threadIdx.x == 0) p.out[r] = token;
}

__global__ void __launch_bounds__(256) philox_uniform_kernel(PhiloxUniform p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < p.rows * p.columns)
    p.out[i] = philox_uniform(uint64_t(p.seeds[i / p.columns]), p.position + uint64_t(i % p.columns), p.draw);
}

__global__ void __launch_bounds__(256) exp_weights_kernel(const float* d, int32_t* weights, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) weights[i] = exp_weight(d[i]);
}

}  // namespace

Status sample_cuda(const Sample& p, void* stream) {
  if (p.vocabulary > max_vocabulary) return Status::unsupported;
  const int threads = p.vocabulary <= 8192 ? 256 : p.vocabulary <= 32768 ? 512 : 1024;
  const size_t cache = shared_bytes<float>(size_t(p.vocabulary));
  const bool cached = cache <= largest_cache && tools_bytes + cache <= max_shared_bytes();
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (cached)
      return ARIMG_LAUNCH((sample_kernel<T, true>), p.rows, threads, tools_bytes + cache, stream, p);
    return ARIMG_LAUNCH((sample_kernel<T, false>), p.rows, threads, tools_bytes, stream, p);
  });
}

Status philox_uniform_cuda(const PhiloxUniform& p, void* stream) {
  return ARIMG_LAUNCH(philox_uniform_kernel, ceil_div(p.rows * p.columns, 256), 256, 0, stream, p);
}

Status exp_weights_cuda(const float* d, int32_t* weights, int64_t count, void* stream) {
  return ARIMG_LAUNCH(exp_weights_kernel, ceil_div(count, 256), 256, 0, stream, d, weights, count);
}

}  // namespace arimg
