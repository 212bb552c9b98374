// See backward_rows.h. bf16 and f16 on tensor cores. A warp owns 16 rows (grad_q) or 16 keys (grad_k,
// grad_v), whose weights and slopes never leave its registers.
#include "attention/backward_rows.h"
#include "attention/half_tile.h"

namespace arimg {
namespace {

using namespace cuda;

enum class Pass { both, values, keys };  // what a block of keys computes

template <int D>
struct Shape {
  static constexpr int warps = 4, own = warps * warp_rows;         // rows or keys of a block
  static constexpr int other = D <= 64 ? 64 : D <= 128 ? 32 : 16;  // keys or rows of a step
  static constexpr int stride = D + 8;                             // rows fall on different banks
  static constexpr int stages = D <= 128 ? 2 : 1;                  // steps on their way or in work
  static constexpr bool separate = D > 128;                        // the sums of one pass fill the registers
};

template <typename T, int D>
__global__ void __launch_bounds__(Shape<D>::warps * 32)
    attention_grad_q_half_kernel(AttentionBackward b, bool aligned) {
  using S = Shape<D>;
  constexpr int tiles = S::other / 8;
  const Attention& p = b.forward;
  SharedArena arena;
  auto q = arena.take<T>(S::own * S::stride);
  auto grad = arena.take<T>(S::own * S::stride);
  auto k = arena.take<T>(S::stages * S::other * S::stride);
  auto v = arena.take<T>(S::stages * S::other * S::stride);
  auto bounds = arena.take<int>(4 * S::warps);

  const Place place(p, S::own);
  const int warp_first = warp_in_block() * warp_rows, dim = int(p.dim);
  const Intervals rows(p, KeyView(p), place.batch, place.first + warp_first, place.last);
  const BlockKeys steps(rows, S::other, bounds);
  const float scale = place.scale(p);
  const T* keys = place.at<const T>(p.k, p.k_stride, place.kv_head);
  const T* values = place.at<const T>(p.v, p.v_stride, place.kv_head);
  constexpr int tile_size = S::other * S::stride;
  auto load_step = [&](int first, int stage) {
    load_rows<S::other, D, S::stride>(k.part(stage * tile_size, tile_size), keys, p.k_stride.row, first,
                                      p.keys, dim, aligned);
    load_rows<S::other, D, S::stride>(v.part(stage * tile_size, tile_size), values, p.v_stride.row, first,
                                      p.keys, dim, aligned);
    cp_async_commit();
  };
  load_rows<S::own, D, S::stride>(q, place.at<const T>(p.q, p.q_stride, place.head), p.q_stride.row,
                                  place.first, place.last, dim, aligned);
  load_rows<S::own, D, S::stride>(grad, place.at<const T>(b.grad_out, b.grad_out_stride, place.head),
                                  b.grad_out_stride.row, place.first, place.last, dim, aligned);
  int first = steps.next(0), stage = 0;
  if (S::stages > 1 && first != key_limit) load_step(first, 0);

  const int g = lane_in_warp() / 4, t = lane_in_warp() % 4;
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = place.first + warp_first + g + half * 8;
    const int64_t at = (place.batch * p.heads + place.head) * p.queries + row;
    lse[half] = row < place.last ? p.lse[at] * kLog2E : 0.f;
    delta[half] = row < place.last ? b.delta[at] : 0.f;
  }
  float sum[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.f;

  while (first != key_limit) {
    const int next = steps.next(first + S::other);
    if constexpr (S::stages > 1) {
      if (next != key_limit) {
        load_step(next, 1 - stage);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    } else {
      load_step(first, 0);
      cp_async_wait<0>();
    }
    __syncthreads();
    if (rows.sees(first, S::other)) {
      const auto k_now = k.part(stage * tile_size, tile_size), v_now = v.part(stage * tile_size, tile_size);
      float score[tiles][4], slope[tiles][4];
      multiply_transposed<D, S::stride>(score, q, warp_first, k_now);
      multiply_transposed<D, S::stride>(slope, grad, warp_first, v_now);
      const bool whole = rows.sees_all(first, S::other);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowKeys mine = rows.of(g + half * 8);
#pragma unroll
        for (int i = 0; i < tiles * 2; ++i) {
          const int key = first + i / 2 * 8 + t * 2 + i % 2;
          float& s = slope[i / 2][half * 2 + i % 2];
          const float weight = exp2f(score[i / 2][half * 2 + i % 2] * scale - lse[half]);
          s = whole || mine.sees(key, rows.sinks) ? weight * (s - delta[half]) : 0.f;
        }
      }
      accumulate<D, S::stride>(sum, slope, k_now);
    }
    __syncthreads();
    first = next;
    stage = S::stages - 1 - stage;
  }
  T* to = static_cast<T*>(b.grad_q) + (place.batch * p.heads + place.head) * p.queries * p.dim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = place.first + warp_first + g + half * 8;
    if (row < place.last) store_fragment_row<D>(to + row * p.dim, sum, half, p.scale, dim);
  }
  cp_async_wait<0>();
}

template <typename T, int D, Pass pass>
__global__ void __launch_bounds__(Shape<D>::warps * 32)
    attention_grad_kv_half_kernel(AttentionBackward b, bool aligned) {
  using S = Shape<D>;
  constexpr int tiles = S::other / 8, tile_size = S::other * S::stride;
  constexpr bool with_values = pass != Pass::keys, with_keys = pass != Pass::values;
  const Attention& p = b.forward;
  SharedArena arena;
  auto scratch = arena.take<int>(32);
  auto k = arena.take<T>(S::own * S::stride);
  auto v = arena.take<T>(S::own * S::stride);
  auto q = arena.take<T>(S::stages * tile_size);
  auto grad = arena.take<T>(S::stages * tile_size);
  const RowTiles<S::other, S::stages> rows(arena);

  const KeyPlace place(b, S::own, scratch);
  const int dim = int(p.dim), warp_first = warp_in_block() * warp_rows, sinks = int(p.sinks);
  const int own_shift = p.self ? int(p.keys - p.queries) : -key_limit;
  const T* keys =
      static_cast<const T*>(p.k) + place.batch * p.k_stride.batch + place.kv_head * p.k_stride.head;
  const T* values =
      static_cast<const T*>(p.v) + place.batch * p.v_stride.batch + place.kv_head * p.v_stride.head;
  load_rows<S::own, D, S::stride>(k, keys, p.k_stride.row, place.first, p.keys, dim, aligned);
  load_rows<S::own, D, S::stride>(v, values, p.v_stride.row, place.first, p.keys, dim, aligned);
  cp_async_commit();

  // Steps: the row tiles of one query head of the group after another.
  const int group = int(p.heads / p.kv_heads), row_first = place.row_low / S::other * S::other;
  const int per_head =
      place.row_low < place.row_high ? int(ceil_div(place.row_high - row_first, S::other)) : 0;
  auto load_step = [&](int step, int stage) {
    const int64_t head = place.kv_head * group + step / per_head,
                  first = row_first + step % per_head * S::other;
    const T* from_q = static_cast<const T*>(p.q) + place.batch * p.q_stride.batch + head * p.q_stride.head;
    const T* from_grad = static_cast<const T*>(b.grad_out) + place.batch * b.grad_out_stride.batch +
                         head * b.grad_out_stride.head;
    load_rows<S::other, D, S::stride>(q.part(stage * tile_size, tile_size), from_q, p.q_stride.row, first,
                                      p.queries, dim, aligned);
    load_rows<S::other, D, S::stride>(grad.part(stage * tile_size, tile_size), from_grad,
                                      b.grad_out_stride.row, first, p.queries, dim, aligned);
    cp_async_commit();
    rows.load(b, place.batch, head, first, stage);
  };
  float sum_k[with_keys ? D / 8 : 1][4], sum_v[with_values ? D / 8 : 1][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (with_keys) sum_k[i][j] = 0.f;
      if constexpr (with_values) sum_v[i][j] = 0.f;
    }
  const int g = lane_in_warp() / 4, t = lane_in_warp() % 4, steps = group * per_head;
  if (S::stages > 1 && steps > 0) load_step(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = S::stages > 1 ? step % 2 : 0;
    if constexpr (S::stages > 1) {
      if (step + 1 < steps) {
        load_step(step + 1, 1 - stage);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    } else {
      load_step(step, 0);
      cp_async_wait<0>();
    }
    __syncthreads();
    const auto q_now = q.part(stage * tile_size, tile_size),
               grad_now = grad.part(stage * tile_size, tile_size);
    const int64_t head = place.kv_head * group + step / per_head;
    const float factor = p.scale * (p.head_scale != nullptr ? p.head_scale[head] : 1.f);
    const int first_row = row_first + step % per_head * S::other;
    const bool whole = rows.whole(stage, place.first, S::own);
    float weight[tiles][4];  // of keys g and g + 8, rows 2 t and 2 t + 1 of each 8
    multiply_transposed<D, S::stride>(weight, k, warp_first, q_now);
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = i * 8 + t * 2 + j % 2, at = stage * S::other + row;
        const int key = place.first + warp_first + g + j / 2 * 8;
        const bool seen = whole || rows.sees(at, key, sinks, first_row + row + own_shift);
        weight[i][j] = seen ? exp2f(weight[i][j] * (factor * kLog2E) - rows.lse[at]) : 0.f;
      }
    if constexpr (with_values) accumulate<D, S::stride>(sum_v, weight, grad_now);
    if constexpr (with_keys) {
      float slope[tiles][4];
      multiply_transposed<D, S::stride>(slope, v, warp_first, grad_now);
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          slope[i][j] =
              weight[i][j] * (slope[i][j] - rows.delta[stage * S::other + i * 8 + t * 2 + j % 2]) * factor;
      accumulate<D, S::stride>(sum_k, slope, q_now);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  const int64_t base = (place.batch * p.kv_heads + place.kv_head) * p.keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t key = place.first + warp_first + g + half * 8;
    if (key >= p.keys) continue;
    if constexpr (with_keys)
      store_fragment_row<D>(static_cast<T*>(b.grad_k) + (base + key) * p.dim, sum_k, half, 1.f, dim);
    if constexpr (with_values)
      store_fragment_row<D>(static_cast<T*>(b.grad_v) + (base + key) * p.dim, sum_v, half, 1.f, dim);
  }
}

template <typename T, int D, Pass pass>
Status launch_keys(const AttentionBackward& b, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(b.forward.keys, S::own) * b.forward.kv_heads * b.forward.batch;
  const size_t shared = shared_bytes<int>(32) + 2 * shared_bytes<T>(S::own * S::stride) +
                        2 * shared_bytes<T>(S::stages * S::other * S::stride) +
                        RowTiles<S::other, S::stages>::bytes();
  return ARIMG_LAUNCH((attention_grad_kv_half_kernel<T, D, pass>), blocks, S::warps * 32, shared, stream, b,
                      backward_aligned<T>(b));
}

template <typename T, int D>
Status launch_backward(const AttentionBackward& b, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(b.forward.queries, S::own) * b.forward.heads * b.forward.batch;
  const size_t shared = 2 * shared_bytes<T>(S::own * S::stride) +
                        2 * shared_bytes<T>(S::stages * S::other * S::stride) +
                        shared_bytes<int>(4 * S::warps);
  Status status = ARIMG_LAUNCH((attention_grad_q_half_kernel<T, D>), blocks, S::warps * 32, shared, stream, b,
                               backward_aligned<T>(b));
  if (status != Status::ok) return status;
  if constexpr (S::separate) {
    status = launch_keys<T, D, Pass::values>(b, stream);
    return status == Status::ok ? launch_keys<T, D, Pass::keys>(b, stream) : status;
  } else {
    return launch_keys<T, D, Pass::both>(b, stream);
  }
}

template <typename T>
Status dispatch_dim(const AttentionBackward& b, void* stream) {
  const int64_t dim = b.forward.dim;
  if (dim <= 32) return launch_backward<T, 32>(b, stream);
  if (dim <= 64) return launch_backward<T, 64>(b, stream);
  if (dim <= 96) return launch_backward<T, 96>(b, stream);
  if (dim <= 128) return launch_backward<T, 128>(b, stream);
  if (dim <= 256) return launch_backward<T, 256>(b, stream);
  return Status::unsupported;
}

}  // namespace

Status attention_backward_half_cuda(const AttentionBackward& b, void* stream) {
  return b.forward.dtype == DType::bf16 ? dispatch_dim<BFloat16>(b, stream) : dispatch_dim<Half>(b, stream);
}

}  // namespace arimg
