// See contract.h. A thread takes 16 bytes of the result.
#include "core/chunk.h"
#include "core/cuda.h"
#include "kv_cache/contract.h"
#include "kv_cache/load_codes.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256;

template <typename T, bool vectors>
__global__ void __launch_bounds__(threads) read_cache_kernel(ReadCache p) {
  const int chunks = int((p.dim + chunk<T> - 1) / chunk<T>), dim = int(p.dim);
  const int64_t all = p.batch * p.kv_heads * p.tokens;
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int64_t vector = number / chunks;
  if (vector >= all) return;
  const int d = int(number % chunks) * chunk<T>, count = dim - d;
  const int64_t position = p.start + vector % p.tokens, row = vector / p.tokens;
  const int64_t batch = row / p.kv_heads, head = row % p.kv_heads;
  const bool filled = !p.lengths || position < p.lengths[batch];
  const Slot slot = filled ? find_slot(p.pages, batch, position) : Slot{-1, 0};

  float value[chunk<T>] = {};
  if (slot.page >= 0) {
    const int64_t at = slot.page * p.part.page_stride + head * p.part.head_stride + slot.offset * dim + d;
    if (p.storage == Storage::same) {
      load_chunk<vectors>(value, static_cast<const T*>(p.part.data) + at, count);
    } else {
      const float scale = p.part.scale[(slot.page * p.kv_heads + head) * p.pages.size + slot.offset];
      load_codes<T, vectors>(value, static_cast<const uint8_t*>(p.part.data) + at, count, scale, p.storage);
    }
  }
  store_chunk<vectors>(static_cast<T*>(p.out) + vector * dim + d, value, count);
}

}  // namespace

Status read_cache_cuda(const ReadCache& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = ceil_div(p.batch * p.kv_heads * p.tokens * ceil_div(p.dim, chunk<T>), threads);
    const size_t bytes = p.storage == Storage::same ? 16 : chunk<T>;
    const bool vectors = p.dim % chunk<T> == 0 && chunk_aligned<T>(p.out, p.dim) &&
                         reinterpret_cast<uintptr_t>(p.part.data) % bytes == 0 &&
                         p.part.page_stride % chunk<T> == 0 && p.part.head_stride % chunk<T> == 0;
    if (vectors) return ARIMG_LAUNCH((read_cache_kernel<T, true>), blocks, threads, 0, stream, p);
    return ARIMG_LAUNCH((read_cache_kernel<T, false>), blocks, threads, 0, stream, p);
  });
}

}  // namespace arimg
