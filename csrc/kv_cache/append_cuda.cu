// See contract.h. A few neighbouring lanes take one head of one token: its q, k and v are in flight together.
#include "core/chunk.h"
#include "core/cuda.h"
#include "kv_cache/contract.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256;

// `width` lanes hold one row of `dim` elements, each lane `pieces` chunks of it.
template <typename T, int width, int pieces, bool vectors>
struct Row {
  float value[pieces][chunk<T>];

  static __device__ __forceinline__ int element(int piece) {
    return (piece * width + lane_in_warp() % width) * chunk<T>;
  }
  __device__ __forceinline__ void load(const T* from, int dim) {
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i), count = dim - d;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) value[i][j] = 0.f;
      if (count > 0) load_chunk<vectors>(value[i], from + d, count);
    }
  }
  __device__ __forceinline__ void store(T* to, int dim) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i), count = dim - d;
      if (count > 0) store_chunk<vectors>(to + d, value[i], count);
    }
  }
  __device__ __forceinline__ void scale_to(float length) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) squares = __fmaf_rn(value[i][j], value[i][j], squares);
    const float now = sqrtf(warp_reduce_sum<width>(squares));
    const float factor = length / (now < 1e-12f ? 1e-12f : now);  // a NaN stays
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) value[i][j] *= factor;
  }
};

template <typename T, int width, int pieces, bool vectors>
__global__ void __launch_bounds__(threads) append_qk_norm_kernel(AppendQkNorm p) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  const int64_t row = (int64_t(blockIdx.x) * threads + threadIdx.x) / width;
  const bool valid = row < rows;  // lanes without a row still take part in the sums
  const int64_t number = (valid ? row : 0) / p.heads, head = (valid ? row : 0) % p.heads;
  const int64_t batch = number / p.tokens, token = number % p.tokens;
  const int dim = int(p.dim);
  const T* from = static_cast<const T*>(p.qkv) + (number * 3 * p.heads + head) * p.dim;

  Row<T, width, pieces, vectors> q, k, v;
  q.load(from, dim);
  k.load(from + p.heads * p.dim, dim);
  v.load(from + 2 * p.heads * p.dim, dim);
  if (p.l2_norm) {
    q.scale_to(p.q_scale ? p.q_scale[head] : 1.f);
    k.scale_to(1.f);
  }
  if (!valid) return;
  const int64_t at = (p.start + token) * p.dim;
  q.store(static_cast<T*>(p.q) + ((batch * p.heads + head) * p.tokens + token) * p.dim, dim);
  k.store(static_cast<T*>(p.k_cache) + batch * p.k_batch_stride + head * p.k_head_stride + at, dim);
  v.store(static_cast<T*>(p.v_cache) + batch * p.v_batch_stride + head * p.v_head_stride + at, dim);
}

template <typename T, int width, int pieces>
Status launch_append(const AppendQkNorm& p, void* stream) {
  const int64_t blocks = ceil_div(p.batch * p.tokens * p.heads, threads / width);
  const bool vectors = p.dim % chunk<T> == 0 && chunk_aligned<T>(p.qkv, p.dim) &&
                       chunk_aligned<T>(p.q, p.dim) && chunk_aligned<T>(p.k_cache, p.k_batch_stride) &&
                       chunk_aligned<T>(p.v_cache, p.v_batch_stride) && p.k_head_stride % chunk<T> == 0 &&
                       p.v_head_stride % chunk<T> == 0;
  if (vectors)
    return ARIMG_LAUNCH((append_qk_norm_kernel<T, width, pieces, true>), blocks, threads, 0, stream, p);
  return ARIMG_LAUNCH((append_qk_norm_kernel<T, width, pieces, false>), blocks, threads, 0, stream, p);
}

}  // namespace

Status append_qk_norm_cuda(const AppendQkNorm& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t chunks = ceil_div(p.dim, chunk<T>);
    if (chunks <= 8) return launch_append<T, 8, 1>(p, stream);
    if (chunks <= 16) return launch_append<T, 16, 1>(p, stream);
    if (chunks <= 32) return launch_append<T, 32, 1>(p, stream);
    if (chunks <= 64) return launch_append<T, 32, 2>(p, stream);
    return Status::unsupported;
  });
}

}  // namespace arimg
