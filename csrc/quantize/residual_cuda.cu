// See residual.h. Where the rows fill the device a block keeps its 64 rows through all depths: their residual
// is written and read by this block alone, so the barriers between the depths are enough.
#include "quantize/residual.h"
#include "quantize/score_tile.h"
#include "quantize/sort_key.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ int64_t code_of_key(uint64_t key) {
  return key_score(key) == INFINITY ? 0 : key_index(key);
}

// Takes the code of a depth from a row, or, after the last depth, adds up the codes of all. For a warp.
template <typename TX, typename TC>
__device__ void finish_depth(const ResidualCodes& p, int64_t row, int64_t depth, int64_t code) {
  const int64_t D = p.dim;
  float* residual = p.residual + row * D;
  int64_t* index = p.index + row * p.depths;
  const int lane = threadIdx.x % 32;
  if (lane == 0) index[depth] = code;
  if (depth + 1 < p.depths) {
    for (int64_t d = lane; d < D; d += 32) {
      const float value = depth == 0 ? to_float(((const TX*)p.x)[row * D + d]) : residual[d];
      residual[d] = value - to_float(((const TC*)p.books[depth])[code * D + d]);
    }
    return;
  }
  for (int64_t d = lane; d < D; d += 32) {
    float sum = 0.f;
    for (int64_t q = 0; q < p.depths; ++q) {
      const int64_t at = q == depth ? code : index[q];
      const float value = to_float(((const TC*)p.books[q])[at * D + d]);
      sum = q == 0 ? value : sum + value;
    }
    ((TX*)p.quantized)[row * D + d] = from_float<TX>(sum);
  }
}

// offsets[depth][code], as code_offsets_cuda has them.
template <typename TC>
__global__ void residual_offsets_kernel(ResidualCodes p, float* offsets) {
  const int64_t code = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (code >= p.count) return;
  const TC* from = (const TC*)p.books[blockIdx.y] + code * p.dim;
  float squares = 0.f;
  for (int64_t d = 0; d < p.dim; ++d) squares = fmaf(to_float(from[d]), to_float(from[d]), squares);
  offsets[blockIdx.y * p.count + code] = 0.5f * squares;
}

// The winner of each of the tile's rows for one depth.
template <typename Tile>
__device__ void search_depth(Tile& tile, int64_t count, Shared<int> winners) {
  float best[THREAD_ROWS];
  int best_index[THREAD_ROWS];
  for (int r = 0; r < THREAD_ROWS; ++r) {
    best[r] = INFINITY;
    best_index[r] = 0;
  }
  for (int64_t first = 0; first < count; first += CODES) {
    float sum[THREAD_ROWS][THREAD_CODES];
    tile.scores(sum, first, count);
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) {
        const int64_t code = first + tile.code(c);
        if (sum[r][c] < best[r] && code < count) {
          best[r] = sum[r][c];
          best_index[r] = int(code);
        }
      }
  }
  for (int r = 0; r < THREAD_ROWS; ++r) {
    const uint64_t key = warp_reduce_min<CODE_LANES>(sort_key(best[r], best_index[r]));
    if (tile.code_lane() == 0) winners[tile.row(r)] = int(code_of_key(key));
  }
}

template <typename TX, typename TC, int WIDTH>
__global__ void __launch_bounds__(THREADS, 4) residual_codes_kernel(ResidualCodes p, const float* offsets) {
  const int64_t first = int64_t(blockIdx.x) * ROWS, end = first + ROWS < p.rows ? first + ROWS : p.rows;
  SharedArena arena;
  Shared<int> winners = arena.take<int>(ROWS);
  Codebook book = book_of_depth(p, 0);
  ScoreTile<TX, TC, WIDTH> start(arena, p.x, book, offsets, first, end);
  search_depth(start, book.count, winners);
  ScoreTile<float, TC, WIDTH> tile(start, p.residual);
  for (int64_t depth = 0;; ++depth) {
    __syncthreads();
    for (int row = threadIdx.x / 32; first + row < end; row += WARPS)
      finish_depth<TX, TC>(p, first + row, depth, winners[row]);
    if (depth + 1 == p.depths) break;
    book.codes = p.books[depth + 1];
    offsets += book.count;
    tile.restart(offsets);
    search_depth(tile, book.count, winners);
  }
}

// After a search over parts of the codebook: a warp per row.
template <typename TX, typename TC>
__global__ void __launch_bounds__(THREADS)
    residual_step_kernel(ResidualCodes p, int64_t depth, const uint64_t* parts, int splits) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= p.rows) return;
  uint64_t key = parts[row];
  for (int part = 1; part < splits; ++part) {
    const uint64_t other = parts[part * p.rows + row];
    key = other < key ? other : key;
  }
  finish_depth<TX, TC>(p, row, depth, code_of_key(key));
}

// For with_tile_types: the four-wide loads are right for all codebooks if they are for this one.
Codebook least_aligned(const ResidualCodes& p) {
  Codebook book = book_of_depth(p, 0);
  for (int64_t q = 1; q < p.depths; ++q)
    if (reinterpret_cast<uintptr_t>(p.books[q]) % 16 != 0) book.codes = p.books[q];
  return book;
}

Status search_and_step(const ResidualCodes& p, int64_t depth, const float* offsets, uint64_t* parts,
                       int splits, void* stream) {
  const bool first = depth == 0;
  NearestCodeGpu search{};
  search.dtype = first ? p.dtype : DType::f32;
  search.x = first ? p.x : p.residual;
  search.book = book_of_depth(p, depth);
  search.offsets = offsets + depth * p.count;
  search.groups = 1;
  search.rows = p.rows;
  search.parts = parts;
  search.splits = splits;
  Status status = nearest_code_parts_cuda(search, stream);
  if (status != Status::ok) return status;
  return with_dtype(p.dtype, [&](auto x) {
    return with_dtype(p.book_dtype, [&](auto code) {
      return ARIMG_LAUNCH((residual_step_kernel<decltype(x), decltype(code)>), ceil_div(p.rows, WARPS),
                          THREADS, 0, stream, p, depth, parts, splits);
    });
  });
}

}  // namespace

Status residual_codes_cuda(const ResidualCodes& p, float* offsets, uint64_t* parts, int splits,
                           void* stream) {
  Status status = with_dtype(p.book_dtype, [&](auto code) {
    return ARIMG_LAUNCH((residual_offsets_kernel<decltype(code)>), Grid(ceil_div(p.count, 128), p.depths),
                        128, 0, stream, p, offsets);
  });
  if (status == Status::ok && splits == 1)
    return with_tile_types(p.dtype, p.x, least_aligned(p), [&](auto x, auto code, auto width) {
      return ARIMG_LAUNCH((residual_codes_kernel<decltype(x), decltype(code), decltype(width)::value>),
                          ceil_div(p.rows, ROWS), THREADS, SCORE_TILE_BYTES + shared_bytes<int>(ROWS), stream,
                          p, (const float*)offsets);
    });
  for (int64_t depth = 0; depth < p.depths && status == Status::ok; ++depth)
    status = search_and_step(p, depth, offsets, parts, splits, stream);
  return status;
}

}  // namespace arimg
