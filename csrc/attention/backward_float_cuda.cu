// See backward_rows.h and float_tile.h. fp32 with ordinary multiply-adds, and the kernel of delta for all
// dtypes.
#include "attention/backward_rows.h"
#include "attention/float_tile.h"

namespace arimg {
namespace {

using namespace cuda;

enum class Pass { both, values, keys };  // what a block of keys computes

template <int D>
struct Shape {
  static constexpr int warps = D <= 128 ? 4 : 2, own = warps * warp_rows;  // rows or keys of a block
  static constexpr int other = D <= 64 ? 32 : D <= 128 ? 16 : 8;           // keys or rows of a step
  static constexpr int stride = D + 4;                                     // rows fall on different banks
  static constexpr int weight_stride = other + 4;
  static constexpr bool separate = D > 128;  // the sums of one pass fill the registers
};

// A warp per row of [batch, heads, queries].
template <typename T>
__global__ void __launch_bounds__(128) attention_delta_kernel(AttentionBackward b) {
  const Attention& p = b.forward;
  const int64_t row = int64_t(blockIdx.x) * 4 + warp_in_block();
  if (row >= p.batch * p.heads * p.queries) return;
  const int64_t batch = row / p.queries / p.heads, head = row / p.queries % p.heads, i = row % p.queries;
  const T* out = static_cast<const T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head +
                 i * p.out_stride.row;
  const T* grad = static_cast<const T*>(b.grad_out) + batch * b.grad_out_stride.batch +
                  head * b.grad_out_stride.head + i * b.grad_out_stride.row;
  float sum = 0.f;
  for (int d = lane_in_warp(); d < p.dim; d += 32) sum = __fmaf_rn(to_float(out[d]), to_float(grad[d]), sum);
  sum = warp_reduce_sum(sum);
  if (lane_in_warp() == 0) b.delta[row] = sum;
}

template <int D>
__device__ __forceinline__ void clear(float4 (&sum)[4][D / 32]) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int i = 0; i < D / 32; ++i) sum[r][i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

template <int D>
__global__ void __launch_bounds__(Shape<D>::warps * 32, D <= 96 ? 2 : 1)
    attention_grad_q_float_kernel(AttentionBackward b, bool aligned) {
  using S = Shape<D>;
  constexpr int own = S::other / 8;
  const Attention& p = b.forward;
  SharedArena arena;
  auto q = arena.take<float>(S::own * S::stride);
  auto grad = arena.take<float>(S::own * S::stride);
  auto k = arena.take<float>(S::other * S::stride);
  auto v = arena.take<float>(S::other * S::stride);
  auto slopes = arena.take<float>(S::own * S::weight_stride);
  auto bounds = arena.take<int>(4 * S::warps);

  const Place place(p, S::own);
  const int dim = int(p.dim), lane = lane_in_warp() % 8;
  const Intervals rows(p, KeyView(p), place.batch, place.first + warp_in_block() * warp_rows, place.last);
  const BlockKeys steps(rows, S::other, bounds);
  const float scale = place.scale(p);
  const float* keys = place.at<const float>(p.k, p.k_stride, place.kv_head);
  const float* values = place.at<const float>(p.v, p.v_stride, place.kv_head);
  load_rows<S::own, D, S::stride>(q, place.at<const float>(p.q, p.q_stride, place.head), p.q_stride.row,
                                  place.first, place.last, dim, aligned);
  load_rows<S::own, D, S::stride>(grad, place.at<const float>(b.grad_out, b.grad_out_stride, place.head),
                                  b.grad_out_stride.row, place.first, place.last, dim, aligned);
  float lse[4], delta[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = place.first + float_row() + r;
    const int64_t at = (place.batch * p.heads + place.head) * p.queries + row;
    lse[r] = row < place.last ? p.lse[at] * kLog2E : 0.f;
    delta[r] = row < place.last ? b.delta[at] : 0.f;
  }
  float4 sum[4][D / 32];
  clear<D>(sum);
  for (int first = steps.next(0); first != key_limit; first = steps.next(first + S::other)) {
    load_rows<S::other, D, S::stride>(k, keys, p.k_stride.row, first, p.keys, dim, aligned);
    load_rows<S::other, D, S::stride>(v, values, p.v_stride.row, first, p.keys, dim, aligned);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (rows.sees(first, S::other)) {
      float score[4][own], slope[4][own];
      multiply_floats<D, S::stride>(score, q, k);
      multiply_floats<D, S::stride>(slope, grad, v);
      const bool whole = rows.sees_all(first, S::other);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const RowKeys mine = rows.of(lane_in_warp() / 8 * 4 + r);
#pragma unroll
        for (int i = 0; i < own; ++i) {
          const bool seen = whole || mine.sees(first + i * 8 + lane, rows.sinks);
          const float weight = exp2f(score[r][i] * scale - lse[r]);
          slopes[(float_row() + r) * S::weight_stride + i * 8 + lane] =
              seen ? weight * (slope[r][i] - delta[r]) : 0.f;
        }
      }
      __syncwarp();  // rows of slopes are the warp's own
      accumulate_floats<D, S::stride, S::other, S::weight_stride>(sum, slopes, k);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  float* to = static_cast<float*>(b.grad_q) + (place.batch * p.heads + place.head) * p.queries * p.dim;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = place.first + float_row() + r;
    if (row < place.last) store_floats<D>(to + row * p.dim, sum[r], p.scale, dim);
  }
}

template <int D, Pass pass>
__global__ void __launch_bounds__(Shape<D>::warps * 32, D <= 96 ? 2 : 1)
    attention_grad_kv_float_kernel(AttentionBackward b, bool aligned) {
  using S = Shape<D>;
  constexpr int own = S::other / 8;
  constexpr bool with_values = pass != Pass::keys, with_keys = pass != Pass::values;
  const Attention& p = b.forward;
  SharedArena arena;
  auto scratch = arena.take<int>(32);
  auto k = arena.take<float>(S::own * S::stride);
  auto v = arena.take<float>(with_keys ? S::own * S::stride : 0);
  auto q = arena.take<float>(S::other * S::stride);
  auto grad = arena.take<float>(S::other * S::stride);
  auto weights = arena.take<float>(S::own * S::weight_stride);
  const RowTiles<S::other, 1> rows(arena);

  const KeyPlace place(b, S::own, scratch);
  const int dim = int(p.dim), sinks = int(p.sinks), lane = lane_in_warp() % 8;
  const int own_shift = p.self ? int(p.keys - p.queries) : -key_limit;
  const float* keys =
      static_cast<const float*>(p.k) + place.batch * p.k_stride.batch + place.kv_head * p.k_stride.head;
  const float* values =
      static_cast<const float*>(p.v) + place.batch * p.v_stride.batch + place.kv_head * p.v_stride.head;
  load_rows<S::own, D, S::stride>(k, keys, p.k_stride.row, place.first, p.keys, dim, aligned);
  if constexpr (with_keys)
    load_rows<S::own, D, S::stride>(v, values, p.v_stride.row, place.first, p.keys, dim, aligned);

  float4 sum_k[4][with_keys ? D / 32 : 1], sum_v[4][with_values ? D / 32 : 1];
  if constexpr (with_keys) clear<D>(sum_k);
  if constexpr (with_values) clear<D>(sum_v);
  // Steps: the row tiles of one query head of the group after another.
  const int group = int(p.heads / p.kv_heads), row_first = place.row_low / S::other * S::other;
  const int per_head =
      place.row_low < place.row_high ? int(ceil_div(place.row_high - row_first, S::other)) : 0;
  for (int step = 0; step < group * per_head; ++step) {
    const int64_t head = place.kv_head * group + step / per_head;
    const int first_row = row_first + step % per_head * S::other;
    const float* from_q =
        static_cast<const float*>(p.q) + place.batch * p.q_stride.batch + head * p.q_stride.head;
    const float* from_grad = static_cast<const float*>(b.grad_out) + place.batch * b.grad_out_stride.batch +
                             head * b.grad_out_stride.head;
    load_rows<S::other, D, S::stride>(q, from_q, p.q_stride.row, first_row, p.queries, dim, aligned);
    load_rows<S::other, D, S::stride>(grad, from_grad, b.grad_out_stride.row, first_row, p.queries, dim,
                                      aligned);
    cp_async_commit();
    rows.load(b, place.batch, head, first_row, 0);
    cp_async_wait<0>();
    __syncthreads();
    const float factor = p.scale * (p.head_scale != nullptr ? p.head_scale[head] : 1.f);
    const bool whole = rows.whole(0, place.first, S::own);
    float weight[4][own];
    multiply_floats<D, S::stride>(weight, k, q);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const int row = i * 8 + lane, key = place.first + float_row() + r;
        const bool seen = whole || rows.sees(row, key, sinks, first_row + row + own_shift);
        weight[r][i] = seen ? exp2f(weight[r][i] * (factor * kLog2E) - rows.lse[row]) : 0.f;
        if constexpr (with_values) weights[(float_row() + r) * S::weight_stride + row] = weight[r][i];
      }
    if constexpr (with_values) {
      __syncwarp();  // rows of weights are the warp's own
      accumulate_floats<D, S::stride, S::other, S::weight_stride>(sum_v, weights, grad);
      __syncwarp();
    }
    if constexpr (with_keys) {
      float slope[4][own];
      multiply_floats<D, S::stride>(slope, v, grad);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int i = 0; i < own; ++i)
          weights[(float_row() + r) * S::weight_stride + i * 8 + lane] =
              weight[r][i] * (slope[r][i] - rows.delta[i * 8 + lane]) * factor;
      __syncwarp();
      accumulate_floats<D, S::stride, S::other, S::weight_stride>(sum_k, weights, q);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  const int64_t base = (place.batch * p.kv_heads + place.kv_head) * p.keys;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t key = place.first + float_row() + r;
    if (key >= p.keys) continue;
    if constexpr (with_keys)
      store_floats<D>(static_cast<float*>(b.grad_k) + (base + key) * p.dim, sum_k[r], 1.f, dim);
    if constexpr (with_values)
      store_floats<D>(static_cast<float*>(b.grad_v) + (base + key) * p.dim, sum_v[r], 1.f, dim);
  }
}

template <int D>
constexpr size_t tile_bytes(int tiles_of_own) {
  using S = Shape<D>;
  return tiles_of_own * shared_bytes<float>(S::own * S::stride) +
         2 * shared_bytes<float>(S::other * S::stride) + shared_bytes<float>(S::own * S::weight_stride);
}

template <int D, Pass pass>
Status launch_keys(const AttentionBackward& b, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(b.forward.keys, S::own) * b.forward.kv_heads * b.forward.batch;
  const size_t shared =
      shared_bytes<int>(32) + tile_bytes<D>(pass == Pass::values ? 1 : 2) + RowTiles<S::other, 1>::bytes();
  return ARIMG_LAUNCH((attention_grad_kv_float_kernel<D, pass>), blocks, S::warps * 32, shared, stream, b,
                      backward_aligned<float>(b));
}

template <int D>
Status launch_backward(const AttentionBackward& b, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(b.forward.queries, S::own) * b.forward.heads * b.forward.batch;
  Status status =
      ARIMG_LAUNCH((attention_grad_q_float_kernel<D>), blocks, S::warps * 32,
                   tile_bytes<D>(2) + shared_bytes<int>(4 * S::warps), stream, b, backward_aligned<float>(b));
  if (status != Status::ok) return status;
  if constexpr (S::separate) {
    status = launch_keys<D, Pass::values>(b, stream);
    return status == Status::ok ? launch_keys<D, Pass::keys>(b, stream) : status;
  } else {
    return launch_keys<D, Pass::both>(b, stream);
  }
}

template <typename T>
Status launch_delta(const AttentionBackward& b, void* stream) {
  const Attention& p = b.forward;
  return ARIMG_LAUNCH((attention_delta_kernel<T>), ceil_div(p.batch * p.heads * p.queries, 4), 128, 0, stream,
                      b);
}

}  // namespace

Status attention_backward_cuda(const AttentionBackward& b, void* stream) {
  const Attention& p = b.forward;
  if (p.keys > key_limit - 256 || p.queries > key_limit - 256) return Status::unsupported;
  Status status = p.dtype == DType::f32    ? launch_delta<float>(b, stream)
                  : p.dtype == DType::bf16 ? launch_delta<BFloat16>(b, stream)
                                           : launch_delta<Half>(b, stream);
  if (status != Status::ok) return status;
  if (p.dtype != DType::f32) return attention_backward_half_cuda(b, stream);
  if (p.dim <= 32) return launch_backward<32>(b, stream);
  if (p.dim <= 64) return launch_backward<64>(b, stream);
  if (p.dim <= 96) return launch_backward<96>(b, stream);
  if (p.dim <= 128) return launch_backward<128>(b, stream);
  if (p.dim <= 256) return launch_backward<256>(b, stream);
  return Status::unsupported;
}

}  // namespace arimg
