// What both CUDA attention kernels share: where a block works, which keys its rows see, and how a tile of
// rows comes into shared memory. A warp owns 16 rows; lanes i and i + 16 know the interval of its row i.
#pragma once

#include "attention/contract.h"
#include "core/cuda.h"
#include "core/mma.h"

namespace arimg {
Status attention_half_cuda(const Attention& p, void* stream);  // bf16 and f16; attention_cuda hands over
}

namespace arimg::cuda {

constexpr int warp_rows = 16;
constexpr int key_limit = 0x7fffffff;

// One block per tile of query rows. Late tiles see most keys under causal rules, so they start first.
struct Place {
  int64_t batch, head, first;
  __device__ __forceinline__ Place(const Attention& p, int rows) {
    const int64_t tiles = ceil_div(p.queries, rows), block = blockIdx.x;
    first = (tiles - 1 - block % tiles) * rows;
    head = block / tiles % p.heads;
    batch = block / tiles / p.heads;
  }
  template <typename T>
  __device__ __forceinline__ T* at(const void* base, const AttentionStrides& s) const {
    return static_cast<T*>(const_cast<void*>(base)) + batch * s.batch + head * s.head;
  }
};

struct Intervals {
  int start, end;         // of this lane's row, 0, 0 when it sees nothing
  int low, high;          // the keys that some row of the warp sees
  int all_low, all_high;  // the keys that every row of the warp sees

  __device__ __forceinline__ Intervals(const Attention& p, int64_t batch, int64_t first_row) {
    const int64_t row = first_row + lane_in_warp() % warp_rows;
    const bool exists = row < p.queries;
    start = 0;
    end = exists ? int(p.keys) : 0;
    if (exists && p.row_start != nullptr) {
      start = Max{}(p.row_start[batch * p.interval_stride + row], 0);
      end = Min{}(p.row_end[batch * p.interval_stride + row], int(p.keys));
    }
    const bool empty = start >= end;
    if (empty) start = end = 0;
    low = warp_reduce_min<warp_rows>(empty ? key_limit : start);
    high = warp_reduce_max<warp_rows>(end);
    all_low = warp_reduce_max<warp_rows>(start);
    all_high = warp_reduce_min<warp_rows>(exists ? end : key_limit);
  }
  __device__ __forceinline__ int start_of(int row) const { return __shfl_sync(full_warp, start, row); }
  __device__ __forceinline__ int end_of(int row) const { return __shfl_sync(full_warp, end, row); }
  __device__ __forceinline__ bool sees(int first, int count) const {
    return low < first + count && high > first;
  }
  __device__ __forceinline__ bool sees_all(int first, int count) const {
    return all_low <= first && all_high >= first + count;
  }
};

// The keys that some row of the block sees, [x, y).
__device__ __forceinline__ int2 block_span(const Intervals& rows, Shared<int> scratch) {
  const int warps = warps_in_block();
  if (lane_in_warp() == 0) {
    scratch[warp_in_block()] = rows.low;
    scratch[warps + warp_in_block()] = rows.high;
  }
  __syncthreads();
  int2 span = make_int2(scratch[0], scratch[warps]);
  for (int i = 1; i < warps; ++i) {
    span.x = Min{}(span.x, scratch[i]);
    span.y = Max{}(span.y, scratch[warps + i]);
  }
  return span;
}

// Starts copying rows [first, first + rows) of `dim` channels into a tile of `width` channels, `stride`
// elements apart; what lies beyond `limit` or `dim` becomes zero. Unaligned rows come element by element.
template <int rows, int width, int stride, typename T>
__device__ __forceinline__ void load_rows(Shared<T> to, const T* from, int64_t row_stride, int64_t first,
                                          int64_t limit, int dim, bool aligned) {
  constexpr int piece = 16 / sizeof(T), pieces = width / piece;
  for (int i = thread_in_block(); i < rows * pieces; i += int(blockDim.x)) {
    const int row = i / pieces, channel = i % pieces * piece, at = row * stride + channel;
    const bool valid = first + row < limit && channel < dim;
    const T* source = valid ? from + (first + row) * row_stride + channel : from;
    if (aligned) {
      cp_async16(to.data() + at, source, valid);
    } else {
      for (int j = 0; j < piece; ++j) to[at + j] = valid ? source[j] : T{};
    }
  }
}

// Whether load_rows may read 16 bytes at once.
template <typename T>
bool rows_aligned(const Attention& p) {
  auto fits = [](const void* pointer, const AttentionStrides& s) {
    constexpr int64_t piece = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && s.batch % piece == 0 && s.head % piece == 0 &&
           s.row % piece == 0;
  };
  return fits(p.q, p.q_stride) && fits(p.k, p.k_stride) && fits(p.v, p.v_stride);
}

// One step of the online softmax for one row of this lane's group of `lanes`: scores (times scale * log2 e,
// -inf where masked) become weights; returns by how much older sums shrink.
template <int lanes, int count>
__device__ __forceinline__ float softmax_step(float (&scores)[count], float& highest, float& weight) {
  float top = highest;
#pragma unroll
  for (int i = 0; i < count; ++i) top = fmaxf(top, scores[i]);
  top = warp_reduce_max<lanes>(top);
  const float base = top == -INFINITY ? 0.f : top;  // nothing seen yet: no inf - inf
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    scores[i] = exp2f(scores[i] - base);
    total += scores[i];
  }
  const float shrink = exp2f(highest - base);
  weight = weight * shrink + total;  // this lane's share; summed over the lanes at the end
  highest = top;
  return shrink;
}

// What the sums of a row are multiplied by at the end.
template <int lanes>
__device__ __forceinline__ float inverse_weight(float weight) {
  const float total = warp_reduce_sum<lanes>(weight);
  return total == 0.f ? 0.f : 1.f / total;
}

}  // namespace arimg::cuda
