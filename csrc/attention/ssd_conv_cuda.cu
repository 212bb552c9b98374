// See ssd_conv_contract.h. A thread owns 16 bytes of channels and slides over eight rows with the last rows
// of x in registers. The blocks after the last rows of a batch entry copy its tail.
#include "attention/ssd_conv_contract.h"
#include "core/chunk.h"
#include "core/cuda.h"
#include "core/dtype.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 128;
constexpr int rows_per_thread = 8;

// Row `row` >= 1 - width of x and what came before it, or nullptr for zeros.
template <typename T>
__device__ __forceinline__ const T* input_row(const CausalConv& p, int64_t batch, int64_t row) {
  if (row >= 0) return static_cast<const T*>(p.x) + batch * p.batch_stride + row * p.row_stride;
  if (p.tail == nullptr) return nullptr;
  return static_cast<const T*>(p.tail) + (batch * (p.width - 1) + p.width - 1 + row) * p.channels;
}

template <bool vectors, typename T>
__device__ __forceinline__ void load_row(float (&to)[chunk<T>], const T* row, int channel, int count) {
#pragma unroll
  for (int j = 0; j < chunk<T>; ++j) to[j] = 0.f;
  if (row != nullptr) load_chunk<vectors>(to, row + channel, count);
}

template <bool vectors, typename T>
__device__ __forceinline__ void copy_tail(const CausalConv& p, int64_t batch, int channel, int count) {
  for (int i = 0; i + 1 < p.width; ++i) {
    float x[chunk<T>];
    load_row<vectors, T>(x, input_row<T>(p, batch, p.length + i + 1 - p.width), channel, count);
    T* to = static_cast<T*>(p.new_tail) + (batch * (p.width - 1) + i) * p.channels + channel;
    store_chunk<vectors>(to, x, count);
  }
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(threads) causal_conv1d_kernel(CausalConv p) {
  constexpr int most = kConvMaxWidth, own = chunk<T>;
  const int64_t slices = ceil_div(ceil_div(p.channels, own), threads);
  const int64_t parts = ceil_div(p.length, rows_per_thread) + 1, block = blockIdx.x;
  const int64_t batch = block / slices / parts, first = block / slices % parts * rows_per_thread;
  const int64_t channel = (block % slices * threads + threadIdx.x) * own;
  if (channel >= p.channels) return;
  const int c = int(channel), count = int(p.channels - channel);
  if (first >= p.length) {
    copy_tail<vectors, T>(p, batch, c, count);
    return;
  }
  // Taps and rows are aligned to the right: those before most - width are not used.
  float tap[most][own], window[most][own], bias[own];
  load_row<vectors, T>(bias, static_cast<const T*>(p.bias), c, count);
#pragma unroll
  for (int i = 0; i < most; ++i) {
    const int at = i - (most - p.width);
#pragma unroll
    for (int j = 0; j < own; ++j)
      tap[i][j] = at >= 0 && j < count
                      ? to_float(static_cast<const T*>(p.weight)[(channel + j) * p.width + at])
                      : 0.f;
    if (i + 1 < most && at >= 0)
      load_row<vectors, T>(window[i], input_row<T>(p, batch, first + i + 1 - most), c, count);
  }
  T* y = static_cast<T*>(p.y) + (batch * p.length + first) * p.channels + c;
  const int rows = p.length - first < rows_per_thread ? int(p.length - first) : rows_per_thread;
#pragma unroll 4
  for (int t = 0; t < rows; ++t) {
    load_row<vectors, T>(window[most - 1], input_row<T>(p, batch, first + t), c, count);
    float sum[own];
#pragma unroll
    for (int j = 0; j < own; ++j) {
      sum[j] = bias[j];
#pragma unroll
      for (int i = 0; i < most; ++i)
        if (i >= most - p.width) sum[j] = __fmaf_rn(tap[i][j], window[i][j], sum[j]);
      if (p.silu) sum[j] = sum[j] / (1.f + expf(-sum[j]));
    }
    store_chunk<vectors>(y + t * p.channels, sum, count);
#pragma unroll
    for (int i = 0; i + 1 < most; ++i)
#pragma unroll
      for (int j = 0; j < own; ++j) window[i][j] = window[i + 1][j];
  }
}

template <typename T>
Status launch_conv(const CausalConv& p, void* stream) {
  const int64_t slices = ceil_div(ceil_div(p.channels, chunk<T>), threads);
  const int64_t blocks = p.batch * (ceil_div(p.length, rows_per_thread) + 1) * slices;
  auto fits = chunk_aligned<T>;
  const bool aligned = fits(p.x, p.batch_stride) && fits(p.x, p.row_stride) && fits(p.bias, 0) &&
                       fits(p.tail, p.channels) && fits(p.y, p.channels) && fits(p.new_tail, p.channels);
  if (aligned) return ARIMG_LAUNCH((causal_conv1d_kernel<T, true>), blocks, threads, 0, stream, p);
  return ARIMG_LAUNCH((causal_conv1d_kernel<T, false>), blocks, threads, 0, stream, p);
}

}  // namespace

Status causal_conv1d_cuda(const CausalConv& p, void* stream) {
  if (p.channels > 0x7fffffff - 4096) return Status::unsupported;
  return with_dtype(p.dtype, [&](auto t) { return launch_conv<decltype(t)>(p, stream); });
}

}  // namespace arimg
