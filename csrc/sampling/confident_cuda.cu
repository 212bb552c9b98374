// See confident.h. One block per row; the cut is searched for digit by digit (row_cuda.h).
#include "sampling/confident.h"

#include "sampling/row_cuda.h"

namespace arimg {
namespace {

constexpr size_t largest_cache = 160 * 1024;

// The row as its searches see it, from shared memory or, where it does not fit, from its tensors each time.
// What is no candidate is the NaN whose key is 0, below that of -inf.
template <typename T, bool cached>
struct Confidences {
  const T* values;
  const uint8_t* candidates;  // nullptr: all
  int count;
  Shared<float> cache;

  __device__ __forceinline__ float read(int i) const {
    if (candidates != nullptr && candidates[i] == 0) return bits_float(0xffffffffu);
    const float x = to_float(values[i]);
    return x == x ? x + 0.f : -INFINITY;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (cached) return cache[i];
    return read(i);
  }
};

template <typename T, bool cached>
__global__ void __launch_bounds__(1024) keep_confident_kernel(KeepConfident p) {
  SharedArena arena;
  const Tools tools = take_tools(arena);
  const int64_t r = blockIdx.x;
  Confidences<T, cached> row{static_cast<const T*>(p.confidence) + r * p.row_stride,
                             p.candidates != nullptr ? p.candidates + r * p.candidate_stride : nullptr,
                             int(p.length),
                             {}};
  if constexpr (cached) row.cache = arena.take<float>(row.count);
  uint8_t* out = p.out + r * p.length;
  Mass candidates = 0;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const float x = row.read(i);
    if constexpr (cached) row.cache[i] = x;
    candidates += x == x;
  }
  candidates = block_reduce_sum(candidates, tools.scratch);  // its barriers also publish the cache
  const int64_t count = count_of(p, r);
  Cut cut{0, 0, 0};
  int last_at_cut = row.count;
  if (count > 0 && Mass(count) < candidates) {
    cut = find_cut<false>(row, Kept{}, Mass(count), tools);
    const Mass left = Mass(count) - cut.above;
    if (left < cut.at)
      last_at_cut = find_index(
          row.count, tools, [&](int i) { return Mass(key(row[i]) == cut.key); },
          [&](Mass) { return left - 1; });
  }
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const uint32_t k = key(row[i]);
    out[i] = count > 0 && k != 0 && (k > cut.key || (k == cut.key && i <= last_at_cut));
  }
}

}  // namespace

Status keep_confident_cuda(const KeepConfident& p, void* stream) {
  const int threads = p.length <= 4096 ? 256 : p.length <= 16384 ? 512 : 1024;
  const size_t cache = shared_bytes<float>(size_t(p.length));
  const bool cached = cache <= largest_cache && tools_bytes + cache <= max_shared_bytes();
  const size_t shared = tools_bytes + (cached ? cache : 0);
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (cached) return ARIMG_LAUNCH((keep_confident_kernel<T, true>), p.rows, threads, shared, stream, p);
    return ARIMG_LAUNCH((keep_confident_kernel<T, false>), p.rows, threads, shared, stream, p);
  });
}

}  // namespace arimg
