// One row of a norm on the GPU: the chunks of a thread and the statistics of the block's row. For `.cu`
// files.
#pragma once

#include "core/chunk.h"
#include "core/cuda.h"

namespace arimg::cuda {

// f(first element, elements in the row from there) for each chunk of this thread.
template <typename T, typename F>
__device__ __forceinline__ void for_chunks(int channels, F&& f) {
  for (int64_t i = int64_t(threadIdx.x) * chunk<T>; i < channels; i += int64_t(blockDim.x) * chunk<T>)
    f(int(i), channels - int(i));
}

// The normed row is (x - mean - correction) * inverse. An RMS norm has no mean.
struct Statistics {
  float mean, correction, inverse;
  __device__ __forceinline__ float normed(float x) const { return (x - mean - correction) * inverse; }
};

template <typename T, bool vectors>
__device__ __forceinline__ Statistics statistics_of(const T* x, int channels, bool rms, float eps,
                                                    Shared<float> scratch) {
  Statistics s{0.f, 0.f, 0.f};
  if (!rms) {
    float total = 0.f;
    for_chunks<T>(channels, [&](int i, int count) {
      float v[chunk<T>];
      load_chunk<vectors>(v, x + i, count);
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) total += v[j];
    });
    s.mean = block_reduce_sum(total, scratch) / float(channels);
  }
  // The second pass also sums the deviations themselves, which takes back the rounding of the first mean.
  float squares = 0.f, deviations = 0.f;
  for_chunks<T>(channels, [&](int i, int count) {
    float v[chunk<T>];
    load_chunk<vectors>(v, x + i, count, s.mean);
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) {
      const float d = v[j] - s.mean;
      squares = __fmaf_rn(d, d, squares);
      deviations += d;
    }
  });
  if (!rms) s.correction = block_reduce_sum(deviations, scratch) / float(channels);
  const float variance = block_reduce_sum(squares, scratch) / float(channels) - s.correction * s.correction;
  s.inverse = 1.f / sqrtf((variance > 0.f ? variance : 0.f) + eps);
  return s;
}

}  // namespace arimg::cuda
