// See contract.h. A product of 64 x 64 tiles in registers whose scores are compared instead of stored.
#include "quantize/score_tile.h"
#include "quantize/sort_key.h"

namespace arimg {
namespace {

using namespace cuda;

// The index of a row whose codes all lost: the lowest allowed one.
__device__ int64_t lowest_allowed(const NearestCodeGpu& p, int64_t group) {
  if (p.allowed == nullptr) return 0;
  for (int64_t code = 0; code < p.book.count; ++code)
    if (p.allowed[group * p.book.count + code]) return code;
  return -1;
}

__device__ __forceinline__ int64_t winner(const NearestCodeGpu& p, uint64_t key, int64_t row) {
  if (key_score(key) == INFINITY) return lowest_allowed(p, row / (p.rows / p.groups));
  return key_index(key);
}

template <typename TX, typename TC, int WIDTH>
__global__ void __launch_bounds__(THREADS, 4) nearest_code_kernel(NearestCodeGpu p, int64_t codes_per_part) {
  const int64_t K = p.book.count, group_rows = p.rows / p.groups, row_tiles = ceil_div(group_rows, ROWS);
  const int64_t group = blockIdx.x / row_tiles;
  const int64_t first_row = group * group_rows + blockIdx.x % row_tiles * ROWS;
  const int64_t row_end = (group + 1) * group_rows;
  const int64_t code_begin = blockIdx.y * codes_per_part;
  const int64_t code_end = code_begin + codes_per_part < K ? code_begin + codes_per_part : K;
  SharedArena arena;
  ScoreTile<TX, TC, WIDTH> tile(arena, p.x, p.book, p.offsets + group * K, first_row, row_end);

  float best[THREAD_ROWS];
  int best_index[THREAD_ROWS];
  for (int r = 0; r < THREAD_ROWS; ++r) {
    best[r] = INFINITY;
    best_index[r] = 0;
  }
  for (int64_t first = code_begin; first < code_end; first += CODES) {
    float sum[THREAD_ROWS][THREAD_CODES];
    tile.scores(sum, first, code_end);
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) {
        int64_t code = first + tile.code(c);
        if (sum[r][c] < best[r] && code < code_end) {
          best[r] = sum[r][c];
          best_index[r] = int(code);
        }
      }
  }
  for (int r = 0; r < THREAD_ROWS; ++r) {
    uint64_t key = warp_reduce_min<CODE_LANES>(sort_key(best[r], best_index[r]));
    int64_t row = first_row + tile.row(r);
    if (tile.code_lane() != 0 || row >= row_end) continue;
    if (p.splits == 1)
      p.index[row] = winner(p, key, row);
    else
      p.parts[blockIdx.y * p.rows + row] = key;
  }
}

__global__ void combine_parts_kernel(NearestCodeGpu p) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  uint64_t key = p.parts[row];
  for (int part = 1; part < p.splits; ++part) {
    uint64_t other = p.parts[part * p.rows + row];
    key = other < key ? other : key;
  }
  p.index[row] = winner(p, key, row);
}

template <typename T>
__global__ void code_offsets_kernel(Codebook book, const bool* allowed, int64_t groups, float* offsets) {
  int64_t code = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (code >= book.count) return;
  const T* from = (const T*)book.codes + code * book.dim;
  float squares = 0.f;
  for (int64_t d = 0; d < book.dim; ++d) squares = fmaf(to_float(from[d]), to_float(from[d]), squares);
  float offset = book.metric == Metric::l2 ? 0.5f * squares : 0.f;
  if (book.metric == Metric::cosine) {
    float length = __fsqrt_rn(squares);
    offset = length < 1e-12f ? 1e-12f : length;
  }
  for (int64_t group = 0; group < groups; ++group) {
    int64_t at = group * book.count + code;
    offsets[at] = allowed == nullptr || allowed[at] ? offset : NAN;
  }
}

// One warp per 16 codes and 32 columns: it passes over all indices, 32 at a time, and adds the rows that are
// its own, in order.
constexpr int OWN_CODES = 16, BACKWARD_WARPS = 4;

template <typename T>
__global__ void __launch_bounds__(32 * BACKWARD_WARPS) lookup_backward_kernel(LookupBackward p) {
  SharedArena arena;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Shared<float> all = arena.take<float>(BACKWARD_WARPS * OWN_CODES * 32);
  Shared<float> sums = all.part(warp * OWN_CODES * 32, OWN_CODES * 32);
  const int64_t begin = (int64_t(blockIdx.x) * BACKWARD_WARPS + warp) * OWN_CODES;
  const int64_t column = int64_t(blockIdx.y) * 32 + lane;
  for (int i = 0; i < OWN_CODES; ++i) sums[i * 32 + lane] = 0.f;
  for (int64_t first = 0; first < p.rows; first += 32) {
    int64_t code = first + lane < p.rows ? p.index[first + lane] - begin : -1;
    bool own = code >= 0 && code < OWN_CODES;
    unsigned pending = __ballot_sync(full_warp, own);
    while (pending != 0) {
      int source = __ffs(int(pending)) - 1;
      pending &= pending - 1;
      int place = __shfl_sync(full_warp, own ? int(code) : 0, source);
      if (column < p.dim)
        sums[place * 32 + lane] += to_float(((const T*)p.grad)[(first + source) * p.dim + column]);
    }
  }
  if (column < p.dim)
    for (int i = 0; i < OWN_CODES && begin + i < p.count; ++i)
      ((T*)p.out)[(begin + i) * p.dim + column] = from_float<T>(sums[i * 32 + lane]);
}

}  // namespace

Status code_offsets_cuda(const Codebook& book, const bool* allowed, int64_t groups, float* offsets,
                         void* stream) {
  return with_dtype(book.dtype, [&](auto t) {
    return ARIMG_LAUNCH((code_offsets_kernel<decltype(t)>), ceil_div(book.count, 128), 128, 0, stream, book,
                        allowed, groups, offsets);
  });
}

Status nearest_code_parts_cuda(const NearestCodeGpu& p, void* stream) {
  int64_t per_part = ceil_div(ceil_div(p.book.count, CODES), p.splits) * CODES;
  Grid grid(p.groups * ceil_div(p.rows / p.groups, ROWS), p.splits);
  return with_tile_types(p.dtype, p.x, p.book, [&](auto x, auto code, auto width) {
    return ARIMG_LAUNCH((nearest_code_kernel<decltype(x), decltype(code), decltype(width)::value>), grid,
                        THREADS, SCORE_TILE_BYTES, stream, p, per_part);
  });
}

Status nearest_code_cuda(const NearestCodeGpu& p, void* stream) {
  Status status = nearest_code_parts_cuda(p, stream);
  if (status != Status::ok || p.splits == 1) return status;
  return ARIMG_LAUNCH(combine_parts_kernel, ceil_div(p.rows, 128), 128, 0, stream, p);
}

Status lookup_backward_cuda(const LookupBackward& p, void* stream) {
  Grid grid(ceil_div(p.count, OWN_CODES * BACKWARD_WARPS), ceil_div(p.dim, 32));
  size_t shared = shared_bytes<float>(BACKWARD_WARPS * OWN_CODES * 32);
  return with_dtype(p.dtype, [&](auto t) {
    return ARIMG_LAUNCH((lookup_backward_kernel<decltype(t)>), grid, 32 * BACKWARD_WARPS, shared, stream, p);
  });
}

}  // namespace arimg
