// See accept_contract.h. One block per token. Each block repeats the tests of its row, which read a few
// numbers each, so that no block waits for another; then it copies its draft or draws in one pass over its
// law.
#include "core/cuda.h"
#include "core/math.h"
#include "sampling/accept_contract.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256;
typedef unsigned long long Mass;

template <bool vectors>
__device__ __forceinline__ void load_weights(uint32_t (&to)[4], const int32_t* from, int i, int count) {
  if constexpr (vectors) {
    const uint4 w = *reinterpret_cast<const uint4*>(from + i);
    to[0] = w.x, to[1] = w.y, to[2] = w.z, to[3] = w.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = i + k < count ? uint32_t(from[i + k]) : 0;
  }
}

// The masses of four neighbouring tokens.
template <bool vectors>
struct Weights {
  const int32_t* p;
  int count, without;
  __device__ __forceinline__ void four(int i, Mass (&m)[4]) const {
    uint32_t w[4];
    load_weights<vectors>(w, p, i, count);
#pragma unroll
    for (int k = 0; k < 4; ++k) m[k] = i + k == without ? 0 : w[k];
  }
};

template <bool vectors>
struct Residual {
  const int32_t* p;
  const int32_t* q;
  Scale p_scale, q_scale;
  int count;
  __device__ __forceinline__ void four(int i, Mass (&m)[4]) const {
    uint32_t a[4], b[4];
    load_weights<vectors>(a, p, i, count);
    load_weights<vectors>(b, q, i, count);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Mass x = mass_of(int32_t(a[k]), p_scale), y = mass_of(int32_t(b[k]), q_scale);
      m[k] = x > y ? x - y : 0;
    }
  }
};

struct Scratch {
  Shared<Mass> sums;   // a place per warp
  Shared<int> answer;  // one
};

// The first index at which the running sum exceeds draw_below(sum), or -1 where there is no mass. Each warp
// owns a run of neighbouring tokens. All threads get the result.
template <typename M>
__device__ int draw(const M& masses, int count, const Spot& s, uint32_t number, const Scratch& scratch) {
  constexpr int piece = 4 * 32;
  const int pieces = (count + piece - 1) / piece, warps = warps_in_block();
  const int length = (pieces + warps - 1) / warps * piece;
  const int begin = min(warp_in_block() * length, count), end = min(begin + length, count);
  const int lane = lane_in_warp();

  Mass sum = 0;
  for (int i = begin + 4 * lane; i < end; i += piece) {
    Mass m[4];
    masses.four(i, m);
    sum += m[0] + m[1] + m[2] + m[3];
  }
  sum = warp_reduce_sum(sum);
  if (lane == 0) scratch.sums[warp_in_block()] = sum;
  __syncthreads();
  Mass before = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp_in_block()) before += scratch.sums[w];
    total += scratch.sums[w];
  }
  if (total == 0) return -1;
  const Mass target = draw_below(total, s.seed, s.position, number);
  if (target >= before && target - before < sum) {  // true for one whole warp
    for (int base = begin;; base += piece) {
      const int i = base + 4 * lane;
      Mass m[4] = {0, 0, 0, 0};
      if (i < end) masses.four(i, m);
      Mass upto = m[0] + m[1] + m[2] + m[3];
      const Mass own = upto;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const Mass below = __shfl_up_sync(full_warp, upto, step);
        if (lane >= step) upto += below;
      }
      upto += before;
      const unsigned beyond = __ballot_sync(full_warp, upto > target);
      if (beyond) {
        if (lane == __ffs(int(beyond)) - 1) {
          Mass running = upto - own;
          int k = 0;
          while (running + m[k] <= target) running += m[k++];
          scratch.answer[0] = i + k;
        }
        break;
      }
      before = __shfl_sync(full_warp, upto, 31);
    }
  }
  __syncthreads();
  return scratch.answer[0];
}

template <bool vectors>
__device__ int draw_from_p(const Spot& s, int count, int without, uint32_t number, const Scratch& scratch) {
  const int token = draw(Weights<vectors>{s.p, count, without}, count, s, number, scratch);
  return token < 0 ? 0 : token;
}

template <bool vectors>
__device__ int draw_from_residual(const Spot& s, int count, uint32_t number, const Scratch& scratch) {
  if (s.q) {
    const Residual<vectors> residual{s.p, s.q, scale_of(s.p_total), scale_of(s.q_total), count};
    const int token = draw(residual, count, s, number, scratch);
    if (token >= 0) return token;
    __syncthreads();
  }
  return draw_from_p<vectors>(s, count, s.q ? -1 : int(s.draft), number, scratch);
}

// The token with the smallest exponential(its number) / weight; of equals the first. A thread takes the four
// tokens of a counter.
__device__ int choose(const Spot& s, int count, Shared<Mass> scratch) {
  Mass first = ~Mass(0);
  for (int unit = threadIdx.x; unit / 16 * 64 + unit % 16 < count; unit += threads) {
    const int at = unit / 16 * 64 + unit % 16;
    const Philox4 x = philox(s.seed, s.position, 0, uint32_t(1 + unit));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = at + 16 * k;
      const int32_t weight = i < count ? s.p[i] : 0;
      if (weight == 0) continue;
      const float time = divide(exponential(int32_t(x.word[k])), to_float(weight));
      const Mass candidate = Mass(float_bits(time)) << 32 | uint32_t(i);
      first = candidate < first ? candidate : first;
    }
  }
  first = block_reduce_min(first, ~Mass(0), scratch);
  return first == ~Mass(0) ? 0 : int(uint32_t(first));
}

template <bool vectors>
__global__ void __launch_bounds__(threads) accept_kernel(Accept a) {
  SharedArena arena;
  const Scratch scratch{arena.take<Mass>(32), arena.take<int>(1)};
  auto firsts = arena.take<int>(32);
  const int tokens = int(a.drafts) + 1, count = int(a.vocabulary);
  const int64_t r = blockIdx.x / tokens;
  const int j = int(blockIdx.x % tokens);

  int accepted = int(a.drafts);  // the first draft that is not accepted
  for (int i = threadIdx.x; i < accepted; i += threads)
    if (!accepts_draft(a, r, i)) accepted = i;
  accepted = block_reduce_min(accepted, int(a.drafts), firsts);
  if (j == 0 && threadIdx.x == 0) a.length[r] = accepted + 1;

  const Spot s = spot_of(a, r, j);
  int token = -1;
  if (j < accepted) {
    token = int(s.draft);
  } else if (j == accepted && j < a.drafts) {
    token = draw_from_residual<vectors>(s, count, 2, scratch);
  } else if (j > accepted && a.tail == Tail::couple && s.draft >= 0) {
    const uint32_t number = coupled_draw(a);
    token = accepts(s, number) ? int(s.draft) : draw_from_residual<vectors>(s, count, number + 1, scratch);
  } else if (j > accepted && a.tail == Tail::gumbel) {
    token = choose(s, count, scratch.sums);
  } else if (j == accepted || a.tail == Tail::redraw || a.tail == Tail::couple) {
    token = draw_from_p<vectors>(s, count, -1, 0, scratch);
  }
  if (threadIdx.x == 0) a.tokens[r * tokens + j] = token;
}

}  // namespace

Status accept_cuda(const Accept& a, void* stream) {
  const bool vectors = a.vocabulary % 4 == 0 && reinterpret_cast<uintptr_t>(a.p) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.q) % 16 == 0;
  const size_t shared = shared_bytes<Mass>(32) + shared_bytes<int>(1) + shared_bytes<int>(32);
  const int64_t blocks = a.rows * (a.drafts + 1);
  if (vectors) return ARIMG_LAUNCH((accept_kernel<true>), blocks, threads, shared, stream, a);
  return ARIMG_LAUNCH((accept_kernel<false>), blocks, threads, shared, stream, a);
}

}  // namespace arimg
