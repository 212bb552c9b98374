// How keys and values come out of a tensor or a cache: from pages, from bytes, turned for the register tile.
// Only for *_cpu.cpp files.
#pragma once

#include "attention/contract.h"
#include "core/simd.h"
#include "kv_cache/codes.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int kPanel = 2 * W;  // keys or channels of one register tile
constexpr int kTile = kAttentionKeyTile;
constexpr int64_t kAheadBytes = 16384;  // what comes from memory is asked for so much ahead
// Of the next page, where the hardware's guesses do not reach; for float32, narrower rows lose by it.
constexpr int64_t kStartBytes = 1024;

// Numbers as they are stored. Codes still lack the factor of their vector.

template <typename T>
constexpr bool is_code = false;
template <>
constexpr bool is_code<Int8Code> = true;
template <>
constexpr bool is_code<Fp8Code> = true;

template <typename T>
constexpr float stored_unit = 1.f;  // of what load_stored returns
template <>
constexpr float stored_unit<Fp8Code> = 256.f;

template <typename T>
static ARIMG_INLINE F32 load_stored(const T* p) {
  return F32::load(p);
}
template <typename T>
static ARIMG_INLINE F32 load_stored(const T* p, int n) {
  return F32::load_partial(p, n);
}
static ARIMG_INLINE F32 load_stored(const Int8Code* p) {
#if defined(__AVX512F__)  // what compilers make of a conversion of bytes goes element by element
  return to_float(I32((IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#elif ARIMG_WIDTH == 8
  return to_float(I32((IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
  return decode(I32::load_bytes(&p->byte), Storage::int8);
#endif
}
static ARIMG_INLINE F32 load_stored(const Int8Code* p, int n) {
  return decode(I32::load_bytes(&p->byte, n), Storage::int8);
}
// e4m3 is a half with fewer bits, 2^8 times as large; `factors` make up for it.
static ARIMG_INLINE F32 load_stored(const Fp8Code* p) {
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  return (FloatVec)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-0x4080)));
#elif ARIMG_WIDTH == 8
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return (FloatVec)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-0x4080)));
#else
  return decode(I32::load_bytes(&p->byte), Storage::fp8) * F32(0x1p-8f);
#endif
}
static ARIMG_INLINE F32 load_stored(const Fp8Code* p, int n) {
  return decode(I32::load_bytes(&p->byte, n), Storage::fp8) * F32(0x1p-8f);
}

// ---------------------------------------------------------------------------------------------------------
// Where the keys and values of one head lie: `old` of them in a tensor, or in pages of one, the rest in
// another.

// Asks the second-level cache for elements, which need not exist.
template <typename T>
static ARIMG_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T)))
    __builtin_prefetch((const char*)(from + i), 0, 2);
}

template <typename T>
struct Cells {
  const T* data;
  int64_t stride;       // elements from key to key
  const int32_t* page;  // the numbers of the pages, or nullptr
  int64_t page_size, page_stride;
  const T* fresh;  // keys from `old` on
  int64_t fresh_stride, old;
  const float* scale;  // of codes: a factor per key, those of a page together
  int64_t scale_stride;

  ARIMG_INLINE const T* at(int64_t n) const {
    if (n >= old) return fresh + (n - old) * fresh_stride;
    if (page == nullptr) return data + n * stride;
    return data + page[n / page_size] * page_stride + n % page_size * stride;
  }
  // The first of [first, first + count) where they lie `stride` apart, else nullptr.
  ARIMG_INLINE const T* run(int64_t first, int64_t count) const {
    if (first + count > old || (page != nullptr && first / page_size != (first + count - 1) / page_size))
      return nullptr;
    return at(first);
  }
  // Cached keys [first, first + count) page by page: f(index of the first, how many, page, place within it).
  template <typename F>
  ARIMG_INLINE void pages(int64_t first, int64_t count, F&& f) const {
    if (page == nullptr) return f(int64_t(0), count, int64_t(0), first);
    int64_t number = first / page_size, place = first % page_size;
    for (int64_t i = 0; i < count; ++number, place = 0) {
      const int64_t some = page_size - place < count - i ? page_size - place : count - i;
      f(i, some, int64_t(page[number]), place);
      i += some;
    }
  }
  // Keys [first, first + count) as runs that lie equally far apart: f(index of the first, how many, its
  // address, elements from key to key, elements from a key to what is read kAheadBytes later).
  template <typename F>
  ARIMG_INLINE void runs(int64_t first, int64_t count, F&& f) const {
    constexpr int64_t far = kAheadBytes / int64_t(sizeof(T)), start = kStartBytes / int64_t(sizeof(T));
    int64_t number = page ? first / page_size : 0, place = page ? first % page_size : first;
    const int64_t pages_ahead = page && page_size * stride < far ? far / (page_size * stride) : 1;
    for (int64_t i = 0, some; i < count; i += some) {
      const int64_t cached = old - first - i;
      some = count - i;
      if (cached <= 0) {
        f(i, some, fresh - cached * fresh_stride, fresh_stride, int64_t(0));
        continue;
      }
      if (some > cached) some = cached;
      const T* from = data + place * stride;
      int64_t ahead = far;
      if (page != nullptr) {
        from += page[number] * page_stride;
        const int64_t next = number + pages_ahead;
        ahead = next * page_size < old ? (page[next] - page[number]) * page_stride : 0;
        if (sizeof(T) == 4 && (number + 1) * page_size < old)
          prefetch(data + page[number + 1] * page_stride, start);
        if (some > page_size - place) some = page_size - place;
        ++number;
        place = 0;
      }
      f(i, some, from, stride, ahead);
    }
  }
  // Of codes: what their numbers, as load_stored gives them, are to be multiplied by.
  ARIMG_INLINE void factors(int64_t first, int64_t count, float* to) const {
    pages(first, count, [&](int64_t i, int64_t some, int64_t number, int64_t place) {
      const float* from = scale + number * scale_stride + place;
      for (int64_t j = 0; j < some; ++j) to[i + j] = from[j] * stored_unit<T>;
    });
  }
};

template <typename T>
static ARIMG_INLINE Cells<T> cells(const T* data, int64_t stride) {
  return {data, stride, nullptr, 1, 0, nullptr, 0, INT64_MAX, nullptr, 0};
}

// Keys [first, first + count), transposed: to[panel][channel][key in the panel]; what a last panel lacks is
// zero.
template <typename T>
static void load_transposed(const Cells<T>& from, int64_t first, int64_t count, int64_t dim, float* to) {
  float factor[kTile];
  if constexpr (is_code<T>) from.factors(first, count, factor);
  const T* key[kTile];
  from.runs(first, count, [&](int64_t index, int64_t some, const T* at, int64_t stride, int64_t) {
    for (int64_t n = 0; n < some; ++n) key[index + n] = at + n * stride;
  });
  for (int64_t n = 0; n < count; n += W) {
    float* panel = to + (n / kPanel) * dim * kPanel + n % kPanel;
    const T* row[W];
    for (int i = 0; i < W; ++i) row[i] = n + i < count ? key[n + i] : nullptr;
    for (int64_t d = 0; d < dim; d += W) {
      int channels = dim - d < W ? int(dim - d) : W;
      F32 block[W];
      for (int i = 0; i < W; ++i)
        block[i] = row[i] == nullptr ? F32(0.f)
                   : channels == W   ? load_stored(row[i] + d)
                                     : load_stored(row[i] + d, channels);
      if constexpr (is_code<T>)
        for (int i = 0; i < W && n + i < count; ++i) block[i] = block[i] * F32(factor[n + i]);
      transpose(block);
      for (int i = 0; i < channels; ++i) block[i].store(panel + (d + i) * kPanel);
    }
  }
  if ((count + W - 1) / W % 2 == 1) {  // half of the last panel is without keys
    float* panel = to + (count / kPanel) * dim * kPanel + W;
    for (int64_t d = 0; d < dim; ++d) F32(0.f).store(panel + d * kPanel);
  }
}

// One row of `dim` channels times `factor`; channels up to `padded` become zero.
template <typename T>
static ARIMG_INLINE void load_row(const T* from, int64_t dim, int64_t padded, float factor, float* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) (load_stored(from + d) * F32(factor)).store(to + d);
  if (d < dim) (load_stored(from + d, int(dim - d)) * F32(factor)).store(to + d), d += W;
  for (; d < padded; d += W) F32(0.f).store(to + d);
}

template <typename T>
static ARIMG_INLINE void store_row(const float* from, int64_t dim, float factor, T* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) (F32::load(from + d) * F32(factor)).store(to + d);
  if (d < dim) (F32::load(from + d) * F32(factor)).store_partial(to + d, int(dim - d));
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
