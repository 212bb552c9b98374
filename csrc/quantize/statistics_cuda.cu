// See statistics.h. One warp per 16 codes and 32 columns passes over all indices, 128 at a time, and adds the
// rows that are its own, in order: no atomics, no sort, one launch.
#include "quantize/statistics.h"

#include "core/cuda.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int OWN_CODES = 16, WARPS = 4, AHEAD = 4;

template <typename T>
__global__ void __launch_bounds__(32 * WARPS) code_statistics_kernel(CodeStatistics p) {
  SharedArena arena;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Shared<float> sums = arena.take<float>(WARPS * OWN_CODES * 32).part(warp * OWN_CODES * 32, OWN_CODES * 32);
  const int64_t begin = (int64_t(blockIdx.x) * WARPS + warp) * OWN_CODES;
  const int64_t column = int64_t(blockIdx.y) * 32 + lane;
  const int64_t end = begin + OWN_CODES < p.count ? begin + OWN_CODES : p.count;
  for (int i = 0; i < OWN_CODES; ++i) sums[i * 32 + lane] = 0.f;
  int64_t rows_of_code = 0;  // of code begin + lane
  for (int64_t first = 0; first < p.rows; first += 32 * AHEAD) {
    int place[AHEAD];
    unsigned pending[AHEAD], any = 0;
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const int64_t row = first + 32 * u + lane;
      const int64_t code = row < p.rows ? p.index[row] : -1;
      place[u] = code >= begin && code < end ? int(code - begin) : -1;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) any |= pending[u] = __ballot_sync(full_warp, place[u] >= 0);
    if (any == 0) continue;
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      while (pending[u] != 0) {
        const int source = __ffs(int(pending[u])) - 1;
        pending[u] &= pending[u] - 1;
        const int own = __shfl_sync(full_warp, place[u], source);
        rows_of_code += lane == own;
        if (column < p.dim)
          sums[own * 32 + lane] += to_float(((const T*)p.x)[(first + 32 * u + source) * p.dim + column]);
      }
    }
  }
  for (int64_t code = begin; code < end; ++code)
    if (column < p.dim) p.sums[code * p.dim + column] = sums[int(code - begin) * 32 + lane];
  if (blockIdx.y == 0 && begin + lane < end) p.counts[begin + lane] = rows_of_code;
}

}  // namespace

Status code_statistics_cuda(const CodeStatistics& p, void* stream) {
  Grid grid(ceil_div(p.count, OWN_CODES * WARPS), ceil_div(p.dim, 32));
  const size_t shared = shared_bytes<float>(WARPS * OWN_CODES * 32);
  return with_dtype(p.dtype, [&](auto t) {
    return ARIMG_LAUNCH((code_statistics_kernel<decltype(t)>), grid, 32 * WARPS, shared, stream, p);
  });
}

}  // namespace arimg
