// See accept_grouped_contract.h. One block per draft. Of a partition it reads the groups' numbers, and p and
// q where they are the draft's. Ranks are found one after another on both sides: each thread holds the
// nearest of its own tokens that is not taken yet, and the thread whose token was taken looks for its next
// one.
#include "core/cuda.h"
#include "sampling/accept_grouped_contract.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256;
constexpr TokenKey none_above = ~TokenKey(0);

__device__ __forceinline__ void write_masses(const GroupMasses& g, TokenKey p, TokenKey q,
                                             Shared<TokenKey> scratch) {
  p = block_reduce_sum(p, scratch);
  q = block_reduce_sum(q, scratch);
  if (threadIdx.x == 0) {
    g.p_mass[blockIdx.x] = int64_t(p);
    g.q_mass[blockIdx.x] = int64_t(q);
  }
}

__global__ void __launch_bounds__(threads) part_masses_kernel(GroupMasses g) {
  SharedArena arena;
  const auto scratch = arena.take<TokenKey>(32);
  const Spot s = spot_of(g, blockIdx.x / g.drafts, blockIdx.x % g.drafts);
  TokenKey p_sum = 0, q_sum = 0;
  if (s.draft >= 0) {
    const Scale p = scale_of(s.p_total), q = scale_of(s.q_total);
    const int count = int(g.vocabulary), part = g.groups[s.draft];
    const auto add = [&](int i, int group) {
      if (group != part) return;
      p_sum += mass_of(s.p[i], p);
      q_sum += q_mass_of(s, q, i);
    };
    for (int i = 4 * int(threadIdx.x); i + 4 <= count; i += 4 * threads) {
      const int4 group = *reinterpret_cast<const int4*>(g.groups + i);
      add(i, group.x), add(i + 1, group.y), add(i + 2, group.z), add(i + 3, group.w);
    }
    const int last = count / 4 * 4 + int(threadIdx.x);
    if (last < count) add(last, g.groups[last]);
  }
  write_masses(g, p_sum, q_sum, scratch);
}

// The thread's smallest key from `least` on, and its largest key below `most`.
__device__ __forceinline__ TokenKey next_above(const Spot& s, int count, TokenKey least) {
  TokenKey next = none_above;
  for (int i = threadIdx.x; i < count; i += threads) {
    const TokenKey key = key_of(s.p[i], i);
    if (key >= least && key < next) next = key;
  }
  return next;
}
// One more than the key, so that 0 says that there is none.
__device__ __forceinline__ TokenKey next_below(const Spot& s, int count, TokenKey most) {
  TokenKey next = 0;
  for (int i = threadIdx.x; i < count; i += threads) {
    const TokenKey key = key_of(s.p[i], i);
    if (key < most && key >= next) next = key + 1;
  }
  return next;
}

// Fills `near` with the neighbours on both sides, one list behind the other; returns their number.
__device__ int find_neighbours(const Spot& s, int count, int half, Shared<TokenKey> near,
                               Shared<TokenKey> scratch) {
  const TokenKey own = key_of(s.p[s.draft], s.draft);
  int found = 0;
  TokenKey mine = next_above(s, count, own);
  for (int k = 0; k < half; ++k) {
    const TokenKey best = block_reduce_min(mine, none_above, scratch);
    if (best == none_above) break;
    if (threadIdx.x == 0) near[found] = best;
    ++found;
    if (mine == best) mine = next_above(s, count, best + 1);
  }
  mine = next_below(s, count, own);
  for (int k = 0; k < half; ++k) {
    const TokenKey best = block_reduce_max(mine, TokenKey(0), scratch);
    if (best == 0) break;
    if (threadIdx.x == 0) near[found] = best - 1;
    ++found;
    if (mine == best) mine = next_below(s, count, best - 1);
  }
  __syncthreads();
  return found;
}

template <typename T>
__global__ void __launch_bounds__(threads) rank_masses_kernel(GroupMasses g) {
  SharedArena arena;
  const auto scratch = arena.take<TokenKey>(32);
  const auto near = arena.take<TokenKey>(2 * g.half);
  const Spot s = spot_of(g, blockIdx.x / g.drafts, blockIdx.x % g.drafts);
  TokenKey p_sum = 0, q_sum = 0;
  if (s.draft >= 0) {
    const Scale p = scale_of(s.p_total), q = scale_of(s.q_total);
    const int found = find_neighbours(s, int(g.vocabulary), g.half, near, scratch);
    const uint64_t own = mass_of(s.p[s.draft], p);
    const int lane = int(threadIdx.x) % distance_lanes;
    for (int base = 0; base < found; base += threads / distance_lanes) {
      const int k = base + int(threadIdx.x) / distance_lanes;
      const TokenKey key = k < found ? near[k] : 0;
      double distance = 0;
      if (g.embedding != nullptr) {
        if (k < found) distance = distance_lane<T>(g, s.draft, token_of(key), lane);
        distance = warp_reduce_sum<distance_lanes>(distance);
      }
      if (k >= found || lane != 0) continue;
      const uint64_t mass = mass_of(weight_of(key), p);
      const bool close = token_of(key) == s.draft || g.embedding == nullptr || distance <= g.max_distance;
      if (!close || !within_limit(mass, own, g.limit)) continue;
      p_sum += mass;
      q_sum += q_mass_of(s, q, token_of(key));
    }
  }
  write_masses(g, p_sum, q_sum, scratch);
}

}  // namespace

Status group_masses_cuda(const GroupMasses& g, void* stream) {
  const int64_t blocks = g.rows * g.drafts;
  size_t shared = shared_bytes<TokenKey>(32);
  if (g.groups) return ARIMG_LAUNCH(part_masses_kernel, blocks, threads, shared, stream, g);
  shared += shared_bytes<TokenKey>(size_t(2 * g.half));
  return with_dtype(g.dtype, [&](auto t) {
    return ARIMG_LAUNCH((rank_masses_kernel<decltype(t)>), blocks, threads, shared, stream, g);
  });
}

}  // namespace arimg
