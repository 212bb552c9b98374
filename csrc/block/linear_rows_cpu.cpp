// See linear_rows.h. A tile is R rows of weights against M rows of x: each vector of weights is loaded (and
// widened to float) once for all M, each vector of x once for all R, and the R * M sums stay in registers.
#include "block/activation.h"
#include "block/linear_rows.h"
#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

static constexpr int64_t BLOCK = LINEAR_BLOCK;
static constexpr int64_t PANEL = 256;  // outputs that go through the epilogue together

struct Int4 {};  // the storage type of int4 blocks

// How weights of storage type T are kept and multiplied.
template <typename T>
struct Storage {
  using In = float;  // of the copy of x
  static constexpr int64_t bits = 8 * sizeof(T);
  static constexpr bool scaled = bits == 8;
  static constexpr int far_rows = scaled ? 0 : 2;  // see FAR_APART
};
template <>
struct Storage<Int4> {
  using In = float;
  static constexpr int64_t bits = 4;
  static constexpr bool scaled = true;
  static constexpr int far_rows = 0;
};
// Weights of type T as bf16 numbers (exact for codes) for the dot instruction: 16 sums of two products each.
template <typename T>
struct Pairs {};
template <typename T>
struct Storage<Pairs<T>> {
  using In = BFloat16;
  static constexpr int64_t bits = Storage<T>::bits;
  static constexpr bool scaled = Storage<T>::scaled;
  static constexpr int far_rows = scaled ? 0 : 4;
};

// Rows of x that a tile takes; x is padded with rows of zeros. More than four rows of floats leave the first-
// level cache before they are used again.
static int64_t tile_rows(const LinearRows& p) {
  return p.rows <= 1 ? 1 : p.rows <= 2 ? 2 : p.rows <= 4 || !p.bf16_dot ? 4 : 8;
}
static int64_t padded_rows(const LinearRows& p) {
  return (p.rows + tile_rows(p) - 1) / tile_rows(p) * tile_rows(p);
}
// Not a multiple of 4 KiB, which would put the same element of all rows in one set of the cache.
static int64_t x_stride(const LinearRows& p) {
  return whole_blocks(p.in) + 16;
}

int64_t linear_rows_floats(const LinearRows& p) {
  return padded_rows(p) * x_stride(p);
}

// With bf16_dot the same places hold bf16 numbers; for codes, whose pairs are inputs j and 16 + j of a block
// (as int4 stores them), in that order.
void linear_rows_copy(const LinearRows& p, float* x) {
  const int64_t stride = x_stride(p), rows = padded_rows(p);
  for (int64_t i = 0; i < rows * stride; ++i) x[i] = 0.f;
  for (int64_t m = 0; m < p.rows; ++m) {
    if (p.bf16_dot) {
      const bool paired = p.weight_type == WeightType::int8 || p.weight_type == WeightType::int4;
      const BFloat16* from = (const BFloat16*)p.x + m * p.in;
      BFloat16* to = (BFloat16*)x + m * stride;
      for (int64_t i = 0; i < p.in; ++i)
        to[paired ? i / BLOCK * BLOCK + i % 16 * 2 + i % BLOCK / 16 : i] = from[i];
      continue;
    }
    with_dtype(p.dtype, [&](auto t) {
      auto from = (const decltype(t)*)p.x + m * p.in;
      for (int64_t i = 0; i < p.in; ++i) x[m * stride + i] = to_float(from[i]);
    });
  }
}

// The W weights from input i of a row.
template <typename T>
static ARIMG_INLINE F32 load_weights(const T* row, int64_t i) {
  return F32::load(row + i);
}
static ARIMG_INLINE F32 load_weights(const int8_t* row, int64_t i) {
#if defined(__AVX512F__)
  return to_float(I32((IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + i)))));
#elif ARIMG_WIDTH == 8
  return to_float(I32((IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + i)))));
#else
  FloatVec r;
  for (int j = 0; j < W; ++j) r[j] = row[i + j];
  return r;
#endif
}
static ARIMG_INLINE F32 load_weights(const Int4* row, int64_t i) {
  I32 bytes = I32::load_bytes((const uint8_t*)row + i / 32 * 16 + i % 16);
  if (i % 32 >= 16) bytes = bytes >> 4;
#if defined(__AVX512F__)
  // The permutation looks at the low four bits alone.
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return (FloatVec)_mm512_permutexvar_ps((__m512i)bytes.v, values);
#else
  return to_float((bytes & I32(15)) - I32(8));
#endif
}

// sums += x * weights over one block of inputs, from element i of the rows.
template <typename T, int R, int M>
static ARIMG_INLINE void add_block(F32 (&sum)[R][M], const T* const (&w)[R], int64_t i, const float* x,
                                   int64_t stride) {
#pragma GCC unroll 8
  for (int part = 0; part < BLOCK; part += W) {
    F32 weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = load_weights(w[r], i + part);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      F32 in = F32::load(x + m * stride + part);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][m] = mul_add(weights[r], in, sum[r][m]);
    }
  }
}

#if defined(__AVX512F__)
// As assembly, so that the rest of the level needs no AVX512-BF16.
static ARIMG_INLINE F32 dot_pairs(F32 sum, __m512i a, __m512i b) {
  __m512 s = (__m512)sum.v;
  asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(a), "v"(b));
  return (FloatVec)s;
}
static ARIMG_INLINE __m512i load_pairs(const Pairs<BFloat16>* row, int64_t i) {
  return _mm512_loadu_si512((const BFloat16*)row + i);
}
static ARIMG_INLINE __m512i load_pairs(const Pairs<int8_t>* row, int64_t i) {
  // A float of a code ends in 16 zeros: its upper half is the bf16 number.
  UintVec low = (UintVec)load_weights((const int8_t*)row, i).v;
  UintVec high = (UintVec)load_weights((const int8_t*)row, i + 16).v;
  return (__m512i)(low >> 16 | (high & 0xffff0000u));
}
static ARIMG_INLINE __m512i load_pairs(const Pairs<Int4>* row, int64_t i) {
  // The permutation looks at the low five bits of each half; the fifth may be anything.
  const __m512i values =
      _mm512_broadcast_i64x4(_mm256_setr_epi16(-16128, -16160, -16192, -16224, -16256, -16320, -16384, -16512,
                                               0, 16256, 16384, 16448, 16512, 16544, 16576, 16608));
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)row + i / 2)));
  return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), values);
}
template <typename T, int R, int M>
static ARIMG_INLINE void add_block(F32 (&sum)[R][M], const Pairs<T>* const (&w)[R], int64_t i, const float* x,
                                   int64_t stride) {
  __m512i weights[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) weights[r] = load_pairs(w[r], i);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    __m512i in = _mm512_loadu_si512((const BFloat16*)x + m * stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][m] = dot_pairs(sum[r][m], weights[r], in);
  }
}
#endif

// With few rows of x, all in one tile, memory is the limit (but for codes, which take longer to widen than to
// read). Then the rows of a tile lie far apart and those of the next tile follow them: R long streams, which
// the hardware fetches ahead. Otherwise tiles of neighbouring rows are asked for ahead, as the hardware
// starts each row anew.
template <typename T, int M>
static constexpr bool FAR_APART = M <= Storage<T>::far_rows;

// Asks for the block at input i of the next tile's rows, for the second-level cache: by the time they are
// needed they are there.
template <typename T, int R>
static ARIMG_INLINE void prefetch_block(const T* const (&w)[R], int64_t to_next_tile, int64_t i) {
  constexpr int64_t bytes = BLOCK * Storage<T>::bits / 8, line = 64;
  const int64_t begin = i * Storage<T>::bits / 8;
  if (bytes < line && begin % line != 0) return;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int64_t byte = 0; byte < bytes; byte += line)
      __builtin_prefetch((const char*)w[r] + to_next_tile + begin + byte, 0, 2);
}

// Sums of outputs o + r * step, r < R, for rows [0, M) of x into out[m * PANEL + r * step].
template <typename T, int R, int M>
static void dot_tile(const LinearRows& p, const LinearRows::Weight& weight, const float* x, int64_t o,
                     int64_t step, float* out) {
  using In = typename Storage<T>::In;
  const int64_t stride = x_stride(p), whole = Storage<T>::scaled ? whole_blocks(p.in) : p.in / BLOCK * BLOCK;
  const int64_t groups = Storage<T>::scaled ? linear_groups(p) : 1;
  const T* w[R];
  for (int r = 0; r < R; ++r) w[r] = (const T*)((const char*)weight.data + (o + r * step) * weight.row_bytes);
  F32 total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = F32(0.f);
  for (int64_t g = 0; g < groups; ++g) {
    F32 sum[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sum[r][m] = F32(0.f);
    int64_t end = g + 1 < groups ? (g + 1) * p.group : whole;
    for (int64_t i = g * p.group; i < end; i += BLOCK) {
      add_block(sum, w, i, (const float*)((const In*)x + i), stride);
      if constexpr (!FAR_APART<T, M>) prefetch_block<T>(w, R * weight.row_bytes, i);
    }
    if (!Storage<T>::scaled && whole < p.in) {
      // The rest of the rows, through a copy: nothing beyond them is read.
      constexpr int64_t bytes = BLOCK * Storage<T>::bits / 8;
      alignas(64) char rest[R][bytes] = {};
      const T* rests[R];
      for (int r = 0; r < R; ++r) {
        __builtin_memcpy(rest[r], (const char*)w[r] + whole * Storage<T>::bits / 8,
                         (p.in - whole) * Storage<T>::bits / 8);
        rests[r] = (const T*)rest[r];
      }
      add_block(sum, rests, 0, (const float*)((const In*)x + whole), stride);
    }
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        if constexpr (Storage<T>::scaled) {
          F32 scale(weight.scale[(o + r * step) * groups + g]);
          total[r][m] = mul_add(sum[r][m], scale, total[r][m]);
        } else {
          total[r][m] = sum[r][m];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[m * PANEL + r * step] = sum_lanes(total[r][m]);
}

// Outputs [o, o + n), all rows: out[m * PANEL + i].
template <typename T, int M>
static void dot_panel(const LinearRows& p, const LinearRows::Weight& weight, const float* x, int64_t o, int n,
                      float* out) {
  // As many rows of weights as sums fit the registers, but more than four long streams read no faster.
  constexpr int fit = W == 16 ? (M <= 2 ? 8 : 16 / M) : (M <= 2 ? 4 : 8 / M);
  constexpr int R = FAR_APART<T, M> ? 4 : fit;
  const int tiles = n / R, step = FAR_APART<T, M> ? tiles : 1;
  const int64_t rows = padded_rows(p), next = M * x_stride(p) * sizeof(typename Storage<T>::In);
  // After the first rows of x the weights of a tile come from the cache.
  for (int i = 0; i < tiles; ++i)
    for (int64_t m = 0; m < rows; m += M) {
      const int at = FAR_APART<T, M> ? i : i * R;
      dot_tile<T, R, M>(p, weight, (const float*)((const char*)x + m / M * next), o + at, step,
                        out + m * PANEL + at);
    }
  for (int i = tiles * R; i < n; ++i)
    for (int64_t m = 0; m < rows; m += M)
      dot_tile<T, 1, M>(p, weight, (const float*)((const char*)x + m / M * next), o + i, 1,
                        out + m * PANEL + i);
}

template <typename T>
static void dot_panel_of_type(const LinearRows& p, const LinearRows::Weight& weight, const float* x,
                              int64_t o, int n, float* out) {
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, float) && !__is_same(T, Half)) {
    if (p.bf16_dot) switch (tile_rows(p)) {
        case 1:
          return dot_panel<Pairs<T>, 1>(p, weight, x, o, n, out);
        case 2:
          return dot_panel<Pairs<T>, 2>(p, weight, x, o, n, out);
        case 4:
          return dot_panel<Pairs<T>, 4>(p, weight, x, o, n, out);
        default:
          return dot_panel<Pairs<T>, 8>(p, weight, x, o, n, out);
      }
  }
#endif
  switch (tile_rows(p)) {
    case 1:
      return dot_panel<T, 1>(p, weight, x, o, n, out);
    case 2:
      return dot_panel<T, 2>(p, weight, x, o, n, out);
    default:
      return dot_panel<T, 4>(p, weight, x, o, n, out);
  }
}

static void dot_panel_of_weight(const LinearRows& p, const LinearRows::Weight& weight, const float* x,
                                int64_t o, int n, float* out) {
  switch (p.weight_type) {
    case WeightType::f32:
      return dot_panel_of_type<float>(p, weight, x, o, n, out);
    case WeightType::bf16:
      return dot_panel_of_type<BFloat16>(p, weight, x, o, n, out);
    case WeightType::f16:
      return dot_panel_of_type<Half>(p, weight, x, o, n, out);
    case WeightType::int8:
      return dot_panel_of_type<int8_t>(p, weight, x, o, n, out);
    case WeightType::int4:
      return dot_panel_of_type<Int4>(p, weight, x, o, n, out);
  }
}

// n lanes from p, the rest 0; 0 without p.
template <typename T>
static ARIMG_INLINE F32 load_lanes(const T* p, int64_t i, int n) {
  if (p == nullptr) return F32(0.f);
  return n == W ? F32::load(p + i) : F32::load_partial(p + i, n);
}

// Bias, activation, factor and residual of W outputs of a row.
template <typename T>
static void finish(const LinearRows& p, const float* sums, const float* factors, int64_t m, int64_t o,
                   int n) {
  F32 y = F32::load(sums) + load_lanes((const T*)p.weight.bias, o, n);
  y = activate(p.activation, y);
  if (p.factor.data != nullptr) y = y * (F32::load(factors) + load_lanes((const T*)p.factor.bias, o, n));
  y = y + load_lanes((const T*)p.residual, m * p.outs + o, n);
  T* out = (T*)p.out + m * p.outs + o;
  if (n == W)
    y.store(out);
  else
    y.store_partial(out, n);
}

void linear_rows(const LinearRows& p, const float* x, int64_t begin, int64_t end) {
  alignas(64) float sums[LINEAR_ROWS * PANEL], factors[LINEAR_ROWS * PANEL];
  for (int64_t o = begin; o < end; o += PANEL) {
    int n = int(end - o < PANEL ? end - o : PANEL);
    dot_panel_of_weight(p, p.weight, x, o, n, sums);
    if (p.factor.data != nullptr) dot_panel_of_weight(p, p.factor, x, o, n, factors);
    with_dtype(p.dtype, [&](auto t) {
      for (int64_t m = 0; m < p.rows; ++m)
        for (int i = 0; i < n; i += W)
          finish<decltype(t)>(p, sums + m * PANEL + i, factors + m * PANEL + i, m, o + i,
                              n - i < W ? n - i : W);
    });
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
