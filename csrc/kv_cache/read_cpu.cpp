// See contract.h.
#include "core/simd.h"
#include "kv_cache/bytes.h"
#include "kv_cache/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

template <typename T>
static ARIMG_INLINE void decode_row(const uint8_t* from, float scale, Storage storage, T* to, int64_t dim) {
  const F32 factor(scale);
  for (int64_t d = 0; d < dim; d += W)
    store_lanes(decode(load_bytes(from + d, dim - d), storage) * factor, to + d, dim - d);
}

// Tokens [0, count) from a slot on, all in its page.
template <typename T>
static void read_run(const ReadCache& p, Slot slot, int64_t head, int64_t count, T* to) {
  const int64_t at = slot.page * p.part.page_stride + head * p.part.head_stride + slot.offset * p.dim;
  if (p.storage == Storage::same) {
    __builtin_memcpy(to, (const T*)p.part.data + at, count * p.dim * sizeof(T));
    return;
  }
  const uint8_t* from = (const uint8_t*)p.part.data + at;
  const float* scale = p.part.scale + (slot.page * p.kv_heads + head) * p.pages.size + slot.offset;
  for (int64_t t = 0; t < count; ++t)
    decode_row(from + t * p.dim, scale[t], p.storage, to + t * p.dim, p.dim);
}

template <typename T>
static void read_row(const ReadCache& p, int64_t row) {
  const int64_t batch = row / p.kv_heads, head = row % p.kv_heads, size = p.pages.size;
  T* to = (T*)p.out + row * p.tokens * p.dim;
  const int64_t end = p.start + p.tokens;
  int64_t filled = p.lengths ? p.lengths[batch] : end;
  if (filled > end) filled = end;
  if (size == 0) filled = 0;
  int64_t position = p.start, number = size ? position / size : 0, offset = position - number * size;
  for (; position < filled; ++number, offset = 0) {
    const int64_t page = find_page(p.pages, batch, number);
    const int64_t count = filled - position < size - offset ? filled - position : size - offset;
    if (page >= 0)
      read_run(p, Slot{page, offset}, head, count, to);
    else
      __builtin_memset((void*)to, 0, count * p.dim * sizeof(T));
    position += count;
    to += count * p.dim;
  }
  if (end > position) __builtin_memset((void*)to, 0, (end - position) * p.dim * sizeof(T));
}

void read_cache(const ReadCache& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) read_row<decltype(t)>(p, number);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
