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
static void read_row(const ReadCache& p, int64_t number) {
  const int64_t batch = number / p.kv_heads, head = number % p.kv_heads;
  T* to = (T*)p.out + number * p.tokens * p.dim;
  const int64_t end = p.start + p.tokens;
  int64_t filled = p.lengths ? p.lengths[batch] : end;
  if (filled > end) filled = end;
  int64_t position = p.start;
  while (position < end) {
    const int64_t left_in_page = p.pages.size - position % p.pages.size;
    int64_t count = (position < filled ? filled : end) - position;
    if (position < filled && count > left_in_page) count = left_in_page;
    const Slot slot = position < filled ? find_slot(p.pages, batch, position) : Slot{-1, 0};
    if (slot.page >= 0)
      read_run(p, slot, head, count, to);
    else
      __builtin_memset((void*)to, 0, count * p.dim * sizeof(T));
    position += count;
    to += count * p.dim;
  }
}

void read_cache(const ReadCache& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) read_row<decltype(t)>(p, number);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
