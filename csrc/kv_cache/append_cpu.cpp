// See contract.h.
#include "core/simd.h"
#include "kv_cache/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

template <typename T>
static ARIMG_INLINE F32 load_lanes(const T* p, int64_t n) {
  return n >= W ? F32::load(p) : F32::load_partial(p, int(n));
}

// What a head's vector is multiplied by so that its length becomes `scale`.
template <typename T>
static ARIMG_INLINE float factor(const T* x, int64_t dim, float scale) {
  F32 squares(0.f);
  for (int64_t d = 0; d < dim; d += W) {
    F32 v = load_lanes(x + d, dim - d);
    squares = mul_add(v, v, squares);
  }
  float length = __builtin_sqrtf(reduce_add(squares));
  return scale / (length < 1e-12f ? 1e-12f : length);  // a NaN stays
}

template <typename T>
static ARIMG_INLINE void scaled_copy(const T* from, T* to, int64_t dim, float by) {
  for (int64_t d = 0; d < dim; d += W) {
    F32 v = load_lanes(from + d, dim - d) * F32(by);
    if (dim - d >= W)
      v.store(to + d);
    else
      v.store_partial(to + d, int(dim - d));
  }
}

template <typename T>
static void append_token(const AppendQkNorm& p, int64_t number) {
  int64_t batch = number / p.tokens, token = number % p.tokens;
  const T* q = (const T*)p.qkv + number * 3 * p.heads * p.dim;
  const T* k = q + p.heads * p.dim;
  const T* v = k + p.heads * p.dim;
  for (int64_t h = 0; h < p.heads; ++h, q += p.dim, k += p.dim, v += p.dim) {
    T* q_row = (T*)p.q + ((batch * p.heads + h) * p.tokens + token) * p.dim;
    int64_t row = (p.start + token) * p.dim;
    T* k_row = (T*)p.k_cache + batch * p.k_batch_stride + h * p.k_head_stride + row;
    T* v_row = (T*)p.v_cache + batch * p.v_batch_stride + h * p.v_head_stride + row;
    if (p.l2_norm) {
      scaled_copy(q, q_row, p.dim, factor(q, p.dim, p.q_scale ? p.q_scale[h] : 1.f));
      scaled_copy(k, k_row, p.dim, factor(k, p.dim, 1.f));
    } else {
      __builtin_memcpy(q_row, q, p.dim * sizeof(T));
      __builtin_memcpy(k_row, k, p.dim * sizeof(T));
    }
    __builtin_memcpy(v_row, v, p.dim * sizeof(T));
  }
}

void append_qk_norm(const AppendQkNorm& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) append_token<decltype(t)>(p, number);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
