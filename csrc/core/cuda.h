// The ground every `.cu` file stands on: launches, shared memory, warp and block reductions.
//
// A `.cu` file is compiled by nvcc and, with ARIMG_EMULATOR, by the host compiler against tests/emulator/.
// To stay compilable by both it launches only through ARIMG_LAUNCH and takes shared memory only through
// SharedArena (no `__shared__`, no `<<<>>>`).
#pragma once

#if defined(ARIMG_EMULATOR)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

#include "core/error.h"
#include "core/status.h"

namespace arimg::cuda {

constexpr unsigned full_warp = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------
// Launch

// A grid in 64-bit sizes, so that a size too large for a GPU is refused instead of wrapped.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  Grid(dim3 d) : x(d.x), y(d.y), z(d.z) {}
  bool empty() const { return x == 0 || y == 0 || z == 0; }
  bool fits() const { return x > 0 && y > 0 && z > 0 && x <= 0x7fffffff && y <= 65535 && z <= 65535; }
  dim3 dim() const { return dim3(unsigned(x), unsigned(y), unsigned(z)); }
};

template <typename T>
struct Exactly {  // keeps a parameter out of template deduction
  using type = T;
};

constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Bytes of shared memory that `count` elements take in a SharedArena: the launch passes the sum.
template <typename T>
constexpr __host__ __device__ size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

// Launches on `stream` (a cudaStream_t). An empty grid is no error and does nothing. The kernel may be a
// template in parentheses: ARIMG_LAUNCH((scale<float, 4>), grid, 256, 0, stream, x, y, n).
#define ARIMG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::arimg::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#if defined(ARIMG_EMULATOR)

template <typename... P>
Status launch(const char* name, void (*kernel)(P...), Grid grid, dim3 block, size_t shared, void*,
              typename Exactly<P>::type... arguments) {
  if (grid.empty()) return Status::ok;
  if (!grid.fits()) return Status::unsupported;
  auto call = [&] { kernel(arguments...); };
  return emulator::run(
      name, grid.dim(), block, shared, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}

inline size_t max_shared_bytes() {
  return emulator::max_shared_bytes;
}
inline int multiprocessors() {
  return emulator::multiprocessors;
}

#else

inline Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok;
  error_text() = std::string(what) + ": " + cudaGetErrorString(error);
  return Status::cuda_error;
}

template <typename... P>
Status launch(const char* name, void (*kernel)(P...), Grid grid, dim3 block, size_t shared, void* stream,
              typename Exactly<P>::type... arguments) {
  if (grid.empty()) return Status::ok;
  if (!grid.fits()) return Status::unsupported;
  if (shared > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or it would be reported again by whoever asks next
      return check(error, name);
    }
  }
  // clang-format off
  kernel<<<grid.dim(), block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  return check(cudaGetLastError(), name);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// What the current device gives one block at most (99 KiB on the smallest supported ones).
inline size_t max_shared_bytes() {
  return size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

#endif

// ---------------------------------------------------------------------------------------------------------
// Shared memory

#if !defined(ARIMG_EMULATOR)

// A view of shared memory. On the device a pointer; in the emulator each access is checked.
template <typename T>
class Shared {
 public:
  Shared() = default;
  __device__ __forceinline__ Shared(T* data, int count) : data_(data), count_(count) {}
  __device__ __forceinline__ T& operator[](int i) const { return data_[i]; }
  // A vector that begins at element i, which must be aligned for it: tile.vec<float4>(4 * j).
  template <typename V>
  __device__ __forceinline__ V& vec(int i) const {
    return *reinterpret_cast<V*>(data_ + i);
  }
  __device__ __forceinline__ Shared part(int begin, int count) const { return Shared(data_ + begin, count); }
  __device__ __forceinline__ T* data() const { return data_; }  // accesses through it are not checked
  __device__ __forceinline__ int size() const { return count_; }

 private:
  T* data_ = nullptr;
  int count_ = 0;
};

// Hands out the launch's dynamic shared memory, each piece 16-byte aligned. One arena per kernel; all threads
// take the same pieces. Contents are undefined (poisoned in the emulator) until written.
class SharedArena {
 public:
  __device__ __forceinline__ SharedArena() {
    extern __shared__ __align__(128) unsigned char arimg_shared_memory[];
    next_ = arimg_shared_memory;
  }
  template <typename T>
  __device__ __forceinline__ Shared<T> take(int count) {
    T* data = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T>(size_t(count));
    return Shared<T>(data, count);
  }

 private:
  unsigned char* next_;
};

#endif

// ---------------------------------------------------------------------------------------------------------
// Reductions. Every lane or thread gets the result; the order of the additions is fixed, so a result depends
// on the block's shape alone.

__device__ __forceinline__ int thread_in_block() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ __forceinline__ int lane_in_warp() {
  return thread_in_block() % 32;
}
__device__ __forceinline__ int warp_in_block() {
  return thread_in_block() / 32;
}
__device__ __forceinline__ int warps_in_block() {
  return int(blockDim.x * blockDim.y * blockDim.z + 31) / 32;
}

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // as fmaxf: a NaN loses against a number
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// Over groups of `width` neighbouring lanes (a power of two); all lanes of the warp take part.
template <int width = 32, typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#if defined(ARIMG_EMULATOR)
  return emulator::butterfly<width>(value, op);  // the same sums in one collective
#else
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(full_warp, value, step));
  return value;
#endif
}
template <int width = 32, typename T>
__device__ __forceinline__ T warp_reduce_sum(T value) {
  return warp_reduce<width>(value, Sum{});
}
template <int width = 32, typename T>
__device__ __forceinline__ T warp_reduce_max(T value) {
  return warp_reduce<width>(value, Max{});
}
template <int width = 32, typename T>
__device__ __forceinline__ T warp_reduce_min(T value) {
  return warp_reduce<width>(value, Min{});
}

// All threads of a block of whole warps. `scratch` has a place per warp (32 are always enough) and may be
// used again at once. `empty` is the value that changes nothing.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T empty, Shared<T> scratch) {
  value = warp_reduce(value, op);
  if (lane_in_warp() == 0) scratch[warp_in_block()] = value;
  __syncthreads();
  value = lane_in_warp() < warps_in_block() ? scratch[lane_in_warp()] : empty;
  value = warp_reduce(value, op);
  __syncthreads();
  return value;
}
template <typename T>
__device__ __forceinline__ T block_reduce_sum(T value, Shared<T> scratch) {
  return block_reduce(value, Sum{}, T(0), scratch);
}
// `lowest`: what a block without any value would give, such as -INFINITY.
template <typename T>
__device__ __forceinline__ T block_reduce_max(T value, T lowest, Shared<T> scratch) {
  return block_reduce(value, Max{}, lowest, scratch);
}
template <typename T>
__device__ __forceinline__ T block_reduce_min(T value, T highest, Shared<T> scratch) {
  return block_reduce(value, Min{}, highest, scratch);
}

}  // namespace arimg::cuda
