// See activate.h.
#include "block/activate.h"

#include "block/activation.h"
#include "block/norm_row.h"

namespace arimg {
namespace ARIMG_SIMD {

template <typename T>
static void activate_elements(const Activate& p, int64_t begin, int64_t end) {
  const T *x = (const T*)p.x + begin, *factor = p.factor == nullptr ? nullptr : (const T*)p.factor + begin;
  T* out = (T*)p.out + begin;
  for_lanes(end - begin, [&](int64_t i, int n) {
    F32 y = activate(p.activation, load_lanes(x + i, n));
    if (factor != nullptr) y = y * load_lanes(factor + i, n);
    store_lanes(y, out + i, n);
  });
}

void activate(const Activate& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) { activate_elements<decltype(t)>(p, begin, end); });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
