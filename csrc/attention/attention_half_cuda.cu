// See contract.h. bf16 and f16 on tensor cores (mma.sync, compute capability 8.0 and up), online softmax
// after Dao, "FlashAttention-2", 2023. Four warps, 16 query rows each; key tiles that no row of the block
// sees are never loaded, those that no row of the warp sees never multiplied, and only tiles at the edge of
// an interval are masked.
#include "attention/half_tile.h"

namespace arimg {
namespace {

using namespace cuda;

template <int D>
struct Shape {
  static constexpr int warps = 4, rows = warps * warp_rows;
  static constexpr int keys = D <= 128 ? 64 : 32;
  static constexpr int stride = D + 8;            // rows fall on different banks
  static constexpr bool keep_queries = D <= 128;  // in registers; else read again for each tile
};

template <typename T, int D>
struct Warp {
  using S = Shape<D>;
  static constexpr int steps = D / 16, tiles = S::keys / 8;
  uint32_t query[S::keep_queries ? steps : 1][4];
  float score[tiles][4];  // [8 keys][row g: 2 keys, row g + 8: 2 keys]
  float sum[D / 8][4];
  float highest[2], weight[2];

  __device__ __forceinline__ void start(Shared<T> q) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0.f;
    highest[0] = highest[1] = -INFINITY;
    weight[0] = weight[1] = 0.f;
    if constexpr (S::keep_queries)
#pragma unroll
      for (int i = 0; i < steps; ++i) load_query(query[i], q, i);
  }

  __device__ __forceinline__ void load_query(uint32_t (&a)[4], Shared<T> q, int step) {
    ldmatrix_x4(a, q.data() + (warp_in_block() * warp_rows + fragment_row()) * S::stride + step * 16 +
                       fragment_column());
  }

  // score = Q K^T
  __device__ __forceinline__ void multiply_keys(Shared<T> q, Shared<T> k) {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] = 0.f;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      if constexpr (S::keep_queries) {
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] = query[step][j];
      } else {
        load_query(a, q, step);
      }
      multiply_rows<S::stride>(score, a, k, step);
    }
  }

  // Scores become weights; older sums shrink. first: the tile's first key.
  __device__ __forceinline__ void softmax(const Intervals& rows, int first, float scale) {
    const int g = lane_in_warp() / 4, t = lane_in_warp() % 4;
    const bool whole = rows.sees_all(first, S::keys);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowKeys mine = rows.of(g + half * 8);
      float line[tiles * 2];
#pragma unroll
      for (int i = 0; i < tiles * 2; ++i) {
        const bool seen = whole || mine.sees(first + i / 2 * 8 + t * 2 + i % 2, rows.sinks);
        line[i] = seen ? score[i / 2][half * 2 + i % 2] * scale : -INFINITY;
      }
      const float shrink = softmax_step<4>(line, highest[half], weight[half]);
#pragma unroll
      for (int i = 0; i < tiles * 2; ++i) score[i / 2][half * 2 + i % 2] = line[i];
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        sum[i][half * 2] *= shrink;
        sum[i][half * 2 + 1] *= shrink;
      }
    }
  }

  __device__ __forceinline__ void store(const Place& place, const Attention& p) {
    T* out = place.at<T>(p.out, p.out_stride, place.head);
    const int g = lane_in_warp() / 4, t = lane_in_warp() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_reduce_sum<4>(weight[half]), inverse = inverse_weight(total);
      const int64_t row = place.first + warp_in_block() * warp_rows + g + half * 8;
      if (row >= place.last) continue;
      if (p.lse != nullptr && t == 0) store_lse(p, place, row, highest[half], total);
      store_fragment_row<D>(out + row * p.out_stride.row, sum, half, inverse, int(p.dim));
    }
  }
};

template <typename T, int D, bool cached>
__global__ void __launch_bounds__(Shape<D>::warps * 32)
    attention_half_kernel(Attention p, Cache cache, bool aligned) {
  using S = Shape<D>;
  SharedArena arena;
  auto q = arena.take<T>(S::rows * S::stride);
  auto k = arena.take<T>(S::keys * S::stride);
  auto v = arena.take<T>(S::keys * S::stride);
  auto bounds = arena.take<int>(4 * S::warps);

  const Place place(p, S::rows);
  if (place.empty()) return;
  const KeyView view = [&] {
    if constexpr (cached) return KeyView(p, cache, place.batch);
    return KeyView(p);
  }();
  const Intervals rows(p, view, place.batch, place.first + warp_in_block() * warp_rows, place.last);
  const BlockKeys tiles(rows, S::keys, bounds);
  const int dim = int(p.dim);
  const float scale = place.scale(p);
  const HeadRows<T, cached> keys(p.k, p.k_stride, cache.k_new, cache.k_new_stride, cache, view, place.batch,
                                 place.kv_head);
  const HeadRows<T, cached> values(p.v, p.v_stride, cache.v_new, cache.v_new_stride, cache, view, place.batch,
                                   place.kv_head);
  auto load_keys = [&](int first) {
    load_rows_from<S::keys, D, S::stride>(k, keys.base, keys, first, view.keys, dim, aligned);
    cp_async_commit();
  };

  int first = tiles.next(0);
  load_rows<S::rows, D, S::stride>(q, place.at<const T>(p.q, p.q_stride, place.head), p.q_stride.row,
                                   place.first, place.last, dim, aligned);
  if (first != key_limit) load_keys(first);
  cp_async_wait<0>();
  __syncthreads();
  Warp<T, D> warp;
  warp.start(q);
  while (first != key_limit) {
    const bool active = rows.sees(first, S::keys);
    const int next = tiles.next(first + S::keys);
    load_rows_from<S::keys, D, S::stride>(v, values.base, values, first, view.keys, dim, aligned);
    cp_async_commit();
    if (active) {
      warp.multiply_keys(q, k);
      warp.softmax(rows, first, scale);
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are here, and the keys are no longer needed
    if (next != key_limit) load_keys(next);
    if (active) accumulate<D, S::stride>(warp.sum, warp.score, v);
    cp_async_wait<0>();
    __syncthreads();
    first = next;
  }
  warp.store(place, p);
}

template <typename T, int D, bool cached>
Status launch_attention(const Attention& p, const Cache& cache, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = Place::tiles_of(p, S::rows) * p.heads * p.batch;
  const size_t shared = shared_bytes<T>(S::rows * S::stride) + 2 * shared_bytes<T>(S::keys * S::stride) +
                        shared_bytes<int>(4 * S::warps);
  return ARIMG_LAUNCH((attention_half_kernel<T, D, cached>), blocks, S::warps * 32, shared, stream, p, cache,
                      rows_aligned<T>(p, cache));
}

template <typename T, bool cached>
Status dispatch_dim(const Attention& p, const Cache& cache, void* stream) {
  if (p.dim <= 32) return launch_attention<T, 32, cached>(p, cache, stream);
  if (p.dim <= 64) return launch_attention<T, 64, cached>(p, cache, stream);
  if (p.dim <= 96) return launch_attention<T, 96, cached>(p, cache, stream);
  if (p.dim <= 128) return launch_attention<T, 128, cached>(p, cache, stream);
  if (p.dim <= 256) return launch_attention<T, 256, cached>(p, cache, stream);
  return Status::unsupported;
}

template <typename T>
Status dispatch_cached(const Attention& p, const Cache& cache, bool cached, void* stream) {
  return cached ? dispatch_dim<T, true>(p, cache, stream) : dispatch_dim<T, false>(p, cache, stream);
}

}  // namespace

Status attention_half_cuda(const Attention& p, const Cache& cache, bool cached, void* stream) {
  return p.dtype == DType::bf16 ? dispatch_cached<BFloat16>(p, cache, cached, stream)
                                : dispatch_cached<Half>(p, cache, cached, stream);
}

}  // namespace arimg
