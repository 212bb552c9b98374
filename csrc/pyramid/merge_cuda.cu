// See merge.h. A thread per 16 bytes of a row of the fine map: the pixels of N / 2 regions, which it reads
// from the coarse map and the mask as vectors of half and of an eighth or less of that.
#include "core/chunk.h"
#include "pyramid/merge.h"

namespace arimg {
namespace {

using cuda::chunk;

constexpr int THREADS = 256;

template <int N, typename T>
struct alignas(N * sizeof(T)) Vector {
  T of[N];
};

// Two rows of a piece of N pixels of the fine map: where they and their regions are.
struct Place {
  int64_t fine, coarse, mask;
};
template <int N>
__device__ __forceinline__ bool place_of(const Merge& p, Place& at) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, across = 2 * p.width / N;
  const int64_t item = i / across, x = i % across * N;  // item: a row of all planes of the coarse map
  if (item >= p.images * p.channels * p.height) return false;
  const int64_t image = item / (p.channels * p.height), y = item % p.height;
  at = {2 * item * 2 * p.width + x, item * p.width + x / 2, (image * p.height + y) * p.width + x / 2};
  return true;
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) merge_kernel(Merge p, const T* coarse, const T* fine, T* out) {
  Place at;
  if (!place_of<N>(p, at)) return;
  const auto is_fine = *reinterpret_cast<const Vector<N / 2, uint8_t>*>(p.is_fine + at.mask);
  const auto from = *reinterpret_cast<const Vector<N / 2, T>*>(coarse + at.coarse);
#pragma unroll
  for (int row = 0; row < 2; ++row, at.fine += 2 * p.width) {
    auto to = *reinterpret_cast<const Vector<N, T>*>(fine + at.fine);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (!is_fine.of[j / 2]) to.of[j] = from.of[j / 2];
    *reinterpret_cast<Vector<N, T>*>(out + at.fine) = to;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    merge_backward_kernel(Merge p, const T* grad, T* to_coarse, T* to_fine) {
  Place at;
  if (!place_of<N>(p, at)) return;
  const auto is_fine = *reinterpret_cast<const Vector<N / 2, uint8_t>*>(p.is_fine + at.mask);
  float sum[N / 2] = {};
#pragma unroll
  for (int row = 0; row < 2; ++row, at.fine += 2 * p.width) {
    auto to = *reinterpret_cast<const Vector<N, T>*>(grad + at.fine);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j / 2] += to_float(to.of[j]);
      if (!is_fine.of[j / 2]) to.of[j] = from_float<T>(0.f);
    }
    *reinterpret_cast<Vector<N, T>*>(to_fine + at.fine) = to;
  }
  Vector<N / 2, T> coarse;
#pragma unroll
  for (int j = 0; j < N / 2; ++j) coarse.of[j] = from_float<T>(is_fine.of[j] ? 0.f : sum[j]);
  *reinterpret_cast<Vector<N / 2, T>*>(to_coarse + at.coarse) = coarse;
}

// Whether pieces of N elements are whole and aligned in all maps.
template <typename T, int N>
bool whole(const Merge& p, const void* a, const void* b, const void* c) {
  auto bits = [](const void* x) { return reinterpret_cast<uintptr_t>(x); };
  return 2 * p.width % N == 0 && (bits(a) | bits(b) | bits(c)) % 16 == 0 && bits(p.is_fine) % 8 == 0;
}

int64_t blocks(const Merge& p, int piece) {
  return cuda::ceil_div(p.images * p.channels * p.height * (2 * p.width / piece), THREADS);
}

template <typename T>
Status merge(const Merge& p, const void* coarse, const void* fine, void* out, void* stream) {
  constexpr int N = chunk<T>;
  const T *from_coarse = static_cast<const T*>(coarse), *from_fine = static_cast<const T*>(fine);
  if (whole<T, N>(p, coarse, fine, out))
    return ARIMG_LAUNCH((merge_kernel<T, N>), blocks(p, N), THREADS, 0, stream, p, from_coarse, from_fine,
                        static_cast<T*>(out));
  return ARIMG_LAUNCH((merge_kernel<T, 2>), blocks(p, 2), THREADS, 0, stream, p, from_coarse, from_fine,
                      static_cast<T*>(out));
}

}  // namespace

Status merge_cuda(const Merge& p, const void* coarse, const void* fine, void* out, int64_t bytes,
                  void* stream) {
  if (bytes == 1) return merge<uint8_t>(p, coarse, fine, out, stream);
  if (bytes == 2) return merge<uint16_t>(p, coarse, fine, out, stream);
  if (bytes == 4) return merge<uint32_t>(p, coarse, fine, out, stream);
  return merge<uint64_t>(p, coarse, fine, out, stream);
}

Status merge_backward_cuda(const Merge& p, DType dtype, const void* grad, void* to_coarse, void* to_fine,
                           void* stream) {
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = chunk<T>;
    const T* from = static_cast<const T*>(grad);
    T *coarse = static_cast<T*>(to_coarse), *fine = static_cast<T*>(to_fine);
    if (whole<T, N>(p, grad, to_coarse, to_fine))
      return ARIMG_LAUNCH((merge_backward_kernel<T, N>), blocks(p, N), THREADS, 0, stream, p, from, coarse,
                          fine);
    return ARIMG_LAUNCH((merge_backward_kernel<T, 2>), blocks(p, 2), THREADS, 0, stream, p, from, coarse,
                        fine);
  });
}

}  // namespace arimg
