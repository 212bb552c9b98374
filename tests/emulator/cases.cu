// Kernels that show what the emulator catches: each is right as it stands and wrong with `broken`.
// tests/test_emulator.py runs them; nvcc compiles them too, so they are kernels for a GPU.
#include "core/cuda.h"
#include "core/mma.h"

using namespace arimg;
using namespace arimg::cuda;

constexpr int threads = 128;

struct Arguments {
  const float* in;
  float* out;
  int n;
};

__device__ __forceinline__ int thread_in_grid() {
  return int(blockIdx.x * blockDim.x + threadIdx.x);
}

// Reverses each block's part of the row.
template <bool broken>
__global__ void barrier(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(threads);
  const int i = int(threadIdx.x);
  tile[i] = a.in[thread_in_grid()];
  if (!broken) __syncthreads();
  a.out[thread_in_grid()] = tile[threads - 1 - i];
}

// Sum of an element and its right neighbour in the block (0 beyond it).
template <bool broken>
__global__ void bounds(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(broken ? threads : threads + 1);
  const int i = int(threadIdx.x);
  tile[i] = a.in[thread_in_grid()];
  if (i == 0 && !broken) tile[threads] = 0;
  __syncthreads();
  a.out[thread_in_grid()] = tile[i] + tile[i + 1];
}

// A block sum, which some threads do not wait for.
template <bool broken>
__global__ void exited(Arguments a) {
  SharedArena arena;
  auto scratch = arena.take<float>(32);
  const int i = thread_in_grid();
  if (broken && i % threads >= threads - 32) return;
  a.out[i] = block_reduce_sum(a.in[i], scratch);
}

// Two barriers where there should be one.
template <bool broken>
__global__ void divergent(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(threads);
  const int i = int(threadIdx.x);
  tile[i] = a.in[thread_in_grid()];
  if (broken && i < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[thread_in_grid()] = tile[threads - 1 - i];
}

// Four floats per thread through cp.async.
template <bool broken>
__global__ void async_copy(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(2 * 4 * threads);
  const int i = int(threadIdx.x);
  const float* in = a.in + blockIdx.x * threads;
  cp_async16(&tile[4 * i], in + 4 * (i % 32));
  cp_async_commit();
  cp_async16(&tile[4 * (threads + i)], in, false);
  cp_async_commit();
  cp_async_wait<broken ? 1 : 0>();
  __syncthreads();
  a.out[thread_in_grid()] = tile[i] + tile[4 * threads + i];
}

// A copy that was waited for, but without the barrier that lets others see it.
template <bool broken>
__global__ void async_barrier(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(4 * threads);
  const int i = int(threadIdx.x);
  cp_async16(&tile[4 * i], a.in + blockIdx.x * threads + 4 * (i % 32));
  cp_async_commit();
  cp_async_wait<0>();
  if (!broken) __syncthreads();
  a.out[thread_in_grid()] = tile[i];
}

// A sum over half warps, of which one has gone when the mask says all.
template <bool broken>
__global__ void mask(Arguments a) {
  const int i = thread_in_grid();
  const int lane = i % 32;
  if (lane >= 16) {
    a.out[i] = a.in[i];
    return;
  }
  float value = a.in[i];
  for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(broken ? full_warp : 0xffffu, value, step);
  a.out[i] = value;
}

// Lanes of one warp in two different shuffles.
template <bool broken>
__global__ void call_site(Arguments a) {
  const int i = thread_in_grid();
  float value = a.in[i];
  if (broken && i % 2 == 0) {
    value = __shfl_sync(full_warp, value, 0);
  } else {
    value = __shfl_sync(full_warp, value, 0);
  }
  a.out[i] = value;
}

// Neighbours within a warp exchange through shared memory.
template <bool broken>
__global__ void warp_order(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(threads);
  const int i = int(threadIdx.x);
  tile[i] = a.in[thread_in_grid()];
  if (!broken) __syncwarp();
  a.out[thread_in_grid()] = tile[i ^ 1];
}

// All lanes of a warp meet before the barrier; in the broken twin lane 5 is already there.
template <bool broken>
__global__ void stuck(Arguments a) {
  const int i = thread_in_grid();
  float value = a.in[i];
  if (!broken || i % 32 != 5) value = warp_reduce_sum(value);
  __syncthreads();
  a.out[i] = value;
}

// A vector load of shared memory at an address that a GPU would refuse.
template <bool broken>
__global__ void alignment(Arguments a) {
  SharedArena arena;
  auto tile = arena.take<float>(4 * threads + 4);
  const int i = int(threadIdx.x);
  float4 zero = make_float4(0, 0, 0, 0);
  tile.template vec<float4>(4 * i + (broken ? 2 : 0)) = zero;
  a.out[thread_in_grid()] = tile[4 * i + 3];
}

// Reads shared memory that nobody wrote (a GPU gives whatever was there).
template <bool broken>
__global__ void unwritten(Arguments a) {
  SharedArena arena;
  auto sum = arena.take<float>(1);
  if (threadIdx.x == 0 && !broken) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], a.in[thread_in_grid()]);
  __syncthreads();
  a.out[thread_in_grid()] = sum[0];
}

// Reads a counter that others still update.
template <bool broken>
__global__ void counter(Arguments a) {
  SharedArena arena;
  auto sum = arena.take<float>(1);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], a.in[thread_in_grid()]);
  if (!broken) __syncthreads();
  a.out[thread_in_grid()] = sum[0];
}

// Reads one row of the input beyond its end.
template <bool broken>
__global__ void global_bounds(Arguments a) {
  const int i = thread_in_grid();
  a.out[i] = a.in[broken ? i + threads : i];
}

// C[16,8] = A[16,16 k] B[16 k,8] by one warp, everything through shared memory; A and B of 16-bit values.
template <typename T>
__global__ void multiply16(const T* a, const T* b, float* c, int k) {
  SharedArena arena;
  auto tile_a = arena.take<T>(16 * 16);
  auto tile_b = arena.take<T>(16 * 16);
  const int lane = int(threadIdx.x);
  float d[4] = {};
  for (int step = 0; step < k; ++step) {
    cp_async16(&tile_a[8 * lane], a + (lane / 2 * k + step) * 16 + lane % 2 * 8);
    cp_async16(&tile_b[8 * lane], b + (step * 16 + lane % 16) * 8, lane < 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, &tile_a[lane % 16 * 16 + lane / 16 * 8]);
    ldmatrix_x4_trans(fb, &tile_b[lane * 8]);
    const uint32_t first[2] = {fb[0], fb[1]};
    mma_m16n8k16<T>(d, fa, first);
    __syncwarp();
  }
  const int row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}

// The same product from fp32 values rounded to tf32.
__global__ void multiply_tf32(const float* a, const float* b, float* c, int k) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  float d[4] = {};
  for (int step = 0; step < 2 * k; ++step) {
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(a[(g + i % 2 * 8) * 16 * k + step * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(step * 8 + t + i * 4) * 8 + g]);
    mma_m16n8k8_tf32(d, fa, fb);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

#define CASE(name, shared)                                                                                   \
  extern "C" __attribute__((visibility("default"))) int case_##name(int broken, const float* in, float* out, \
                                                                    int n) {                                 \
    const Arguments a{in, out, n};                                                                           \
    return int(broken ? ARIMG_LAUNCH((name<true>), n / threads, threads, shared, nullptr, a)                 \
                      : ARIMG_LAUNCH((name<false>), n / threads, threads, shared, nullptr, a));              \
  }

CASE(barrier, shared_bytes<float>(threads))
CASE(bounds, shared_bytes<float>(threads + 1))
CASE(exited, shared_bytes<float>(32))
CASE(divergent, shared_bytes<float>(threads))
CASE(async_copy, shared_bytes<float>(8 * threads))
CASE(async_barrier, shared_bytes<float>(4 * threads))
CASE(mask, 0)
CASE(call_site, 0)
CASE(warp_order, shared_bytes<float>(threads))
CASE(stuck, 0)
CASE(alignment, shared_bytes<float>(4 * threads + 4))
CASE(unwritten, shared_bytes<float>(1))
CASE(counter, shared_bytes<float>(1))
CASE(global_bounds, 0)

// The right kernel with too little shared memory.
extern "C" __attribute__((visibility("default"))) int case_shared_size(int broken, const float* in,
                                                                       float* out, int n) {
  const Arguments a{in, out, n};
  return int(ARIMG_LAUNCH((barrier<false>), n / threads, threads, broken ? 16 : shared_bytes<float>(threads),
                          nullptr, a));
}

// dtype: 0 bfloat16, 1 half, 2 tf32 (a and b are floats).
extern "C" __attribute__((visibility("default"))) int multiply(int dtype, const void* a, const void* b,
                                                               float* c, int k) {
  const size_t shared = 2 * shared_bytes<Half>(256);
  if (dtype == 0)
    return int(ARIMG_LAUNCH((multiply16<BFloat16>), 1, 32, shared, nullptr, static_cast<const BFloat16*>(a),
                            static_cast<const BFloat16*>(b), c, k));
  if (dtype == 1)
    return int(ARIMG_LAUNCH((multiply16<Half>), 1, 32, shared, nullptr, static_cast<const Half*>(a),
                            static_cast<const Half*>(b), c, k));
  return int(ARIMG_LAUNCH(multiply_tf32, 1, 32, 0, nullptr, static_cast<const float*>(a),
                          static_cast<const float*>(b), c, k));
}
