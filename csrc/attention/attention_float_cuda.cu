// See contract.h. fp32 with ordinary multiply-adds, for results as exact as the CPU's. A warp owns 16 rows:
// eight lanes share four of them, each lane with every eighth key of the tile and D / 8 channels of the
// output.
#include "attention/rows.h"

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

  static __device__ __forceinline__ int row() { return warp_in_block() * warp_rows + lane_in_warp() / 8 * 4; }
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

  __device__ __forceinline__ void multiply_keys(Shared<float> q, Shared<float> k) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int i = 0; i < own; ++i) score[r][i] = 0.f;
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      float4 a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = q.vec<float4>((row() + r) * S::stride + d);
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const float4 b = k.vec<float4>((i * 8 + lane()) * S::stride + d);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float s = __fmaf_rn(a[r].x, b.x, score[r][i]);
          s = __fmaf_rn(a[r].y, b.y, s);
          s = __fmaf_rn(a[r].z, b.z, s);
          score[r][i] = __fmaf_rn(a[r].w, b.w, s);
        }
      }
    }
  }

  __device__ __forceinline__ void softmax(const Intervals& rows, int first, float scale,
                                          Shared<float> weights) {
    const bool whole = rows.sees_all(first, S::keys);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int mine = lane_in_warp() / 8 * 4 + r;
      const int start = rows.start_of(mine) - first, end = rows.end_of(mine) - first;
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int key = i * 8 + lane();
        score[r][i] = whole || (key >= start && key < end) ? score[r][i] * scale : -INFINITY;
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

  __device__ __forceinline__ void multiply_values(Shared<float> weights, Shared<float> v) {
#pragma unroll 4
    for (int key = 0; key < S::keys; ++key) {
      float w[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) w[r] = weights[(row() + r) * S::weight_stride + key];
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const float4 b = v.vec<float4>(key * S::stride + i * 32 + lane() * 4);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sum[r][i].x = __fmaf_rn(w[r], b.x, sum[r][i].x);
          sum[r][i].y = __fmaf_rn(w[r], b.y, sum[r][i].y);
          sum[r][i].z = __fmaf_rn(w[r], b.z, sum[r][i].z);
          sum[r][i].w = __fmaf_rn(w[r], b.w, sum[r][i].w);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* out, int64_t row_stride, int64_t first, const Attention& p) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float inverse = inverse_weight<8>(weight[r]);
      const int64_t at = first + row() + r;
      if (at >= p.queries) continue;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const int channel = i * 32 + lane() * 4;
        if (channel >= p.dim) continue;
        float* to = out + at * row_stride + channel;
        to[0] = sum[r][i].x * inverse;
        to[1] = sum[r][i].y * inverse;
        to[2] = sum[r][i].z * inverse;
        to[3] = sum[r][i].w * inverse;
      }
    }
  }
};

template <int D>
__global__ void __launch_bounds__(Shape<D>::warps * 32, D <= 64 ? 3 : 1)
    attention_float_kernel(Attention p, bool aligned) {
  using S = Shape<D>;
  SharedArena arena;
  auto q = arena.take<float>(S::rows * S::stride);
  auto k = arena.take<float>(S::keys * S::stride);
  auto v = arena.take<float>(S::keys * S::stride);
  auto weights = arena.take<float>(S::rows * S::weight_stride);
  auto bounds = arena.take<int>(2 * S::warps);

  const Place place(p, S::rows);
  const Intervals rows(p, place.batch, place.first + warp_in_block() * warp_rows);
  const int2 span = block_span(rows, bounds);
  const int dim = int(p.dim);
  const float* keys = place.at<const float>(p.k, p.k_stride);
  const float* values = place.at<const float>(p.v, p.v_stride);
  load_rows<S::rows, D, S::stride>(q, place.at<const float>(p.q, p.q_stride), p.q_stride.row, place.first,
                                   p.queries, dim, aligned);
  Warp<D> warp;
  warp.start();
  for (int first = span.x / S::keys * S::keys; first < span.y; first += S::keys) {
    const bool active = rows.sees(first, S::keys);
    load_rows<S::keys, D, S::stride>(k, keys, p.k_stride.row, first, p.keys, dim, aligned);
    cp_async_commit();
    load_rows<S::keys, D, S::stride>(v, values, p.v_stride.row, first, p.keys, dim, aligned);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (active) {
      warp.multiply_keys(q, k);
      warp.softmax(rows, first, p.scale * 1.44269504f, weights);  // rows of weights are the warp's own
    }
    cp_async_wait<0>();
    __syncthreads();
    if (active) warp.multiply_values(weights, v);
    __syncthreads();
  }
  cp_async_wait<0>();
  warp.store(place.at<float>(p.out, p.out_stride), p.out_stride.row, place.first, p);
}

template <int D>
Status launch_attention(const Attention& p, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(p.queries, S::rows) * p.heads * p.batch;
  const size_t shared = shared_bytes<float>(S::rows * S::stride) +
                        2 * shared_bytes<float>(S::keys * S::stride) +
                        shared_bytes<float>(S::rows * S::weight_stride) + shared_bytes<int>(2 * S::warps);
  return ARIMG_LAUNCH((attention_float_kernel<D>), blocks, S::warps * 32, shared, stream, p,
                      rows_aligned<float>(p));
}

}  // namespace

Status attention_cuda(const Attention& p, void* stream) {
  if (p.keys > key_limit - 256) return Status::unsupported;
  if (p.dtype != DType::f32) return attention_half_cuda(p, stream);
  if (p.dim <= 32) return launch_attention<32>(p, stream);
  if (p.dim <= 64) return launch_attention<64>(p, stream);
  if (p.dim <= 128) return launch_attention<128>(p, stream);
  if (p.dim <= 256) return launch_attention<256>(p, stream);
  return Status::unsupported;
}

}  // namespace arimg
