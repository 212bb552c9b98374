// What both CUDA attention kernels share: where a block works, which keys its rows see, and how a tile of
// rows comes into shared memory. A warp owns 16 rows; lanes i and i + 16 know the interval of its row i.
#pragma once

#include "attention/cached.h"
#include "core/cuda.h"
#include "core/mma.h"

namespace arimg {
// Tiles of query rows, over a tensor of keys (Cache{}) or a cache; attention_cuda hands over bf16 and f16.
Status attention_tiles_cuda(const Attention& p, const Cache& cache, bool cached, void* stream);
Status attention_half_cuda(const Attention& p, const Cache& cache, bool cached, void* stream);
}  // namespace arimg

namespace arimg::cuda {

constexpr int warp_rows = 16;
constexpr int key_limit = 0x7fffffff;

// One block per tile of query rows, or per piece of `rows` rows of a planned tile. Late tiles see most keys
// under causal rules, so they start first.
struct Place {
  int64_t batch, head, kv_head;
  int64_t first, last;  // the block's rows; a planned tile may leave a block without any
  __device__ __forceinline__ Place(const Attention& p, int rows) {
    const int64_t tiles = tiles_of(p, rows), block = blockIdx.x, tile = tiles - 1 - block % tiles;
    if (p.row_tiles != nullptr) {
      const int64_t pieces = ceil_div(p.tile_rows, rows);
      first = p.row_tiles[tile / pieces] + tile % pieces * rows;
      last = p.row_tiles[tile / pieces + 1];
    } else {
      first = tile * rows;
      last = p.queries;
    }
    last = Min{}(last, first + rows);
    head = block / tiles % p.heads;
    kv_head = head / (p.heads / p.kv_heads);
    batch = block / tiles / p.heads;
  }
  static __host__ __device__ __forceinline__ int64_t tiles_of(const Attention& p, int rows) {
    return p.row_tiles != nullptr ? p.tile_count * ceil_div(p.tile_rows, rows) : ceil_div(p.queries, rows);
  }
  __device__ __forceinline__ bool empty() const { return first >= last; }
  template <typename T>
  __device__ __forceinline__ T* at(const void* base, const AttentionStrides& s, int64_t of_head) const {
    return static_cast<T*>(const_cast<void*>(base)) + batch * s.batch + of_head * s.head;
  }
  // The factor of the scores, powers of two.
  __device__ __forceinline__ float scale(const Attention& p) const {
    return p.scale * (p.head_scale != nullptr ? p.head_scale[head] : 1.f) * kLog2E;
  }
};

// The keys of one batch entry: how many there are, how many of the first all rows see, and what is added to
// the intervals. Of a cache, all rows see the stored keys and their interval of the fresh ones.
struct KeyView {
  int keys, sinks, shift;
  __device__ __forceinline__ explicit KeyView(const Attention& p)
      : keys(int(p.keys)), sinks(int(Min{}(p.sinks, p.keys))), shift(0) {}
  __device__ __forceinline__ KeyView(const Attention& p, const Cache& c, int64_t batch) {
    sinks = shift = c.lengths != nullptr ? Max{}(Min{}(c.lengths[batch], int(p.keys)), 0) : int(p.keys);
    keys = sinks + int(c.fresh);
  }
};

// The keys that one row sees: an interval, those below the view's sinks, its own.
struct RowKeys {
  int start, end;  // 0, 0 when empty
  int self;        // or -1
  __device__ __forceinline__ RowKeys(const Attention& p, const KeyView& view, int64_t batch, int64_t row,
                                     bool exists) {
    start = 0;
    end = exists ? view.keys : 0;
    if (exists && p.row_start != nullptr) {
      start = Max{}(p.row_start[batch * p.interval_stride + row] + view.shift, 0);
      end = Min{}(p.row_end[batch * p.interval_stride + row] + view.shift, view.keys);
    }
    if (start >= end) start = end = 0;
    self = exists && p.self ? int(row + p.keys - p.queries) : -1;
  }
  __device__ __forceinline__ bool sees(int key, int sinks) const {
    return (key >= start && key < end) || key < sinks || key == self;
  }
};

// Hull and intersection of the intervals of a warp's rows, and the hull of their own keys.
struct Intervals {
  RowKeys mine;  // of this lane's row
  int sinks;
  int low, high;          // the keys that some row of the warp has in its interval
  int all_low, all_high;  // the keys that every row of the warp has in its interval
  int self_low, self_high;

  __device__ __forceinline__ Intervals(const Attention& p, const KeyView& view, int64_t batch,
                                       int64_t first_row, int64_t last_row)
      : mine(p, view, batch, first_row + lane_in_warp() % warp_rows,
             first_row + lane_in_warp() % warp_rows < last_row),
        sinks(view.sinks) {
    const bool exists = first_row + lane_in_warp() % warp_rows < last_row, empty = mine.start >= mine.end;
    low = warp_reduce_min<warp_rows>(empty ? key_limit : mine.start);
    high = warp_reduce_max<warp_rows>(mine.end);
    all_low = warp_reduce_max<warp_rows>(mine.start);
    all_high = warp_reduce_min<warp_rows>(exists ? mine.end : key_limit);
    self_low = p.self ? warp_reduce_min<warp_rows>(mine.self < 0 ? key_limit : mine.self) : key_limit;
    self_high = p.self ? warp_reduce_max<warp_rows>(mine.self + 1) : 0;
  }
  __device__ __forceinline__ RowKeys of(int row) const {
    RowKeys keys = mine;
    keys.start = __shfl_sync(full_warp, mine.start, row);
    keys.end = __shfl_sync(full_warp, mine.end, row);
    keys.self = __shfl_sync(full_warp, mine.self, row);
    return keys;
  }
  __device__ __forceinline__ bool sees(int first, int count) const {
    return (low < first + count && high > first) || first < sinks ||
           (self_low < first + count && self_high > first);
  }
  __device__ __forceinline__ bool sees_all(int first, int count) const {
    return (all_low <= first && all_high >= first + count) || sinks >= first + count;
  }
};

// The tiles of `step` keys that some row of the block sees.
struct BlockKeys {
  int low, high, self_low, self_high, sinks, step;

  // scratch: 4 places per warp.
  __device__ __forceinline__ BlockKeys(const Intervals& rows, int step, Shared<int> scratch)
      : sinks(rows.sinks), step(step) {
    const int warps = warps_in_block();
    if (lane_in_warp() == 0) {
      Shared<int> mine = scratch.part(4 * warp_in_block(), 4);
      mine[0] = rows.low;
      mine[1] = rows.high;
      mine[2] = rows.self_low;
      mine[3] = rows.self_high;
    }
    __syncthreads();
    low = self_low = key_limit;
    high = self_high = 0;
    for (int i = 0; i < warps; ++i) {
      low = Min{}(low, scratch[4 * i]);
      high = Max{}(high, scratch[4 * i + 1]);
      self_low = Min{}(self_low, scratch[4 * i + 2]);
      self_high = Max{}(self_high, scratch[4 * i + 3]);
    }
  }
  // The first such tile from key `first` on, a multiple of step; key_limit when there is none.
  __device__ __forceinline__ int next(int first) const {
    if (first < sinks) return first;
    int found = key_limit;
    if (first < high) found = Max{}(first, low / step * step);
    if (first < self_high) found = Min{}(found, Max{}(first, self_low / step * step));
    return found;
  }
};

// Starts copying rows [first, first + rows) of `dim` channels, row i from address(i), into a tile of `width`
// channels, `stride` elements apart; what lies beyond `limit` or `dim` becomes zero. Unaligned rows come
// element by element.
template <int rows, int width, int stride, typename T, typename Address>
__device__ __forceinline__ void load_rows_from(Shared<T> to, const T* anywhere, Address address,
                                               int64_t first, int64_t limit, int dim, bool aligned) {
  constexpr int piece = 16 / sizeof(T), pieces = width / piece;
  for (int i = thread_in_block(); i < rows * pieces; i += int(blockDim.x)) {
    const int row = i / pieces, channel = i % pieces * piece, at = row * stride + channel;
    const bool valid = first + row < limit && channel < dim;
    const T* source = valid ? address(first + row) + channel : anywhere;
    if (aligned) {
      cp_async16(to.data() + at, source, valid);
    } else {
      for (int j = 0; j < piece; ++j) to[at + j] = valid ? source[j] : T{};
    }
  }
}
template <int rows, int width, int stride, typename T>
__device__ __forceinline__ void load_rows(Shared<T> to, const T* from, int64_t row_stride, int64_t first,
                                          int64_t limit, int dim, bool aligned) {
  load_rows_from<rows, width, stride>(
      to, from, [=](int64_t row) { return from + row * row_stride; }, first, limit, dim, aligned);
}

// The keys (or values) of one head, whether they lie in a tensor, in pages or after the cache.
template <typename T, bool cached>
struct HeadRows {
  const T* base;
  int64_t stride;
  const int32_t* pages;
  const T* fresh;
  int64_t fresh_stride, page_stride, page_size;
  int old;

  __device__ __forceinline__ HeadRows(const void* data, const AttentionStrides& s, const void* data_new,
                                      const AttentionStrides& s_new, const Cache& c, const KeyView& view,
                                      int64_t batch, int64_t kv_head) {
    base = static_cast<const T*>(data) + kv_head * s.head;
    stride = s.row;
    if constexpr (!cached) {
      base += batch * s.batch;
    } else {
      pages = c.page_table == nullptr ? nullptr : c.page_table + batch * c.max_pages;
      if (pages == nullptr) base += batch * s.batch;
      page_stride = s.batch;
      page_size = c.page_size;
      fresh = static_cast<const T*>(data_new) + batch * s_new.batch + kv_head * s_new.head;
      fresh_stride = s_new.row;
      old = view.sinks;
    }
  }
  __device__ __forceinline__ const T* operator()(int64_t n) const {
    if constexpr (cached) {
      if (n >= old) return fresh + (n - old) * fresh_stride;
      if (pages != nullptr) return base + pages[n / page_size] * page_stride + n % page_size * stride;
    }
    return base + n * stride;
  }
};

// Whether load_rows may read 16 bytes at once.
template <typename T>
bool rows_aligned(const Attention& p, const Cache& c) {
  auto fits = [](const void* pointer, const AttentionStrides& s) {
    constexpr int64_t piece = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && s.batch % piece == 0 && s.head % piece == 0 &&
           s.row % piece == 0;
  };
  return fits(p.q, p.q_stride) && fits(p.k, p.k_stride) && fits(p.v, p.v_stride) &&
         fits(c.k_new, c.k_new_stride) && fits(c.v_new, c.v_new_stride);
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
__device__ __forceinline__ float inverse_weight(float total) {
  return total == 0.f ? 0.f : 1.f / total;
}

__device__ __forceinline__ void store_lse(const Attention& p, const Place& place, int64_t row, float highest,
                                          float total) {
  p.lse[(place.batch * p.heads + place.head) * p.queries + row] =
      total == 0.f ? -INFINITY : (highest + log2f(total)) * kLn2;
}

}  // namespace arimg::cuda
