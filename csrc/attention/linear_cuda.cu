// See linear_contract.h. One block per head and 32 columns of its values keeps that part of the state in
// shared memory and walks the sequence in pieces of 32 rows. A warp owns some rows of scores and outputs (a
// lane is a key, then a column) and some rows of the state. Ordinary multiply-adds in float32 for every
// storage type.
#include "attention/linear_contract.h"
#include "core/chunk.h"
#include "core/cuda.h"
#include "core/dtype.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256, warps = threads / 32;
constexpr int columns = 32;

template <int N>
struct Shape {
  static constexpr int rows = N <= 128 ? 32 : 16;  // of a piece: the tiles fit 99 KiB
  static constexpr int own_rows = rows / warps;    // of a warp
  static constexpr int own_state = N / warps;      // state rows of a warp
  static constexpr int stride = N + 4;             // rows of float4 fall on different banks
  static constexpr int weight_stride = rows + 4;
};

// Where a block works.
struct Place {
  int64_t batch, head, group;
  int column;  // the first of its values
  __device__ __forceinline__ explicit Place(const GatedScan& p) {
    const int64_t slices = ceil_div(p.value_dim, columns), block = blockIdx.x;
    column = int(block % slices) * columns;
    head = block / slices % p.heads;
    batch = block / slices / p.heads;
    group = head / (p.heads / p.groups);
  }
  template <typename T>
  __device__ __forceinline__ T* at(const void* base, const ScanStrides& s, int64_t which) const {
    return static_cast<T*>(const_cast<void*>(base)) + batch * s.batch + which * s.head;
  }
};

// Rows [first, first + count) and channels [0, width) of a tensor into a tile of `tile_rows` rows of
// `tile_width`, zero beyond.
template <int tile_rows, int tile_width, int stride, bool vectors, typename T>
__device__ __forceinline__ void load_tile(Shared<float> to, const T* from, int64_t row_stride, int64_t first,
                                          int count, int width) {
  constexpr int pieces = tile_width / chunk<T>;
#pragma unroll 2
  for (int i = thread_in_block(); i < tile_rows * pieces; i += threads) {
    const int row = i / pieces, channel = i % pieces * chunk<T>;
    float x[chunk<T>] = {};
    if (row < count && channel < width)
      load_chunk<vectors>(x, from + (first + row) * row_stride + channel, width - channel);
#pragma unroll
    for (int j = 0; j < chunk<T>; j += 4)
      to.template vec<float4>(row * stride + channel + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
  }
}

// Of the rows of a piece: the sums of the log decays from the chunk's start (as two floats: a difference of
// two large sums is then exact), exp of them, the weights of the values, and what is left of these at the
// end.
struct Decays {
  Shared<float> total, rest, from_start, weight, left;
  int rows;

  __device__ __forceinline__ float between(int i, int j) const {
    return expf((total[i] - total[j]) + (rest[i] - rest[j]));
  }

  // By the first warp. Returns the sum so far.
  __device__ __forceinline__ double add(const GatedScan& p, const float* gate, int64_t head, int count,
                                        double before) const {
    const int lane = lane_in_warp();
    const float g = lane < count ? gate[lane * p.gate_stride.row] : 0.f;
    const float a = p.rate != nullptr ? g * p.rate[head] : g;
    double sum = lane >= count ? 0.f : a < kScanLowest ? kScanLowest : a;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(full_warp, sum, step);
      if (lane >= step) sum += other;
    }
    sum += before;
    const double all = __shfl_sync(full_warp, sum, 31);
    if (lane < rows) {
      const float w = lane >= count ? 0.f : p.rate != nullptr ? p.scale * g : p.scale;
      total[lane] = float(sum);
      rest[lane] = float(sum - double(float(sum)));
      from_start[lane] = expf(float(sum));
      weight[lane] = w;
      left[lane] = p.causal ? w * expf(float(all - sum)) : w;
    }
    if (lane == 0) total[rows] = float(all);
    return all;
  }
};

// This warp's rows of weights: scores times decays, zero for later keys.
template <int N>
__device__ __forceinline__ void weigh(Shared<float> q, Shared<float> k, const Decays& decays,
                                      Shared<float> weights) {
  using S = Shape<N>;
  const int first = warp_in_block() * S::own_rows, key = lane_in_warp() % S::rows;
  float score[S::own_rows] = {};
#pragma unroll 4
  for (int d = 0; d < N; d += 4) {
    const float4 b = k.template vec<float4>(key * S::stride + d);
#pragma unroll
    for (int r = 0; r < S::own_rows; ++r) {
      const float4 a = q.template vec<float4>((first + r) * S::stride + d);
      score[r] = __fmaf_rn(a.x, b.x, score[r]);
      score[r] = __fmaf_rn(a.y, b.y, score[r]);
      score[r] = __fmaf_rn(a.z, b.z, score[r]);
      score[r] = __fmaf_rn(a.w, b.w, score[r]);
    }
  }
  if (lane_in_warp() >= S::rows) return;
#pragma unroll
  for (int r = 0; r < S::own_rows; ++r) {
    const int row = first + r;
    weights[row * S::weight_stride + key] =
        key <= row ? score[r] * decays.between(row, key) * decays.weight[key] : 0.f;
  }
}

// out[r] = exp(A) q S + weights v for this warp's rows and this lane's column.
template <int N>
__device__ __forceinline__ void multiply(float (&out)[Shape<N>::own_rows], Shared<float> q, Shared<float> v,
                                         Shared<float> state, Shared<float> weights, const Decays& decays,
                                         bool causal) {
  using S = Shape<N>;
  const int first = warp_in_block() * S::own_rows, lane = lane_in_warp();
#pragma unroll
  for (int r = 0; r < S::own_rows; ++r) out[r] = 0.f;
  auto add = [&](Shared<float> rows, int stride, Shared<float> matrix, int depth) {
#pragma unroll 4
    for (int d = 0; d < depth; d += 4) {
      const float b0 = matrix[d * columns + lane], b1 = matrix[(d + 1) * columns + lane];
      const float b2 = matrix[(d + 2) * columns + lane], b3 = matrix[(d + 3) * columns + lane];
#pragma unroll
      for (int r = 0; r < S::own_rows; ++r) {
        const float4 a = rows.template vec<float4>((first + r) * stride + d);
        out[r] = __fmaf_rn(a.x, b0, out[r]);
        out[r] = __fmaf_rn(a.y, b1, out[r]);
        out[r] = __fmaf_rn(a.z, b2, out[r]);
        out[r] = __fmaf_rn(a.w, b3, out[r]);
      }
    }
  };
  add(q, S::stride, state, N);
#pragma unroll
  for (int r = 0; r < S::own_rows; ++r) out[r] *= decays.from_start[first + r];
  if (causal) add(weights, S::weight_stride, v, S::rows);
}

// next += K^T V for this warp's rows of the state and this lane's column.
template <int N>
__device__ __forceinline__ void accumulate(float (&next)[Shape<N>::own_state], Shared<float> k,
                                           Shared<float> v, const Decays& decays) {
  using S = Shape<N>;
  const int first = warp_in_block() * S::own_state, lane = lane_in_warp();
#pragma unroll 4
  for (int j = 0; j < S::rows; ++j) {
    const float value = v[j * columns + lane] * decays.left[j];
#pragma unroll
    for (int i = 0; i < S::own_state; i += 4) {
      const float4 a = k.template vec<float4>(j * S::stride + first + i);
      next[i] = __fmaf_rn(a.x, value, next[i]);
      next[i + 1] = __fmaf_rn(a.y, value, next[i + 1]);
      next[i + 2] = __fmaf_rn(a.z, value, next[i + 2]);
      next[i + 3] = __fmaf_rn(a.w, value, next[i + 3]);
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void store(const float (&out)[Shape<N>::own_rows], const GatedScan& p,
                                      const Place& place, int64_t first, int count, Shared<float> v) {
  const int column = place.column + lane_in_warp();
  if (column >= p.value_dim) return;
  const T* base = place.at<const T>(p.base, p.base_stride, place.head);
  T* to = place.at<T>(p.out, p.out_stride, place.head);
#pragma unroll
  for (int r = 0; r < Shape<N>::own_rows; ++r) {
    const int row = warp_in_block() * Shape<N>::own_rows + r;
    if (row >= count) return;
    float x = out[r];
    if (p.skip != nullptr) x = __fmaf_rn(p.skip[place.head], v[row * columns + lane_in_warp()], x);
    if (p.base != nullptr) x += to_float(base[(first + row) * p.base_stride.row + column]);
    to[(first + row) * p.out_stride.row + column] = from_float<T>(x);
  }
}

template <typename T, int N, bool vectors>
__global__ void __launch_bounds__(threads, 1) gated_scan_kernel(GatedScan p) {
  using S = Shape<N>;
  SharedArena arena;
  auto q = arena.take<float>(S::rows * S::stride);
  auto k = arena.take<float>(S::rows * S::stride);
  auto v = arena.take<float>(S::rows * columns);
  auto state = arena.take<float>(N * columns);
  auto weights = arena.take<float>(S::rows * S::weight_stride);
  const Decays decays{arena.take<float>(S::rows + 1), arena.take<float>(S::rows), arena.take<float>(S::rows),
                      arena.take<float>(S::rows),     arena.take<float>(S::rows), S::rows};

  const Place place(p);
  const int lane = lane_in_warp(), first_state = warp_in_block() * S::own_state;
  const int64_t state_at = (place.batch * p.heads + place.head) * p.dim * p.value_dim + place.column + lane;
  auto exists = [&](int i) { return first_state + i < p.dim && place.column + lane < p.value_dim; };
#pragma unroll
  for (int i = 0; i < S::own_state; ++i)
    state[(first_state + i) * columns + lane] =
        p.state != nullptr && exists(i) ? p.state[state_at + (first_state + i) * p.value_dim] : 0.f;

  const T* queries = place.at<const T>(p.q, p.q_stride, place.group);
  const T* keys = place.at<const T>(p.k, p.k_stride, place.group);
  const T* values = place.at<const T>(p.v, p.v_stride, place.head) + place.column;
  const float* gate = place.at<const float>(p.gate, p.gate_stride, place.head);
  const int64_t chunk_rows = p.causal ? S::rows : p.chunk;
  for (int64_t start = 0; start < p.length; start += chunk_rows) {
    const int64_t end = p.length - start < chunk_rows ? p.length : start + chunk_rows;
    float next[S::own_state] = {};
    double sum = 0;
    for (int64_t first = start; first < end; first += S::rows) {
      const int count = end - first < S::rows ? int(end - first) : S::rows;
      load_tile<S::rows, N, S::stride, vectors>(q, queries, p.q_stride.row, first, count, int(p.dim));
      load_tile<S::rows, N, S::stride, vectors>(k, keys, p.k_stride.row, first, count, int(p.dim));
      load_tile<S::rows, columns, columns, vectors>(v, values, p.v_stride.row, first, count,
                                                    int(p.value_dim) - place.column);
      if (warp_in_block() == 0) sum = decays.add(p, gate + first * p.gate_stride.row, place.head, count, sum);
      __syncthreads();
      if (p.causal) {
        weigh<N>(q, k, decays, weights);  // the rows that this warp multiplies next
        __syncwarp();
      }
      float out[S::own_rows];
      multiply<N>(out, q, v, state, weights, decays, p.causal);
      store<T, N>(out, p, place, first, count, v);
      accumulate<N>(next, k, v, decays);
      if (first + S::rows < end) __syncthreads();
    }
    const float log_decay = decays.total[S::rows];
    const float decay = expf(p.causal ? log_decay : log_decay / float(p.chunk));
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::own_state; ++i) {
      float& s = state[(first_state + i) * columns + lane];
      s = __fmaf_rn(s, decay, next[i]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < S::own_state; ++i)
    if (exists(i))
      p.new_state[state_at + (first_state + i) * p.value_dim] = state[(first_state + i) * columns + lane];
}

template <typename T>
bool all_aligned(const GatedScan& p) {
  auto fits = [](const void* pointer, const ScanStrides& s) {
    return chunk_aligned<T>(pointer, s.batch) && chunk_aligned<T>(pointer, s.head) &&
           chunk_aligned<T>(pointer, s.row);
  };
  return p.dim % chunk<T> == 0 && p.value_dim % chunk<T> == 0 && fits(p.q, p.q_stride) &&
         fits(p.k, p.k_stride) && fits(p.v, p.v_stride);
}

template <typename T, int N>
Status launch_scan(const GatedScan& p, void* stream) {
  using S = Shape<N>;
  const int64_t blocks = p.batch * p.heads * ceil_div(p.value_dim, columns);
  const size_t shared = 2 * shared_bytes<float>(S::rows * S::stride) +
                        shared_bytes<float>(S::rows * columns) + shared_bytes<float>(N * columns) +
                        shared_bytes<float>(S::rows * S::weight_stride) + shared_bytes<float>(S::rows + 1) +
                        4 * shared_bytes<float>(S::rows);
  if (all_aligned<T>(p))
    return ARIMG_LAUNCH((gated_scan_kernel<T, N, true>), blocks, threads, shared, stream, p);
  return ARIMG_LAUNCH((gated_scan_kernel<T, N, false>), blocks, threads, shared, stream, p);
}

}  // namespace

Status gated_scan_cuda(const GatedScan& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.dim <= 64) return launch_scan<T, 64>(p, stream);
    if (p.dim <= 128) return launch_scan<T, 128>(p, stream);
    return launch_scan<T, 256>(p, stream);
  });
}

}  // namespace arimg
