// See accept_gaussian_contract.h. One block per row; eight threads take a token, then a try, each a lane of
// its sums, so that the block tests sixteen of them at once.
#include "core/cuda.h"
#include "sampling/accept_gaussian_contract.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 128, groups = threads / gaussian_lanes;

// All lanes of the warp take part.
__device__ __forceinline__ double ratio_of(RatioLane lane, double log_sigma) {
  constexpr int n = gaussian_lanes;
  lane.scale.mantissa =
      warp_reduce<n>(lane.scale.mantissa, [](double a, double b) { return multiply(a, b); });
  lane.scale.exponent = warp_reduce_sum<n>(lane.scale.exponent);
  lane.quadratic = warp_reduce_sum<n>(lane.quadratic);
  lane.usable = warp_reduce_min<n>(lane.usable);
  return lane.ratio(log_sigma);
}

__device__ __forceinline__ double normal_number(const GaussianAccept& g, uint64_t seed, uint64_t position,
                                                int64_t t, int64_t i) {
  const Philox4 x = noise_of(g, seed, position, t, i / 4);
  double first, second;
  normal_pair(i & 2 ? x.word[2] : x.word[0], i & 2 ? x.word[3] : x.word[1], first, second);
  return i & 1 ? second : first;
}

// The first token of row r that is rejected, or g.tokens. All threads get it.
template <typename T>
__device__ int first_rejected(const GaussianAccept& g, int64_t r, Shared<int> scratch) {
  const int group = int(threadIdx.x) / gaussian_lanes, tokens = int(g.tokens);
  for (int base = 0; base < tokens; base += groups) {
    const int j = base + group;
    RatioLane lane;
    if (j < tokens)
      for (int64_t i = threadIdx.x % gaussian_lanes; i < g.width; i += gaussian_lanes)
        add_draft<T>(lane, g, r, j, i);
    const double ratio = ratio_of(lane, j < tokens ? log_sigma_of(g, r, j) : 0);
    const bool rejected = j < tokens && !accepts_draft(ratio, seed_of(g, r), position_of(g, r, j));
    const int first = block_reduce_min(rejected ? j : tokens, tokens, scratch);
    if (first < tokens) return first;
  }
  return tokens;
}

// The first try for token j that is accepted, or the last.
template <typename T>
__device__ int first_accepted(const GaussianAccept& g, int64_t r, int j, Shared<int> scratch) {
  const uint64_t seed = seed_of(g, r), position = position_of(g, r, j);
  const int last = int(g.max_tries) - 1;
  for (int base = 0; base < last; base += groups) {
    const int t = base + int(threadIdx.x) / gaussian_lanes;
    RatioLane lane;
    for (int64_t i = threadIdx.x % gaussian_lanes; i < g.width; i += gaussian_lanes)
      add_try<T>(lane, g, r, j, i, normal_number(g, seed, position, t, i));
    const double ratio = ratio_of(lane, log_sigma_of(g, r, j));
    const bool good = t < last && accepts_try(ratio, seed, position, t);
    const int first = block_reduce_min(good ? t : last, last, scratch);
    if (first < last) return first;
  }
  return last;
}

template <typename T>
__global__ void __launch_bounds__(threads) gaussian_accept_kernel(GaussianAccept g) {
  SharedArena arena;
  const auto scratch = arena.take<int>(32);
  const int64_t r = blockIdx.x;
  const int tokens = int(g.tokens), accepted = first_rejected<T>(g, r, scratch);
  const bool rejected = accepted < tokens;
  const int t = rejected ? first_accepted<T>(g, r, accepted, scratch) : -1;
  if (threadIdx.x == 0) {
    g.length[r] = rejected ? accepted + 1 : accepted;
    g.tries[r] = t + 1;
  }
  T* values = static_cast<T*>(g.values) + r * tokens * g.width;
  const T* x = static_cast<const T*>(g.x.data) + r * g.x.row;
  for (int64_t at = threadIdx.x; at < tokens * g.width; at += threads) {
    const int64_t j = at / g.width, i = at % g.width;
    if (j != accepted) values[at] = x[j * g.x.token + i * g.x.component];
  }
  if (!rejected) return;
  const uint64_t seed = seed_of(g, r), position = position_of(g, r, accepted);
  for (int64_t i = threadIdx.x; i < g.width; i += threads) {
    const double value = redrawn<T>(g, r, accepted, i, normal_number(g, seed, position, t, i));
    values[accepted * g.width + i] = from_float<T>(float(value));
  }
}

}  // namespace

Status gaussian_accept_cuda(const GaussianAccept& g, void* stream) {
  if (g.tokens > 1 << 30) return Status::unsupported;
  return with_dtype(g.dtype, [&](auto t) {
    return ARIMG_LAUNCH((gaussian_accept_kernel<decltype(t)>), g.rows, threads, shared_bytes<int>(32), stream,
                        g);
  });
}

}  // namespace arimg
