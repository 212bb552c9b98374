// See merge.h. Moves are plain loops over whole rows, or several of them, that the compiler turns into
// vectors.
#include "core/lanes.h"
#include "pyramid/merge.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int64_t PIECE =
    512;  // coarse pixels at a time: what is made of them stays in the first-level cache

// Rows [begin, end) of all planes. T: words of the elements' size; `coarse` nullptr: zeros.
template <typename T>
static void merge_rows(const Merge& p, const T* coarse, const T* fine, T* out, int64_t begin, int64_t end) {
  T mask[2 * PIECE],
      twice[2 * PIECE];  // for each fine pixel of a row: all bits set or none; the coarse pixel
  for (int64_t i = 0; i < 2 * PIECE; ++i) twice[i] = 0;
  const int64_t width = p.width;
  for (int64_t item = begin, rows; item < end; item += rows) {
    const int64_t y = item % p.height, image = item / p.height / p.channels;
    rows = width < PIECE ? at_most(at_most(PIECE / width, p.height - y), end - item) : 1;
    const uint8_t* is_fine = p.is_fine + (image * p.height + y) * width;
    for (int64_t x = 0; x < width; x += PIECE) {
      const int64_t across = at_most(width - x, PIECE), n = rows * across;
      for (int64_t j = 0; j < n; ++j) mask[2 * j] = mask[2 * j + 1] = T(-T(is_fine[x + j] != 0));
      if (coarse)
        for (int64_t j = 0; j < n; ++j) twice[2 * j] = twice[2 * j + 1] = coarse[item * width + x + j];
      for (int64_t row = 0; row < 2 * rows; ++row) {
        const T* from = fine + (2 * item + row) * 2 * width + 2 * x;
        const T *m = mask + row / 2 * 2 * across, *other = twice + row / 2 * 2 * across;
        T* to = out + (2 * item + row) * 2 * width + 2 * x;
        for (int64_t j = 0; j < 2 * across; ++j) to[j] = T((from[j] & m[j]) | (other[j] & T(~m[j])));
      }
    }
  }
}

void merge(const Merge& p, const void* coarse, const void* fine, void* out, int64_t bytes, int64_t begin,
           int64_t end) {
  auto as = [&](auto t) {
    using T = decltype(t);
    merge_rows(p, (const T*)coarse, (const T*)fine, (T*)out, begin, end);
  };
  bytes == 1 ? as(uint8_t{}) : bytes == 2 ? as(uint16_t{}) : bytes == 4 ? as(uint32_t{}) : as(uint64_t{});
}

// The four pixels of each region that is not fine.
template <typename T>
static void sum_regions(const T* top, const T* bottom, const uint8_t* is_fine, int64_t n, T* to) {
  const I32 even = lane_index() + lane_index(), odd = even + I32(1);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    F32 a = F32::load(top + 2 * j), b = F32::load(top + 2 * j + W);
    F32 c = F32::load(bottom + 2 * j), d = F32::load(bottom + 2 * j + W);
    F32 sum = pick(a, b, even) + pick(a, b, odd) + pick(c, d, even) + pick(c, d, odd);
    select(I32::load_bytes(is_fine + j) == I32(0), sum, F32(0.f)).store(to + j);
  }
  for (; j < n; ++j) {
    const T *above = top + 2 * j, *below = bottom + 2 * j;
    float sum = to_float(above[0]) + to_float(above[1]) + to_float(below[0]) + to_float(below[1]);
    to[j] = from_float<T>(is_fine[j] ? 0.f : sum);
  }
}

void merge_backward(const Merge& p, DType dtype, const void* grad, void* to_coarse, void* to_fine,
                    int64_t begin, int64_t end) {
  merge(p, nullptr, grad, to_fine, dtype == DType::f32 ? 4 : 2, begin, end);
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t y = item % p.height, image = item / p.height / p.channels;
      const T* top = (const T*)grad + 4 * item * p.width;
      sum_regions(top, top + 2 * p.width, p.is_fine + (image * p.height + y) * p.width, p.width,
                  (T*)to_coarse + item * p.width);
    }
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
