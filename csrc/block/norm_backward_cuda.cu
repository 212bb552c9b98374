// See norm_backward.h. A block takes a part: its rows one after another, each thread the same chunks of 16
// bytes of all of them, so the sums of its channels stay its own, in shared memory.
#include "block/norm_backward.h"
#include "block/norm_row_cuda.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int max_threads = 256;

template <bool vectors, typename T>
__device__ __forceinline__ void load_optional(float (&to)[chunk<T>], const T* row, int i, int count) {
  if (row != nullptr) {
    load_chunk<vectors>(to, row + i, count);
    return;
  }
#pragma unroll
  for (int j = 0; j < chunk<T>; ++j) to[j] = 0.f;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const void* data, int64_t row, int64_t stride) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + row * stride;
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(max_threads) norm_backward_kernel(NormBackward p) {
  SharedArena arena;
  auto scratch = arena.take<float>(32);
  const int channels = int(p.channels);
  auto sums = arena.take<float>(NORM_SUMS * channels);
  const int64_t parts = parts_of(p), entry = blockIdx.x / parts;
  const int64_t first = blockIdx.x % parts * PART_ROWS;
  const int64_t last = first + PART_ROWS < p.rows_per_batch ? first + PART_ROWS : p.rows_per_batch;
  const T* scale = row_of<T>(p.scale, entry, p.scale_stride);
  const T* gate = row_of<T>(p.gate, entry, p.gate_stride);
  for_chunks<T>(channels, [&](int i, int count) {
    for (int k = 0; k < NORM_SUMS; ++k)
      for (int j = 0; j < chunk<T> && j < count; ++j) sums[k * channels + i + j] = 0.f;
  });
  for (int64_t row = entry * p.rows_per_batch + first; row < entry * p.rows_per_batch + last; ++row) {
    const T* x = row_of<T>(p.x, row, channels);
    const T* grad = row_of<T>(p.grad_out, row, channels);
    const T* residual = row_of<T>(p.grad_residual, row, channels);
    const T* y = row_of<T>(p.y, row, channels);
    Statistics s{0.f, 0.f, 0.f};
    float mean_d = 0.f, mean_dn = 0.f;
    if (grad != nullptr) {
      s = statistics_of<T, vectors>(x, channels, p.rms, p.eps, scratch);
      for_chunks<T>(channels, [&](int i, int count) {
        float v[chunk<T>], g[chunk<T>], a[chunk<T>];
        load_chunk<vectors>(v, x + i, count);
        load_chunk<vectors>(g, grad + i, count);
        load_chunk<vectors>(a, scale + i, count);
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) {
          if (!vectors && j >= count) break;
          const float d = g[j] * (a[j] + 1.f), normed = s.normed(v[j]);
          mean_d += d;
          mean_dn = __fmaf_rn(d, normed, mean_dn);
          sums[i + j] += g[j] * normed;
          sums[channels + i + j] += g[j];
        }
      });
      mean_d = p.rms ? 0.f : block_reduce_sum(mean_d, scratch) / float(channels);
      mean_dn = block_reduce_sum(mean_dn, scratch) / float(channels);
    }
    for_chunks<T>(channels, [&](int i, int count) {
      float out[chunk<T>], v[chunk<T>], g[chunk<T>], a[chunk<T>];
      load_optional<vectors>(out, residual, i, count);
      if (grad != nullptr) {
        load_chunk<vectors>(v, x + i, count);
        load_chunk<vectors>(g, grad + i, count);
        load_chunk<vectors>(a, scale + i, count);
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j)
          out[j] += (g[j] * (a[j] + 1.f) - mean_d - s.normed(v[j]) * mean_dn) * s.inverse;
      }
      store_chunk<vectors>(static_cast<T*>(p.grad_x) + row * channels + i, out, count);
      if (y == nullptr) return;
      load_chunk<vectors>(v, y + i, count);
      load_chunk<vectors>(a, gate + i, count);
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        if (!vectors && j >= count) break;
        sums[2 * channels + i + j] += out[j] * v[j];
        out[j] *= a[j];
      }
      store_chunk<vectors>(static_cast<T*>(p.grad_y) + row * channels + i, out, count);
    });
  }
  float* part = p.parts + int64_t(blockIdx.x) * NORM_SUMS * channels;
  for_chunks<T>(channels, [&](int i, int count) {
    for (int k = 0; k < NORM_SUMS; ++k)
      for (int j = 0; j < chunk<T> && j < count; ++j) part[k * channels + i + j] = sums[k * channels + i + j];
  });
}

// One thread per channel of a batch entry's sum; grid y: which sum.
template <typename T>
__global__ void norm_backward_sums_kernel(NormBackward p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, parts = parts_of(p);
  const int k = blockIdx.y;
  if (i >= p.batch * p.channels || p.sums[k] == nullptr) return;
  const int64_t entry = i / p.channels, channel = i % p.channels;
  float total = 0.f;
  for (int64_t part = 0; part < parts; ++part)
    total += p.parts[((entry * parts + part) * NORM_SUMS + k) * p.channels + channel];
  static_cast<T*>(p.sums[k])[i] = from_float<T>(total);
}

template <typename T>
Status launch(const NormBackward& p, void* stream) {
  auto fits = chunk_aligned<T>;
  const bool aligned = fits(p.x, p.channels) && fits(p.grad_out, 0) && fits(p.grad_residual, 0) &&
                       fits(p.y, 0) && fits(p.grad_x, 0) && fits(p.grad_y, 0) &&
                       fits(p.scale, p.scale_stride) && fits(p.gate, p.gate_stride);
  const int64_t warps = ceil_div(ceil_div(p.channels, chunk<T>), 32);
  const int threads = warps * 32 < max_threads ? int(warps) * 32 : max_threads;
  const size_t shared = shared_bytes<float>(32) + shared_bytes<float>(size_t(NORM_SUMS * p.channels));
  const int64_t blocks = p.batch * parts_of(p);
  Status status = aligned
                      ? ARIMG_LAUNCH((norm_backward_kernel<T, true>), blocks, threads, shared, stream, p)
                      : ARIMG_LAUNCH((norm_backward_kernel<T, false>), blocks, threads, shared, stream, p);
  if (status != Status::ok) return status;
  const Grid grid(ceil_div(p.batch * p.channels, 128), NORM_SUMS);
  return ARIMG_LAUNCH((norm_backward_sums_kernel<T>), grid, 128, 0, stream, p);
}

}  // namespace

Status norm_backward_cuda(const NormBackward& p, void* stream) {
  if (p.channels > NORM_BACKWARD_CHANNELS) return Status::unsupported;
  return with_dtype(p.dtype, [&](auto t) { return launch<decltype(t)>(p, stream); });
}

}  // namespace arimg
