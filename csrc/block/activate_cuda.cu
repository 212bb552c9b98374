// See activate.h. A thread takes 16 bytes.
#include "block/activate.h"
#include "block/activation_cuda.h"
#include "core/chunk.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int THREADS = 256;

template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) activate_kernel(Activate p) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * chunk<T>;
  if (i >= p.count) return;
  const int count = p.count - i < chunk<T> ? int(p.count - i) : chunk<T>;
  float x[chunk<T>], factor[chunk<T>];
  load_chunk<vectors>(x, static_cast<const T*>(p.x) + i, count);
  if (p.factor != nullptr) load_chunk<vectors>(factor, static_cast<const T*>(p.factor) + i, count);
#pragma unroll
  for (int j = 0; j < chunk<T>; ++j) {
    x[j] = activate(p.activation, x[j]);
    if (p.factor != nullptr) x[j] *= factor[j];
  }
  store_chunk<vectors>(static_cast<T*>(p.out) + i, x, count);
}

template <typename T>
Status launch(const Activate& p, void* stream) {
  const bool aligned = chunk_aligned<T>(p.x, p.count) && chunk_aligned<T>(p.factor, p.count) &&
                       chunk_aligned<T>(p.out, p.count);
  const int64_t blocks = ceil_div(p.count, THREADS * chunk<T>);
  return aligned ? ARIMG_LAUNCH((activate_kernel<T, true>), blocks, THREADS, 0, stream, p)
                 : ARIMG_LAUNCH((activate_kernel<T, false>), blocks, THREADS, 0, stream, p);
}

}  // namespace

Status activate_cuda(const Activate& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) { return launch<decltype(t)>(p, stream); });
}

}  // namespace arimg
