// See topk.h. The tiles of nearest_code; the eight threads of a row append scores below its threshold to a
// list in shared memory, and a list that is full is sorted by its warp and cut back to the k lowest.
#include "quantize/topk.h"

#include "quantize/score_tile.h"
#include "quantize/sort_key.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int HALF_TILE = CODES / 2;  // codes between two looks at the length of a list
constexpr uint64_t NO_KEY = ~uint64_t(0);
constexpr int COMBINE_WARPS = 4;

// Sorts n keys in ascending order, by one warp: a bitonic network in which every exchange puts the lower key
// first, so that what would lie beyond n may be left out.
__device__ __forceinline__ void sort_by_warp(Shared<uint64_t> keys, int n) {
#pragma unroll 1
  for (int size = 2; size / 2 < n; size *= 2)
#pragma unroll 1
    for (int step = size / 2; step > 0; step /= 2) {
      __syncwarp();
#pragma unroll 1
      for (int i = lane_in_warp(); i / step * 2 * step < n; i += 32) {
        const int base = i / step * 2 * step, within = i % step;
        const int low = base + within, high = base + (step == size / 2 ? size - 1 - within : step + within);
        if (high >= n) continue;
        const uint64_t a = keys[low], b = keys[high];
        if (b < a) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncwarp();
}

// x . x of one row: one chain, as on the CPU.
template <typename T>
__device__ __forceinline__ float row_squares(const NearestCodesGpu& p, int64_t row) {
  const T* x = (const T*)p.x + row * p.book.dim;
  float squares = 0.f;
  for (int64_t d = 0; d < p.book.dim; ++d) squares = fmaf(to_float(x[d]), to_float(x[d]), squares);
  return squares;
}

// Writes the k keys of a row, by one warp.
__device__ __forceinline__ void write_row(const NearestCodesGpu& p, Shared<uint64_t> keys, int64_t row,
                                          float squares) {
  for (int i = lane_in_warp(); i < p.k; i += 32) {
    const uint64_t key = keys[i];
    p.value[row * p.k + i] = value_of_score(p.book.metric, key_score(key), squares);
    p.index[row * p.k + i] = key_index(key);
  }
}

// The lists of the four groups of eight threads of a warp, for their row r. All lanes call everything.
class WarpLists {
 public:
  __device__ __forceinline__ WarpLists(Shared<uint64_t> keys, int room, int k)
      : keys_(keys), room_(room), k_(k) {
    for (int r = 0; r < THREAD_ROWS; ++r) {
      threshold[r] = INFINITY;
      count_[r] = 0;
    }
  }

  // The list of row r of the given group of eight lanes.
  __device__ __forceinline__ Shared<uint64_t> list(int group, int r) const {
    return keys_.part(((warp_in_block() * 4 + group) * THREAD_ROWS + r) * room_, room_);
  }

  // Sorts row r of the group by the warp; what remains of it is k long.
  __device__ __forceinline__ void sort(int group, int r) {
    Shared<uint64_t> keys = list(group, r);
    const int n = __shfl_sync(full_warp, count_[r], group * CODE_LANES);
    sort_by_warp(keys, n);
    const int kept = n < k_ ? n : k_;
    if (lane_in_warp() / CODE_LANES == group) {
      count_[r] = kept;
      if (kept == k_) threshold[r] = key_score(keys[k_ - 1]);
    }
    for (int i = n + lane_in_warp(); i < k_; i += 32) keys[i] = NO_KEY;  // a part with fewer than k codes
    __syncwarp();
  }

  // Appends those of four scores of row r that `chosen` names.
  __device__ __forceinline__ void append(int r, const float* scores, const bool (&chosen)[4], int code) {
    const int group = lane_in_warp() / CODE_LANES, lane = lane_in_warp() % CODE_LANES;
    unsigned votes[4], all = 0;
    int total = 0;
    for (int i = 0; i < 4; ++i) {
      const unsigned ballot = __ballot_sync(full_warp, chosen[i]);
      all |= ballot;
      votes[i] = ballot >> (group * CODE_LANES) & 0xffu;
      total += __popc(votes[i]);
    }
    if (all == 0) return;
    const unsigned full = __ballot_sync(full_warp, count_[r] + total > room_);
#pragma unroll 1
    for (int g = 0; full != 0 && g < 4; ++g)
      if (full >> (g * CODE_LANES) & 1u) sort(g, r);
    Shared<uint64_t> keys = list(group, r);
    for (int i = 0; i < 4; ++i) {
      const int before = __popc(votes[i] & ((1u << lane) - 1u));
      if (chosen[i]) keys[count_[r] + before] = sort_key(scores[i], code + i);
      count_[r] += __popc(votes[i]);
    }
    __syncwarp();
  }

  float threshold[THREAD_ROWS];

 private:
  Shared<uint64_t> keys_;
  int room_, k_;
  int count_[THREAD_ROWS];
};

template <typename TX, typename TC, int WIDTH>
__global__ void __launch_bounds__(THREADS, 3)
    nearest_codes_kernel(NearestCodesGpu p, int64_t codes_per_part) {
  const int64_t K = p.book.count, first_row = int64_t(blockIdx.x) * ROWS;
  const int64_t code_begin = blockIdx.y * codes_per_part;
  const int64_t code_end = code_begin + codes_per_part < K ? code_begin + codes_per_part : K;
  const int room = p.k + HALF_TILE;
  SharedArena arena;
  Shared<uint64_t> keys = arena.take<uint64_t>(ROWS * room);
  ScoreTile<TX, TC, WIDTH> tile(arena, p.x, p.book, p.offsets, first_row, p.rows);
  WarpLists lists(keys, room, p.k);
  for (int64_t first = code_begin; first < code_end; first += CODES) {
    float sum[THREAD_ROWS][THREAD_CODES];
    tile.scores(sum, first, code_end);
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t code = first + tile.code(4 * half);
        bool chosen[4];
        for (int i = 0; i < 4; ++i)  // a list is never shorter than k, even of scores that are NaN
          chosen[i] = code + i < code_end &&
                      (sum[r][4 * half + i] < lists.threshold[r] || code + i < code_begin + p.k);
        lists.append(r, &sum[r][4 * half], chosen, int(code));
      }
  }
#pragma unroll  // over r, which must be known where registers hold a value per row
  for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll 1
    for (int group = 0; group < 4; ++group) {
      const int64_t row = first_row + (warp_in_block() * 4 + group) * THREAD_ROWS + r;
      lists.sort(group, r);
      if (row >= p.rows) continue;
      Shared<uint64_t> sorted = lists.list(group, r);
      if (p.splits == 1)
        write_row(p, sorted, row, p.book.metric == Metric::dot ? 0.f : row_squares<TX>(p, row));
      else
        for (int i = lane_in_warp(); i < p.k; i += 32)
          p.parts[(blockIdx.y * p.rows + row) * p.k + i] = sorted[i];
    }
}

// One warp per row.
template <typename TX>
__global__ void __launch_bounds__(32 * COMBINE_WARPS) combine_lists_kernel(NearestCodesGpu p) {
  SharedArena arena;
  Shared<uint64_t> all = arena.take<uint64_t>(COMBINE_WARPS * 2 * p.k);
  const int64_t row = int64_t(blockIdx.x) * COMBINE_WARPS + warp_in_block();
  if (row >= p.rows) return;
  Shared<uint64_t> keys = all.part(warp_in_block() * 2 * p.k, 2 * p.k);
  for (int part = 0; part < p.splits; ++part) {
    const uint64_t* from = p.parts + (part * p.rows + row) * p.k;
    for (int i = lane_in_warp(); i < p.k; i += 32) keys[(part == 0 ? 0 : p.k) + i] = from[i];
    __syncwarp();
    if (part > 0) sort_by_warp(keys, 2 * p.k);
  }
  write_row(p, keys, row, p.book.metric == Metric::dot ? 0.f : row_squares<TX>(p, row));
}

}  // namespace

Status nearest_codes_cuda(const NearestCodesGpu& p, void* stream) {
  int64_t per_part = ceil_div(ceil_div(p.book.count, CODES), p.splits) * CODES;
  Grid grid(ceil_div(p.rows, ROWS), p.splits);
  size_t shared = shared_bytes<uint64_t>(size_t(ROWS) * (p.k + HALF_TILE)) + SCORE_TILE_BYTES;
  Status status = with_tile_types(p.dtype, p.x, p.book, [&](auto x, auto code, auto width) {
    return ARIMG_LAUNCH((nearest_codes_kernel<decltype(x), decltype(code), decltype(width)::value>), grid,
                        THREADS, shared, stream, p, per_part);
  });
  if (status != Status::ok || p.splits == 1) return status;
  return with_dtype(p.dtype, [&](auto x) {
    return ARIMG_LAUNCH((combine_lists_kernel<decltype(x)>), ceil_div(p.rows, COMBINE_WARPS),
                        32 * COMBINE_WARPS, shared_bytes<uint64_t>(size_t(COMBINE_WARPS) * 2 * p.k), stream,
                        p);
  });
}

}  // namespace arimg
