// See bits.h. Rows follow each other without a gap, so the bits of all rows are one stream: whole vectors
// are read, and rows are cut from the stream.
#include "quantize/bits.h"

#include "core/simd.h"

namespace arimg {
namespace ARIMG_SIMD {

// At most 63 bits wait in it before at most 64 are added.
struct Stream {
  unsigned __int128 waiting = 0;
  int count = 0;

  ARIMG_INLINE void add(uint64_t bits, int n) {
    waiting |= (unsigned __int128)(bits) << count;
    count += n;
  }
  ARIMG_INLINE uint64_t take(int n) {  // bits above the n first are not cleared
    uint64_t bits = uint64_t(waiting);
    waiting >>= n;
    count -= n;
    return bits;
  }
};

// Cuts rows off the stream and writes their indices.
struct Rows {
  int bits;
  bool msb_first;
  int64_t* index;
  Stream stream;

  ARIMG_INLINE void add(uint64_t some, int n) {
    stream.add(some, n);
    while (stream.count >= bits)
      *index++ = int64_t(ordered(stream.take(bits) & (~uint64_t(0) >> (64 - bits)), bits, msb_first));
  }
};

template <typename T>
static void sign_rows(const SignCodes& p, int64_t begin, int64_t end) {
  const T* z = (const T*)p.z;
  T* codes = (T*)p.codes;
  Rows rows{p.bits, p.msb_first, p.index + begin, {}};
  const F32 zero(0.f), high(p.scale), low(-p.scale);
  int64_t i = begin * p.bits;
  const int64_t last = end * p.bits;
  for (; i + W <= last; i += W) {
    Mask set = F32::load(z + i) > zero;
    select(set, high, low).store(codes + i);
    rows.add(lane_bits(set), W);
  }
  if (i < last) {
    const int n = int(last - i);
    Mask set = F32::load_partial(z + i, n) > zero;
    select(set, high, low).store_partial(codes + i, n);
    rows.add(lane_bits(set), n);
  }
}

void sign_codes(const SignCodes& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) { sign_rows<decltype(t)>(p, begin, end); });
}

// Bit i tells whether byte i is set, for BYTES bytes.
#if ARIMG_WIDTH == 16 && defined(__AVX512BW__)
static constexpr int BYTES = 64;
static ARIMG_INLINE uint64_t byte_bits(const uint8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(v, v);
}
#elif ARIMG_WIDTH >= 8
static constexpr int BYTES = 32;
static ARIMG_INLINE uint64_t byte_bits(const uint8_t* p) {
  __m256i v = _mm256_loadu_si256((const __m256i*)p);
  return uint32_t(~_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
}
#else
static constexpr int BYTES = 8;
static ARIMG_INLINE uint64_t byte_bits(const uint8_t* p) {
  constexpr uint64_t sevens = 0x7f7f7f7f7f7f7f7full;
  uint64_t v;
  __builtin_memcpy(&v, p, 8);
  v = (((v & sevens) + sevens) | v) >> 7 & 0x0101010101010101ull;  // each byte becomes 0 or 1
  return v * 0x0102040810204080ull >> 56;                          // byte i moves to bit 56 + i
}
#endif

void pack_bits(const PackBits& p, int64_t begin, int64_t end) {
  Rows rows{p.bits, p.msb_first, p.index + begin, {}};
  int64_t i = begin * p.bits;
  const int64_t last = end * p.bits;
  for (; i + BYTES <= last; i += BYTES) rows.add(byte_bits(p.from + i), BYTES);
  for (; i < last; ++i) rows.add(p.from[i] != 0, 1);
}

static ARIMG_INLINE void store_bytes(uint64_t bits, uint8_t* p) {
  uint64_t v = (bits & 0xff) * 0x0101010101010101ull & 0x8040201008040201ull;  // byte i keeps its bit i
  v = (v + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
  __builtin_memcpy(p, &v, 8);
}

// Writes row after row in whole groups of STEP elements: what reaches beyond a row is overwritten by the next
// one. Rows that would reach beyond the last are written element by element.
template <int STEP, typename Group, typename Single>
static ARIMG_INLINE void unpack_rows(const UnpackBits& p, int64_t begin, int64_t end, Group&& group,
                                     Single&& single) {
  const int64_t reach = (p.bits + STEP - 1) / STEP * STEP;
  for (int64_t row = begin; row < end; ++row) {
    const uint64_t bits = row_of_index(uint64_t(p.index[row]), p.bits, p.msb_first);
    const int64_t at = row * p.bits;
    if (at + reach <= end * p.bits)
      for (int j = 0; j < p.bits; j += STEP) group(bits >> j, at + j);
    else
      for (int j = 0; j < p.bits; ++j) single(bits >> j & 1, at + j);
  }
}

static void unpack_to_bytes(const UnpackBits& p, int64_t begin, int64_t end) {
  uint8_t* out = (uint8_t*)p.out;
  unpack_rows<8>(
      p, begin, end, [&](uint64_t bits, int64_t at) { store_bytes(bits, out + at); },
      [&](uint64_t bit, int64_t at) { out[at] = uint8_t(bit); });
}

template <typename T>
static void unpack_to_values(const UnpackBits& p, int64_t begin, int64_t end) {
  T* out = (T*)p.out;
  int32_t places[W];
  for (int i = 0; i < W; ++i) places[i] = 1 << i;
  const I32 place = I32::load(places);
  const F32 low(p.low), high(p.high);
  unpack_rows<W>(
      p, begin, end,
      [&](uint64_t bits, int64_t at) {
        select((I32(int32_t(uint32_t(bits))) & place) == I32(0), low, high).store(out + at);
      },
      [&](uint64_t bit, int64_t at) { out[at] = from_float<T>(bit ? p.high : p.low); });
}

void unpack_bits(const UnpackBits& p, int64_t begin, int64_t end) {
  if (p.bytes) return unpack_to_bytes(p, begin, end);
  with_dtype(p.dtype, [&](auto t) { unpack_to_values<decltype(t)>(p, begin, end); });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
