// See bits.h. A block takes whole rows as one run of elements, 16 bytes per thread at a time; neighbouring
// lanes make words of 32 bits, from which one thread per row cuts the row's index.
#include "quantize/bits.h"

#include "core/chunk.h"
#include "core/cuda.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int THREADS = 256;
constexpr int ROWS = 256;  // of a block; a multiple of 32, so that its bits are whole words

struct Or {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

__device__ __forceinline__ bool is_set(uint8_t x) {
  return x != 0;
}
template <typename T>
__device__ __forceinline__ bool is_set(T x) {
  return to_float(x) > 0.f;
}

// Whole chunks as one access where `vectors` says that they are aligned; beyond `left` zeros.
template <bool vectors, typename T>
__device__ __forceinline__ void load_raw(T (&to)[chunk<T>], const T* from, int left) {
  if (vectors && left >= chunk<T>) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) to[j] = j < left ? from[j] : T{};
  }
}
template <bool vectors, typename T>
__device__ __forceinline__ void store_raw(T* to, const T (&from)[chunk<T>], int left) {
  if (vectors && left >= chunk<T>) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j)
      if (j < left) to[j] = from[j];
  }
}

// The bits [at, at + count) of the words, the first as bit 0.
__device__ __forceinline__ uint64_t cut(Shared<uint32_t> words, int at, int count) {
  const int word = at / 32, shift = at % 32;
  uint64_t bits = words[word] >> shift;
  if (shift + count > 32) bits |= uint64_t(words[word + 1]) << (32 - shift);
  if (shift + count > 64) bits |= uint64_t(words[word + 2]) << (64 - shift);
  return bits & (~uint64_t(0) >> (64 - count));
}

// Reads the block's elements, passes each chunk to `each(first element, elements left, bits)`, and writes
// the indices of its rows.
template <typename T, bool vectors, typename F>
__device__ __forceinline__ void pack_rows(const T* from, int64_t all_rows, int bits, bool msb_first,
                                          int64_t* index, F&& each) {
  constexpr int lanes = 32 / chunk<T>;  // that make a word
  SharedArena arena;
  auto words = arena.take<uint32_t>(ROWS * bits / 32 + chunk<T>);
  const int64_t first_row = int64_t(blockIdx.x) * ROWS;
  const int rows = int(all_rows - first_row < ROWS ? all_rows - first_row : ROWS);
  const int count = rows * bits;
  from += first_row * bits;
  const int lane = threadIdx.x % 32;
  for (int base = threadIdx.x / 32 * 32 * chunk<T>; base < count; base += THREADS * chunk<T>) {
    const int i = base + lane * chunk<T>;
    alignas(16) T raw[chunk<T>];
    load_raw<vectors>(raw, from + i, count - i);
    uint32_t some = 0;
#pragma unroll
    for (int j = 0; j < chunk<T>; ++j) some |= uint32_t(is_set(raw[j])) << j;
    if (i < count) each(first_row * bits + i, count - i, some);
    uint32_t word = warp_reduce<lanes>(some << (lane % lanes * chunk<T>), Or{});
    if (lane % lanes == 0) words[i / 32] = word;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += THREADS)
    index[first_row + row] = int64_t(ordered(cut(words, row * bits, bits), bits, msb_first));
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) sign_codes_kernel(SignCodes p) {
  const T high = from_float<T>(p.scale), low = from_float<T>(-p.scale);
  pack_rows<T, vectors>((const T*)p.z, p.rows, p.bits, p.msb_first, p.index,
                        [&](int64_t i, int left, uint32_t some) {
                          alignas(16) T codes[chunk<T>];
#pragma unroll
                          for (int j = 0; j < chunk<T>; ++j) codes[j] = some >> j & 1 ? high : low;
                          store_raw<vectors>((T*)p.codes + i, codes, left);
                        });
}

template <bool vectors>
__global__ void __launch_bounds__(THREADS) pack_bits_kernel(PackBits p) {
  pack_rows<uint8_t, vectors>(p.from, p.rows, p.bits, p.msb_first, p.index, [](int64_t, int, uint32_t) {});
}

// One chunk per thread.
template <typename T, bool vectors>
__global__ void __launch_bounds__(THREADS) unpack_bits_kernel(UnpackBits p, T low, T high) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * chunk<T>;
  const int64_t count = p.rows * p.bits;
  if (i >= count) return;
  const int left = int(count - i < chunk<T> ? count - i : chunk<T>);
  int64_t row = i / p.bits;
  int bit = int(i - row * p.bits);
  uint64_t bits = row_of_index(uint64_t(p.index[row]), p.bits, p.msb_first) >> bit;
  alignas(16) T values[chunk<T>];
#pragma unroll
  for (int j = 0; j < chunk<T>; ++j) {
    values[j] = bits & 1 ? high : low;
    bits >>= 1;
    if (++bit == p.bits && j + 1 < left) {
      bit = 0;
      bits = row_of_index(uint64_t(p.index[++row]), p.bits, p.msb_first);
    }
  }
  store_raw<vectors>((T*)p.out + i, values, left);
}

template <typename T>
size_t words_bytes(int bits) {
  return shared_bytes<uint32_t>(size_t(ROWS) * bits / 32 + chunk<T>);
}

template <typename T>
Status launch_unpack(const UnpackBits& p, T low, T high, void* stream) {
  const int64_t blocks = ceil_div(p.rows * p.bits, int64_t(THREADS) * chunk<T>);
  if (chunk_aligned<T>(p.out, 0))
    return ARIMG_LAUNCH((unpack_bits_kernel<T, true>), blocks, THREADS, 0, stream, p, low, high);
  return ARIMG_LAUNCH((unpack_bits_kernel<T, false>), blocks, THREADS, 0, stream, p, low, high);
}

}  // namespace

Status sign_codes_cuda(const SignCodes& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = ceil_div(p.rows, ROWS);
    if (chunk_aligned<T>(p.z, 0) && chunk_aligned<T>(p.codes, 0))
      return ARIMG_LAUNCH((sign_codes_kernel<T, true>), blocks, THREADS, words_bytes<T>(p.bits), stream, p);
    return ARIMG_LAUNCH((sign_codes_kernel<T, false>), blocks, THREADS, words_bytes<T>(p.bits), stream, p);
  });
}

Status pack_bits_cuda(const PackBits& p, void* stream) {
  const int64_t blocks = ceil_div(p.rows, ROWS);
  if (chunk_aligned<uint8_t>(p.from, 0))
    return ARIMG_LAUNCH((pack_bits_kernel<true>), blocks, THREADS, words_bytes<uint8_t>(p.bits), stream, p);
  return ARIMG_LAUNCH((pack_bits_kernel<false>), blocks, THREADS, words_bytes<uint8_t>(p.bits), stream, p);
}

Status unpack_bits_cuda(const UnpackBits& p, void* stream) {
  if (p.bytes) return launch_unpack<uint8_t>(p, 0, 1, stream);
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_unpack<T>(p, from_float<T>(p.low), from_float<T>(p.high), stream);
  });
}

}  // namespace arimg
