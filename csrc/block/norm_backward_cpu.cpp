// See norm_backward.h. A row stays in the first-level cache between its passes, and so do the sums of a part.
#include "block/norm_backward.h"
#include "block/norm_row.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE void add_to(float* sums, F32 value, int n) {
  store_lanes(load_lanes(sums, n) + value, sums, n);
}

// The constants of a row's gradient: mean_d and mean_dn, and the sums of scale and shift on the way.
struct Means {
  float d, dn;
};
template <typename T>
static ARIMG_INLINE Means add_norm_sums(const T* x, const T* grad, const T* scale, const Statistics& s,
                                        int64_t C, bool rms, float* scale_sums, float* shift_sums) {
  F32 total(0.f), total_n(0.f);
  for_lanes(C, [&](int64_t i, int n) {
    F32 g = load_lanes(grad + i, n), normed = s.normed(load_lanes(x + i, n));
    F32 d = g * (load_lanes(scale + i, n) + F32(1.f));
    total = total + d;  // lanes beyond the row have g = 0
    total_n = mul_add(d, normed, total_n);
    add_to(scale_sums + i, g * normed, n);
    add_to(shift_sums + i, g, n);
  });
  return {rms ? 0.f : reduce_add(total) / float(C), reduce_add(total_n) / float(C)};
}

template <typename T>
static void row_backward(const NormBackward& p, int64_t entry, int64_t row, float* sums) {
  const int64_t C = p.channels;
  const T* x = (const T*)p.x + row * C;
  const T* grad = p.grad_out == nullptr ? nullptr : (const T*)p.grad_out + row * C;
  const T* residual = p.grad_residual == nullptr ? nullptr : (const T*)p.grad_residual + row * C;
  const T* y = p.y == nullptr ? nullptr : (const T*)p.y + row * C;
  const T* scale = (const T*)p.scale + (grad == nullptr ? 0 : entry * p.scale_stride);
  const T* gate = (const T*)p.gate + (y == nullptr ? 0 : entry * p.gate_stride);
  T* grad_x = (T*)p.grad_x + row * C;
  T* grad_y = (T*)p.grad_y + (y == nullptr ? 0 : row * C);
  Statistics s{};
  Means means{};
  if (grad != nullptr) {
    s = statistics_of(x, C, p.rms, p.eps);
    means = add_norm_sums(x, grad, scale, s, C, p.rms, sums, sums + C);
  }
  for_lanes(C, [&](int64_t i, int n) {
    F32 g(0.f);
    if (grad != nullptr) {
      F32 d = load_lanes(grad + i, n) * (load_lanes(scale + i, n) + F32(1.f));
      F32 normed = s.normed(load_lanes(x + i, n));
      g = (d - F32(means.d) - normed * F32(means.dn)) * F32(s.inverse);
    }
    if (residual != nullptr) g = g + load_lanes(residual + i, n);
    if (y != nullptr) {
      store_lanes(load_lanes(gate + i, n) * g, grad_y + i, n);
      add_to(sums + 2 * C + i, g * load_lanes(y + i, n), n);
    }
    store_lanes(g, grad_x + i, n);
  });
}

void norm_backward(const NormBackward& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of(p);
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t entry = part / parts, first = part % parts * PART_ROWS;
      const int64_t last = first + PART_ROWS < p.rows_per_batch ? first + PART_ROWS : p.rows_per_batch;
      float* sums = p.parts + part * NORM_SUMS * p.channels;
      for (int64_t i = 0; i < NORM_SUMS * p.channels; ++i) sums[i] = 0.f;
      for (int64_t row = first; row < last; ++row)
        row_backward<decltype(t)>(p, entry, entry * p.rows_per_batch + row, sums);
    }
  });
}

void norm_backward_sums(const NormBackward& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, parts = parts_of(p);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t entry = begin; entry < end; ++entry)
      for (int k = 0; k < NORM_SUMS; ++k) {
        T* out = (T*)p.sums[k] + entry * C;
        if (p.sums[k] == nullptr) continue;
        for_lanes(C, [&](int64_t i, int n) {
          F32 total(0.f);
          for (int64_t part = 0; part < parts; ++part)
            total = total + load_lanes(p.parts + ((entry * parts + part) * NORM_SUMS + k) * C + i, n);
          store_lanes(total, out + i, n);
        });
      }
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
