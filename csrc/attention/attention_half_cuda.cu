// See contract.h. bf16 and f16 on tensor cores (mma.sync, compute capability 8.0 and up), online softmax
// after Dao, "FlashAttention-2", 2023. Four warps, 16 query rows each; key tiles that no row of the block
// sees are never loaded, those that no row of the warp sees never multiplied, and only tiles at the edge of
// an interval are masked.
#include "attention/rows.h"

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

// Fragments of a 16-row tile, lane addresses as ldmatrix wants them.
__device__ __forceinline__ int fragment_row() {
  return lane_in_warp() % 16;
}
__device__ __forceinline__ int fragment_column() {
  return lane_in_warp() / 16 * 8;
}

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
    // Rows of K are columns of B: matrices (keys 0-7 | 8-15) x (channels 0-7 | 8-15), channels first.
    const int row = lane_in_warp() / 16 * 8 + lane_in_warp() % 8, column = lane_in_warp() / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      if constexpr (S::keep_queries) {
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] = query[step][j];
      } else {
        load_query(a, q, step);
      }
#pragma unroll
      for (int i = 0; i < tiles; i += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, k.data() + (i * 8 + row) * S::stride + step * 16 + column);
        mma_m16n8k16<T>(score[i], a, {b[0], b[1]});
        mma_m16n8k16<T>(score[i + 1], a, {b[2], b[3]});
      }
    }
  }

  // Scores become weights; older sums shrink. first: the tile's first key.
  __device__ __forceinline__ void softmax(const Intervals& rows, int first, float scale) {
    const int g = lane_in_warp() / 4, t = lane_in_warp() % 4;
    const bool whole = rows.sees_all(first, S::keys);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int start = rows.start_of(g + half * 8) - first, end = rows.end_of(g + half * 8) - first;
      float line[tiles * 2];
#pragma unroll
      for (int i = 0; i < tiles * 2; ++i) {
        const int key = i / 2 * 8 + t * 2 + i % 2;
        const bool seen = whole || (key >= start && key < end);
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

  // sum += weights V
  __device__ __forceinline__ void multiply_values(Shared<T> v) {
#pragma unroll
    for (int step = 0; step < S::keys / 16; ++step) {
      const float (&low)[4] = score[step * 2];
      const float (&high)[4] = score[step * 2 + 1];
      const uint32_t a[4] = {pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]),
                             pack2<T>(high[2], high[3])};
#pragma unroll
      for (int i = 0; i < D / 8; i += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v.data() + (step * 16 + fragment_row()) * S::stride + i * 8 + fragment_column());
        mma_m16n8k16<T>(sum[i], a, {b[0], b[1]});
        mma_m16n8k16<T>(sum[i + 1], a, {b[2], b[3]});
      }
    }
  }

  __device__ __forceinline__ void store(T* out, int64_t row_stride, int64_t first, const Attention& p) {
    const int g = lane_in_warp() / 4, t = lane_in_warp() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = inverse_weight<4>(weight[half]);
      const int64_t row = first + g + half * 8;
      if (row >= p.queries) continue;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        if (i * 8 < p.dim)
          *reinterpret_cast<uint32_t*>(out + row * row_stride + i * 8 + t * 2) =
              pack2<T>(sum[i][half * 2] * inverse, sum[i][half * 2 + 1] * inverse);
    }
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(Shape<D>::warps * 32) attention_half_kernel(Attention p, bool aligned) {
  using S = Shape<D>;
  SharedArena arena;
  auto q = arena.take<T>(S::rows * S::stride);
  auto k = arena.take<T>(S::keys * S::stride);
  auto v = arena.take<T>(S::keys * S::stride);
  auto bounds = arena.take<int>(2 * S::warps);

  const Place place(p, S::rows);
  const int64_t first_row = place.first + warp_in_block() * warp_rows;
  const Intervals rows(p, place.batch, first_row);
  const int2 span = block_span(rows, bounds);
  const int dim = int(p.dim);
  const T* keys = place.at<const T>(p.k, p.k_stride);
  const T* values = place.at<const T>(p.v, p.v_stride);
  auto load_keys = [&](int first) {
    load_rows<S::keys, D, S::stride>(k, keys, p.k_stride.row, first, p.keys, dim, aligned);
    cp_async_commit();
  };

  const int begin = span.x / S::keys * S::keys;
  load_rows<S::rows, D, S::stride>(q, place.at<const T>(p.q, p.q_stride), p.q_stride.row, place.first,
                                   p.queries, dim, aligned);
  if (begin < span.y) load_keys(begin);
  cp_async_wait<0>();
  __syncthreads();
  Warp<T, D> warp;
  warp.start(q);
  for (int first = begin; first < span.y; first += S::keys) {
    const bool active = rows.sees(first, S::keys);
    load_rows<S::keys, D, S::stride>(v, values, p.v_stride.row, first, p.keys, dim, aligned);
    cp_async_commit();
    if (active) {
      warp.multiply_keys(q, k);
      warp.softmax(rows, first, p.scale * 1.44269504f);
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are here, and the keys are no longer needed
    if (first + S::keys < span.y) load_keys(first + S::keys);
    if (active) warp.multiply_values(v);
    cp_async_wait<0>();
    __syncthreads();
  }
  warp.store(place.at<T>(p.out, p.out_stride), p.out_stride.row, first_row, p);
}

template <typename T, int D>
Status launch_attention(const Attention& p, void* stream) {
  using S = Shape<D>;
  const int64_t blocks = ceil_div(p.queries, S::rows) * p.heads * p.batch;
  const size_t shared = shared_bytes<T>(S::rows * S::stride) + 2 * shared_bytes<T>(S::keys * S::stride) +
                        shared_bytes<int>(2 * S::warps);
  return ARIMG_LAUNCH((attention_half_kernel<T, D>), blocks, S::warps * 32, shared, stream, p,
                      rows_aligned<T>(p));
}

template <typename T>
Status dispatch_dim(const Attention& p, void* stream) {
  if (p.dim <= 32) return launch_attention<T, 32>(p, stream);
  if (p.dim <= 64) return launch_attention<T, 64>(p, stream);
  if (p.dim <= 128) return launch_attention<T, 128>(p, stream);
  if (p.dim <= 256) return launch_attention<T, 256>(p, stream);
  return Status::unsupported;
}

}  // namespace

Status attention_half_cuda(const Attention& p, void* stream) {
  return p.dtype == DType::bf16 ? dispatch_dim<BFloat16>(p, stream) : dispatch_dim<Half>(p, stream);
}

}  // namespace arimg
