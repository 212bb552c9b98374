// See contract.h and float_tile.h. fp32 with ordinary multiply-adds, for results as exact as the CPU's.
#include "attention/float_tile.h"

namespace arimg {

namespace {

using namespace cuda;

template <int D>
struct Shape {
  static constexpr int warps = D <= 128 ? 4 : 2, rows = warps * warp_rows;  // fits 99 KiB of shared memory
  static constexpr int keys = D <= 128 ? 32 : 16;
  static constexpr int stride = D + 4;  // rows fall on different banks
  static constexpr int weight_stride = keys + 4;
};

template <int D>
struct Warp {
  using S = Shape<D>;
  static constexpr int own = S::keys / 8;  // keys per lane
  float score[4][own];
  float4 sum[4][D / 32];
  float highest[4], weight[4];

  static __device__ __forceinline__ int row() { return float_row(); }
  static __device__ __forceinline__ int lane() { return lane_in_warp() % 8; }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      highest[r] = -INFINITY;
      weight[r] = 0.f;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) sum[r][i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  __device__ __forceinline__ void softmax(const Intervals& rows, int first, float scale,
                                          Shared<float> weights) {
    const bool whole = rows.sees_all(first, S::keys);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const RowKeys mine = rows.of(lane_in_warp() / 8 * 4 + r);
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const bool seen = whole || mine.sees(first + i * 8 + lane(), rows.sinks);
        score[r][i] = seen ? score[r][i] * scale : -INFINITY;
      }
      const float shrink = softmax_step<8>(score[r], highest[r], weight[r]);
#pragma unroll
      for (int i = 0; i < own; ++i) weights[(row() + r) * S::weight_stride + i * 8 + lane()] = score[r][i];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        sum[r][i].x *= shrink;
        sum[r][i].y *= shrink;
        sum[r][i].z *= shrink;
        sum[r][i].w *= shrink;
      }
    }
  }

  __device__ __forceinline__ void store(const Place& place, const Attention& p) {
    float* out = place.at<float>(p.out, p.out_stride, place.head);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float total = warp_reduce_sum<8>(weight[r]), inverse = inverse_weight(total);
      const int64_t at = place.first + row() + r;
      if (at >= place.last) continue;
      if (p.lse != nullptr && lane() == 0) store_lse(p, place, at, highest[r], total);
      store_floats<D>(out + at * p.out_stride.row, sum[r], inverse, int(p.dim));
    }
  }
};

template <int D, bool cached>
__global__ void __launch_bounds__(Shape<D>::warps * 32, D <= 64 ? 3 : 1)
    attention_float_kernel(Attention p, Cache cache, bool aligned) {
  using S = Shape<D>;
  SharedArena arena;
  auto q = arena.take<float>(S::rows * S::stride);
  auto k = arena.take<float>(S::keys * S::stride);
  auto v = arena.take<float>(S::keys * S::stride);
  auto weights = arena.take<float>(S::rows * S::weight_stride);
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
  const HeadRows<float, cached> keys(p.k, p.k_stride, cache.k_new, cache.k_new_stride, cache, view,
                                     place.batch, place.kv_head);
  const HeadRows<float, cached> values(p.v, p.v_stride, cache.v_new, cache.v_new_stride, cache, view,
                                       place.batch, place.kv_head);
  load_rows<S::rows, D, S::stride>(q, place.at<const float>(p.q, p.q_stride, place.head), p.q_stride.row,
                                   place.first, place.last, dim, aligned);
  Warp<D> warp;
  warp.start();
  for (int first = tiles.next(0); first != key_limit; first = tiles.next(first + S::keys)) {
    const bool active = rows.sees(first, S::keys);
    load_rows_from<S::keys, D, S::stride>(k, keys.base, keys, first, view.keys, dim, aligned);
    cp_async_commit();
    load_rows_from<S::keys, D, S::stride>(v, values.base, values, first, view.keys, dim, aligned);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (active) {
      multiply_floats<D, S::stride>(warp.score, q, k);
      warp.softmax(rows, first, scale, weights);  // rows of weights are the warp's own
    }
    cp_async_wait<0>();
    __syncthreads();
    if (active) accumulate_floats<D, S::stride, S::keys, S::weight_stride>(warp.sum, weights, v);
    __syncthreads();
  }
  cp_async_wait<0>();
  warp.store(place, p);
}

template <int D, bool cached>
Status launch_attention(const Attention& p, const Cache& cache, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = Place::tiles_of(p, S::rows) * p.heads * p.batch;
  const size_t shared = shared_bytes<float>(S::rows * S::stride) +
                        2 * shared_bytes<float>(S::keys * S::stride) +
                        shared_bytes<float>(S::rows * S::weight_stride) + shared_bytes<int>(4 * S::warps);
  return ARIMG_LAUNCH((attention_float_kernel<D, cached>), blocks, S::warps * 32, shared, stream, p, cache,
                      rows_aligned<float>(p, cache));
}

template <bool cached>
Status dispatch_dim(const Attention& p, const Cache& cache, void* stream) {
  if (p.dim <= 32) return launch_attention<32, cached>(p, cache, stream);
  if (p.dim <= 64) return launch_attention<64, cached>(p, cache, stream);
  if (p.dim <= 96) return launch_attention<96, cached>(p, cache, stream);
  if (p.dim <= 128) return launch_attention<128, cached>(p, cache, stream);
  if (p.dim <= 256) return launch_attention<256, cached>(p, cache, stream);
  return Status::unsupported;
}

}  // namespace

Status attention_tiles_cuda(const Attention& p, const Cache& cache, bool cached, void* stream) {
  if (p.keys + cache.fresh > key_limit - 256 || p.queries > key_limit - 256) return Status::unsupported;
  if (p.dtype != DType::f32) return attention_half_cuda(p, cache, cached, stream);
  return cached ? dispatch_dim<true>(p, cache, stream) : dispatch_dim<false>(p, cache, stream);
}

Status attention_cuda(const Attention& p, void* stream) {
  return attention_tiles_cuda(p, Cache{}, false, stream);
}

}  // namespace arimg
