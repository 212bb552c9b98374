// See fsq.h. A block takes whole rows as one run of elements, 16 bytes per thread at a time; digits go
// through shared memory to the thread that makes the row's index.
#include "quantize/fsq.h"

#include "core/chunk.h"
#include "core/cuda.h"
#include "quantize/fsq_math.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int THREADS = 256;

// A multiple of 8, so that a block's first element is aligned like the tensor; at most 4096 elements.
constexpr __host__ __device__ int block_rows(int dims) {
  return dims <= 16 ? 256 : 64;
}

// One constant of each dimension, for threads that read different ones.
__device__ __forceinline__ Shared<float> copy_constant(SharedArena& arena, const float* from, int dims) {
  Shared<float> to = arena.take<float>(fsq_max_dims);
  if (int(threadIdx.x) < dims) to[threadIdx.x] = from[threadIdx.x];
  return to;
}

// f(first element, its dimension, elements left) for each chunk of this thread in `count` elements.
template <typename T, typename F>
__device__ __forceinline__ void for_chunks(int count, int dims, F&& f) {
  for (int i = threadIdx.x * chunk<T>; i < count; i += THREADS * chunk<T>) f(i, i % dims, count - i);
}

__device__ __forceinline__ int following(int dimension, int dims) {
  return dimension + 1 == dims ? 0 : dimension + 1;
}

template <bool vectors, typename T>
__device__ __forceinline__ void load_some(float (&to)[chunk<T>], const T* from, int left) {
  if (vectors && left >= chunk<T>)
    load_chunk<true>(to, from, left);
  else
    load_chunk<false>(to, from, left);
}
template <bool vectors, typename T>
__device__ __forceinline__ void store_some(T* to, const float (&from)[chunk<T>], int left) {
  if (vectors && left >= chunk<T>)
    store_chunk<true>(to, from, left);
  else
    store_chunk<false>(to, from, left);
}

__device__ __forceinline__ int rows_of_block(int64_t rows, int dims) {
  const int64_t left = rows - int64_t(blockIdx.x) * block_rows(dims);
  return int(left < block_rows(dims) ? left : block_rows(dims));
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) fsq_kernel(Fsq p) {
  SharedArena arena;
  const int d = p.levels.dims;
  auto shift = copy_constant(arena, p.levels.shift, d), half = copy_constant(arena, p.levels.half, d);
  auto lower = copy_constant(arena, p.levels.lower, d), width = copy_constant(arena, p.levels.width, d);
  auto inverse = copy_constant(arena, p.levels.inverse, d);
  auto digits = arena.take<float>(block_rows(d) * d);
  __syncthreads();
  const int64_t first_row = int64_t(blockIdx.x) * block_rows(d);
  const int rows = rows_of_block(p.rows, d);
  const T* z = static_cast<const T*>(p.z) + first_row * d;
  T* codes = static_cast<T*>(p.codes) + first_row * d;
  for_chunks<T>(rows * d, d, [&](int i, int c, int left) {
    float v[chunk<T>];
    load_some<vectors>(v, z + i, left);
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      auto q = fsq_quantize(v[j], shift[c], half[c], lower[c], width[c], inverse[c]);
      v[j] = q.code;
      if (j < left) digits[i + j] = q.digit;
      c = following(c, d);
    }
    store_some<vectors>(codes + i, v, left);
  });
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    int64_t index = 0;
    for (int c = 0; c < d; ++c) index += int64_t(digits[row * d + c]) * p.levels.basis[c];
    p.index[first_row + row] = index;
  }
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) fsq_backward_kernel(FsqBackward p) {
  SharedArena arena;
  const int d = p.levels.dims;
  auto shift = copy_constant(arena, p.levels.shift, d), slope = copy_constant(arena, p.levels.slope, d);
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * block_rows(d) * d;
  const T* grad = static_cast<const T*>(p.grad) + first;
  const T* z = static_cast<const T*>(p.z) + first;
  T* out = static_cast<T*>(p.grad_z) + first;
  for_chunks<T>(rows_of_block(p.rows, d) * d, d, [&](int i, int c, int left) {
    float g[chunk<T>], v[chunk<T>];
    load_some<vectors>(g, grad + i, left);
    load_some<vectors>(v, z + i, left);
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      v[j] = fsq_gradient(g[j], v[j], shift[c], slope[c]);
      c = following(c, d);
    }
    store_some<vectors>(out + i, v, left);
  });
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) fsq_codes_kernel(FsqCodes p) {
  SharedArena arena;
  const int d = p.levels.dims;
  auto values = arena.take<float>(block_rows(d) * d);
  const int64_t first_row = int64_t(blockIdx.x) * block_rows(d);
  const int rows = rows_of_block(p.rows, d);
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    uint64_t rest = wrapped_index(p.index[first_row + row], p.levels.count);
    for (int c = 0; c < d; ++c) {
      float width = p.levels.width[c];
      float k = float(take_digit(rest, p.levels.level[c], p.levels.reciprocal[c])) - width;
      values[row * d + c] = level_value(k, width, p.levels.inverse[c]);
    }
  }
  __syncthreads();
  T* codes = static_cast<T*>(p.codes) + first_row * d;
  for_chunks<T>(rows * d, d, [&](int i, int, int left) {
    float v[chunk<T>];
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) v[j] = j < left ? values[i + j] : 0.f;
    store_some<vectors>(codes + i, v, left);
  });
}

}  // namespace

#define ARIMG_FSQ_LAUNCH(kernel, aligned, shared)                                            \
  with_dtype(p.dtype, [&](auto t) {                                                          \
    using T = decltype(t);                                                                   \
    const int64_t blocks = ceil_div(p.rows, block_rows(p.levels.dims));                      \
    if (aligned) return ARIMG_LAUNCH((kernel<T, true>), blocks, THREADS, shared, stream, p); \
    return ARIMG_LAUNCH((kernel<T, false>), blocks, THREADS, shared, stream, p);             \
  })

Status fsq_cuda(const Fsq& p, void* stream) {
  const size_t shared = 5 * shared_bytes<float>(fsq_max_dims) +
                        shared_bytes<float>(size_t(block_rows(p.levels.dims)) * p.levels.dims);
  return ARIMG_FSQ_LAUNCH(fsq_kernel, (chunk_aligned<T>(p.z, 0) && chunk_aligned<T>(p.codes, 0)), shared);
}

Status fsq_backward_cuda(const FsqBackward& p, void* stream) {
  const size_t shared = 2 * shared_bytes<float>(fsq_max_dims);
  return ARIMG_FSQ_LAUNCH(
      fsq_backward_kernel,
      (chunk_aligned<T>(p.grad, 0) && chunk_aligned<T>(p.z, 0) && chunk_aligned<T>(p.grad_z, 0)), shared);
}

Status fsq_codes_cuda(const FsqCodes& p, void* stream) {
  const size_t shared = shared_bytes<float>(size_t(block_rows(p.levels.dims)) * p.levels.dims);
  return ARIMG_FSQ_LAUNCH(fsq_codes_kernel, (chunk_aligned<T>(p.codes, 0)), shared);
}

}  // namespace arimg
