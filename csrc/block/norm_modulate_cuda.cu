// See contract.h. One block per row; the row comes from memory once and from the cache for the later passes.
//
// A thread owns chunks of 16 bytes. Rows that are not 16-byte aligned are read element by element, but by the
// same threads in the same order: the result does not depend on where the tensors lie.
#include "block/contract.h"
#include "block/norm_row_cuda.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int max_threads = 256;

// x + gate * y, stored, and read back by the thread that stored it: the statistics are those of the rounded
// sum, so that the fused and the separate operations agree. Gives the row that holds the sum.
template <typename T, bool vectors>
__device__ __forceinline__ const T* add_residual(const NormModulate& p, int64_t row, int64_t entry) {
  const int channels = int(p.channels);
  const T* x = static_cast<const T*>(p.x) + row * channels;
  if (p.y == nullptr) return x;
  const T* y = static_cast<const T*>(p.y) + row * channels;
  const T* gate = static_cast<const T*>(p.gate) + entry * p.gate_stride;
  T* sum = static_cast<T*>(p.residual) + row * channels;
  for_chunks<T>(channels, [&](int i, int count) {
    float a[chunk<T>], b[chunk<T>], g[chunk<T>];
    load_chunk<vectors>(a, x + i, count);
    load_chunk<vectors>(b, y + i, count);
    load_chunk<vectors>(g, gate + i, count);
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) a[j] = __fmaf_rn(g[j], b[j], a[j]);
    store_chunk<vectors>(sum + i, a, count);
  });
  return sum;
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(max_threads) norm_modulate_kernel(NormModulate p) {
  SharedArena arena;
  auto scratch = arena.take<float>(32);
  const int64_t row = blockIdx.x;
  const int64_t entry = row / p.rows_per_batch;
  const int channels = int(p.channels);
  const T* x = add_residual<T, vectors>(p, row, entry);
  if (p.scale == nullptr) return;

  const Statistics statistics = statistics_of<T, vectors>(x, channels, p.rms, p.eps, scratch);
  const T* scale = static_cast<const T*>(p.scale) + entry * p.scale_stride;
  const T* shift = static_cast<const T*>(p.shift) + entry * p.shift_stride;
  T* out = static_cast<T*>(p.out) + row * channels;
  for_chunks<T>(channels, [&](int i, int count) {
    float v[chunk<T>], a[chunk<T>], b[chunk<T>];
    load_chunk<vectors>(v, x + i, count);
    load_chunk<vectors>(a, scale + i, count);
    load_chunk<vectors>(b, shift + i, count);
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) v[j] = __fmaf_rn(statistics.normed(v[j]), a[j] + 1.f, b[j]);
    store_chunk<vectors>(out + i, v, count);
  });
}

template <typename T>
bool all_aligned(const NormModulate& p) {
  auto fits = chunk_aligned<T>;
  return fits(p.x, p.channels) && fits(p.y, 0) && fits(p.residual, 0) && fits(p.out, 0) &&
         fits(p.gate, p.gate_stride) && fits(p.scale, p.scale_stride) && fits(p.shift, p.shift_stride);
}

template <typename T>
Status launch_norm_modulate(const NormModulate& p, void* stream) {
  const int64_t warps = ceil_div(ceil_div(p.channels, chunk<T>), 32);
  const int threads = warps * 32 < max_threads ? int(warps) * 32 : max_threads;
  const size_t shared = shared_bytes<float>(32);
  if (all_aligned<T>(p))
    return ARIMG_LAUNCH((norm_modulate_kernel<T, true>), p.rows, threads, shared, stream, p);
  return ARIMG_LAUNCH((norm_modulate_kernel<T, false>), p.rows, threads, shared, stream, p);
}

}  // namespace

Status norm_modulate_cuda(const NormModulate& p, void* stream) {
  if (p.rows == 0 || p.channels == 0) return Status::ok;
  if (p.channels > 0x7fffffff - 8) return Status::unsupported;
  return with_dtype(p.dtype, [&](auto t) { return launch_norm_modulate<decltype(t)>(p, stream); });
}

}  // namespace arimg
