// See contract.h. One block per row, which is prepared by row_cuda.h.
#include "core/philox.h"
#include "sampling/contract.h"
#include "sampling/row_cuda.h"

namespace arimg {
namespace {

constexpr size_t largest_cache = 160 * 1024;

// The first token with the smallest exponential(its number) / weight: the bits of positive floats are in the
// order of the floats.
template <typename R>
__device__ __forceinline__ int choose(const R& row, const Kept& kept, uint64_t seed, uint64_t position,
                                      Shared<Mass> scratch) {
  Mass first = ~Mass(0);
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const uint32_t weight = kept.weight(row[i], i);
    if (weight == 0) continue;
    const int32_t word = int32_t(philox_number(seed, position, 0, uint32_t(i)));
    const float time = divide(exponential(word), to_float(int32_t(weight)));
    const Mass candidate = Mass(float_bits(time)) << 32 | uint32_t(i);
    first = candidate < first ? candidate : first;
  }
  return int(uint32_t(block_reduce_min(first, ~Mass(0), scratch)));
}

// See `facts` of the contract.
template <typename R>
__device__ __forceinline__ void write_facts(const R& row, const Kept& kept, int64_t token, int64_t* facts,
                                            Shared<Mass> scratch) {
  Mass total = 0, spread = 0;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const float x = row[i];
    const int32_t weight = int32_t(kept.weight(x, i));
    total += Mass(weight);
    if (weight > 0 && x != kept.top)
      spread += Mass(round_to_int(multiply(to_float(weight), subtract(kept.top, x))));
  }
  total = block_reduce_sum(total, scratch);
  spread = block_reduce_sum(spread, scratch);
  if (threadIdx.x == 0) {
    facts[0] = token < row.count ? int64_t(kept.weight(row[int(token)], int(token))) : 0;
    facts[1] = int64_t(total);
    facts[2] = int64_t(spread);
  }
}

// `extras`: forced tokens, Gumbel noise or facts may be asked for.
template <typename T, bool cached, bool extras>
__global__ void __launch_bounds__(extras ? 512 : 1024, 1) sample_kernel(Sample p) {
  SharedArena arena;
  const Tools tools = take_tools(arena);
  const int64_t r = blockIdx.x;
  int64_t forced = -1;
  if constexpr (extras) {
    if (p.forced != nullptr) forced = p.forced[r];
    if (forced >= 0 && p.facts == nullptr) {
      if (threadIdx.x == 0) p.out[r] = forced;
      return;
    }
  }
  const auto row = row_of<T, cached, extras>(p, r, arena.take<float>(cached ? int(p.vocabulary) : 0));
  const Kept kept = prepare(row, tools);
  const uint64_t seed = seed_of(p, r / p.tokens), position = position_of(p, r % p.tokens);
  int64_t token = forced;
  if (extras && p.gumbel) {
    if (forced < 0) token = choose(row, kept, seed, position, tools.scratch);
  } else if (forced < 0) {
    token = find_index(
        row.count, tools, [&](int i) { return Mass(kept.weight(row[i], i)); },
        [&](Mass total) { return Mass(draw_below(total, seed, position, 0)); });
  }
  if constexpr (extras) {
    if (p.facts != nullptr) write_facts(row, kept, token, p.facts + 3 * r, tools.scratch);
  }
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

__global__ void __launch_bounds__(256) exponentials_kernel(const int32_t* words, float* out, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = exponential(words[i]);
}

}  // namespace

Status sample_cuda(const Sample& p, void* stream) {
  if (p.vocabulary > max_vocabulary) return Status::unsupported;
  const bool extras = p.processed || p.forced != nullptr || p.gumbel || p.facts != nullptr;
  const int most = extras ? 512 : 1024;
  const int wanted = p.vocabulary <= 8192 ? 256 : p.vocabulary <= 32768 ? 512 : 1024;
  const int threads = wanted < most ? wanted : most;
  const size_t cache = shared_bytes<float>(size_t(p.vocabulary));
  const bool cached = cache <= largest_cache && tools_bytes + cache <= max_shared_bytes();
  const size_t shared = tools_bytes + (cached ? cache : 0);
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (extras && cached)
      return ARIMG_LAUNCH((sample_kernel<T, true, true>), p.rows, threads, shared, stream, p);
    if (extras) return ARIMG_LAUNCH((sample_kernel<T, false, true>), p.rows, threads, shared, stream, p);
    if (cached) return ARIMG_LAUNCH((sample_kernel<T, true, false>), p.rows, threads, shared, stream, p);
    return ARIMG_LAUNCH((sample_kernel<T, false, false>), p.rows, threads, shared, stream, p);
  });
}

Status philox_uniform_cuda(const PhiloxUniform& p, void* stream) {
  return ARIMG_LAUNCH(philox_uniform_kernel, ceil_div(p.rows * p.columns, 256), 256, 0, stream, p);
}

Status exp_weights_cuda(const float* d, int32_t* weights, int64_t count, void* stream) {
  return ARIMG_LAUNCH(exp_weights_kernel, ceil_div(count, 256), 256, 0, stream, d, weights, count);
}

Status exponentials_cuda(const int32_t* words, float* out, int64_t count, void* stream) {
  return ARIMG_LAUNCH(exponentials_kernel, ceil_div(count, 256), 256, 0, stream, words, out, count);
}

}  // namespace arimg
