// See contract.h. A head's vector passes through an array of vectors; where their number n is known to the
// compiler (whole vectors, few of them) that is registers, else (n = 0) memory that stays in the L1 cache.
#include "core/simd.h"
#include "kv_cache/bytes.h"
#include "kv_cache/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

// Vectors are written whole, and the second half of a rotation by halves is read behind the end.
constexpr int64_t room = kMaxHeadDim + kMaxHeadDim / 2 + W;

template <int n>
struct Vector {
  static constexpr int size = n ? n : room / W;
  F32 at[size];
};

template <int n>
static ARIMG_INLINE int count(const Append& p) {
  return n ? n : int((p.dim + W - 1) / W);
}

// What a token's rotation multiplies each channel and its partner with.
struct Rotation {
  alignas(64) float own[room], partner[room];
};

static ARIMG_INLINE void expand(const Append& p, int64_t index, Rotation& r) {
  const int64_t half = p.dim / 2;
  const bool known = index >= 0 && index < p.table_rows;
  const float* cos = p.cos + (known ? index * half : 0);
  const float* sin = p.sin + (known ? index * half : 0);
  const int64_t step = p.interleaved ? 2 : 1, second = p.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float c = known ? cos[i] : __builtin_nanf(""), s = known ? sin[i] : c;
    r.own[step * i] = r.own[step * i + second] = c;
    r.partner[step * i] = -s;
    r.partner[step * i + second] = s;
  }
  for (int64_t d = p.dim; d < p.dim + W; ++d) r.own[d] = r.partner[d] = 0.f;
}

// Lanes 1, 0, 3, 2, ...
static ARIMG_INLINE F32 swap_pairs(F32 x) {
#if ARIMG_WIDTH == 16
  return __builtin_shufflevector(x.v, x.v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif ARIMG_WIDTH == 8
  return __builtin_shufflevector(x.v, x.v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x.v, x.v, 1, 0, 3, 2);
#endif
}

template <int n, typename T>
static ARIMG_INLINE F32 load_part(const Append& p, const T* x, int i) {
  return n ? F32::load(x + i * W) : load_lanes(x + i * W, p.dim - i * W);
}

// What the norm multiplies a vector with, given the sum of its squares.
static ARIMG_INLINE float norm_factor(const Append& p, float squares, float scale) {
  if (p.norm == Norm::rms) return 1.f / __builtin_sqrtf(squares / float(p.dim) + p.eps);
  const float length = __builtin_sqrtf(squares);
  return scale / (length < 1e-12f ? 1e-12f : length);  // a NaN stays
}

// y = norm(x)
template <int n, typename T>
static ARIMG_INLINE void normalise(const Append& p, const T* x, Vector<n>& y, float scale,
                                   const float* weight) {
  F32 squares(0.f);
  for (int i = 0; i < count<n>(p); ++i) {
    y.at[i] = load_part<n>(p, x, i);
    squares = mul_add(y.at[i], y.at[i], squares);
  }
  if (p.norm == Norm::none) return;
  const F32 factor(norm_factor(p, reduce_add(squares), scale));
  for (int i = 0; i < count<n>(p); ++i) y.at[i] = y.at[i] * factor;
  if (weight)
    for (int i = 0; i < count<n>(p); ++i) y.at[i] = y.at[i] * load_part<n>(p, weight, i);
}

template <int n>
static ARIMG_INLINE void rotate(const Append& p, const Rotation& r, Vector<n>& y) {
  if constexpr (n % 2 == 0 && n > 0) {
    Vector<n> x = y;
    for (int i = 0; i < n; ++i) {
      const F32 partner = p.interleaved ? swap_pairs(x.at[i]) : x.at[(i + n / 2) % n];
      y.at[i] = mul_add(x.at[i], F32::load(r.own + i * W), partner * F32::load(r.partner + i * W));
    }
  } else {
    // by halves the partner of a later channel is the copy behind the end, so y may be overwritten
    const int64_t half = p.dim / 2;
    float* x = (float*)y.at;
    if (!p.interleaved) __builtin_memmove(x + p.dim, x, half * sizeof(float));
    for (int64_t d = 0; d < p.dim; d += W) {
      const F32 own = F32::load(x + d);
      const F32 partner = p.interleaved ? swap_pairs(own) : F32::load(x + d + half);
      mul_add(own, F32::load(r.own + d), partner * F32::load(r.partner + d)).store(x + d);
    }
  }
}

template <int n, typename T>
static ARIMG_INLINE void store(const Append& p, const Vector<n>& y, T* to) {
  for (int i = 0; i < count<n>(p); ++i) {
    if (n)
      y.at[i].store(to + i * W);
    else
      store_lanes(y.at[i], to + i * W, p.dim - i * W);
  }
}

// Codes and the factor of y, which is zero behind the end.
template <int n>
static ARIMG_INLINE void store_codes(const Append& p, const Vector<n>& y, uint8_t* to, float* scale) {
  I32 most(int32_t(float_bits(kSmallestAmax)));
  for (int i = 0; i < count<n>(p); ++i) {
    I32 magnitude = bits(y.at[i]) & I32(0x7fffffff);
    most = select(magnitude > most, magnitude, most);  // as numbers, and NaN above all
  }
  int32_t largest = most[0];
  for (int i = 1; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  const float amax = bits_float(uint32_t(largest)), limit = code_limit(p.storage);
  *scale = amax / limit;
  const F32 inverse(limit / amax);
  if (p.storage == Storage::int8) {
    for (int i = 0; i < count<n>(p); ++i)
      store_bytes(encode(y.at[i], inverse, Storage::int8), to + i * W, n ? W : p.dim - i * W);
  } else {
    for (int i = 0; i < count<n>(p); ++i)
      store_bytes(encode(y.at[i], inverse, Storage::fp8), to + i * W, n ? W : p.dim - i * W);
  }
}

template <int n, typename T>
static ARIMG_INLINE void write(const Append& p, const CachePart& part, Slot slot, int64_t head,
                               const Vector<n>& y) {
  const int64_t at = slot.page * part.page_stride + head * part.head_stride + slot.offset * p.dim;
  if (p.storage == Storage::same) return store(p, y, (T*)part.data + at);
  const int64_t scale = (slot.page * p.kv_heads + head) * p.pages.size + slot.offset;
  store_codes(p, y, (uint8_t*)part.data + at, part.scale + scale);
}

template <int n, typename T>
static void append_token(const Append& p, int64_t number, Rotation& rotation) {
  const int64_t batch = number / p.tokens, token = number % p.tokens;
  const Slot slot = find_slot(p.pages, batch, append_position(p, batch, token));
  const T* x = (const T*)p.qkv + number * (p.q_heads + 2 * p.kv_heads) * p.dim;
  const bool l2 = p.norm == Norm::l2;
  Vector<n> y;
  if (p.cos) expand(p, append_rope_index(p, batch, token), rotation);
  for (int64_t h = 0; h < p.q_heads; ++h, x += p.dim) {
    normalise(p, x, y, l2 && p.q_weight ? p.q_weight[h] : 1.f, l2 ? nullptr : p.q_weight);
    if (p.cos) rotate(p, rotation, y);
    store(p, y, (T*)p.q + ((batch * p.q_heads + h) * p.tokens + token) * p.dim);
  }
  if (slot.page < 0) return;
  for (int64_t h = 0; h < p.kv_heads; ++h, x += p.dim) {
    normalise(p, x, y, 1.f, l2 ? nullptr : p.k_weight);
    if (p.cos) rotate(p, rotation, y);
    write<n, T>(p, p.k, slot, h, y);
  }
  for (int64_t h = 0; h < p.kv_heads; ++h, x += p.dim) {
    if (p.storage == Storage::same) {
      const int64_t at = slot.page * p.v.page_stride + h * p.v.head_stride + slot.offset * p.dim;
      __builtin_memcpy((T*)p.v.data + at, x, p.dim * sizeof(T));
    } else {
      for (int i = 0; i < count<n>(p); ++i) y.at[i] = load_part<n>(p, x, i);
      write<n, T>(p, p.v, slot, h, y);
    }
  }
}

template <int n>
static void append_tokens(const Append& p, int64_t begin, int64_t end) {
  Rotation rotation;
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t number = begin; number < end; ++number) append_token<n, decltype(t)>(p, number, rotation);
  });
}

void append(const Append& p, int64_t begin, int64_t end) {
  const int64_t vectors = p.dim % W ? 0 : p.dim / W;
  if (vectors == 4) return append_tokens<4>(p, begin, end);
  if (vectors == 8) return append_tokens<8>(p, begin, end);
  return append_tokens<0>(p, begin, end);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
