// See ssd_conv_contract.h. A vector of channels slides over the rows of its unit with the last rows of x in
// registers, so that each row is loaded once.
#include "attention/ssd_conv_contract.h"
#include "core/exp.h"
#include "core/lanes.h"

namespace arimg {
namespace ARIMG_SIMD {

// Row `row` >= 1 - width of x and what came before it, or nullptr for zeros.
template <typename T>
static ARIMG_INLINE const T* input_row(const CausalConv& p, int64_t batch, int64_t row) {
  if (row >= 0) return (const T*)p.x + batch * p.batch_stride + row * p.row_stride;
  if (p.tail == nullptr) return nullptr;
  return (const T*)p.tail + (batch * (p.width - 1) + p.width - 1 + row) * p.channels;
}

// scratch = [width, channels] taps and [channels] biases.
template <typename T>
static void turn_weights(const CausalConv& p, float* scratch) {
  const T *weight = (const T*)p.weight, *bias = (const T*)p.bias;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int i = 0; i < p.width; ++i) scratch[i * p.channels + c] = to_float(weight[c * p.width + i]);
  float* biases = scratch + p.width * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) biases[c] = bias != nullptr ? to_float(bias[c]) : 0.f;
}

template <int Width, typename T>
static ARIMG_INLINE void slide(const CausalConv& p, int64_t batch, int64_t first, int64_t rows, int64_t c,
                               int n, const float* scratch) {
  F32 tap[Width], window[Width], bias = load_lanes(scratch + Width * p.channels + c, n);
  for (int i = 0; i < Width; ++i) tap[i] = load_lanes(scratch + i * p.channels + c, n);
  for (int i = 0; i + 1 < Width; ++i) {
    const T* row = input_row<T>(p, batch, first + i + 1 - Width);
    window[i] = row != nullptr ? load_lanes(row + c, n) : F32(0.f);
  }
  const T* x = input_row<T>(p, batch, first) + c;
  T* y = (T*)p.y + (batch * p.length + first) * p.channels + c;
  for (int64_t t = 0; t < rows; ++t) {
    window[Width - 1] = load_lanes(x + t * p.row_stride, n);
    F32 sum = bias;
    for (int i = 0; i < Width; ++i) sum = mul_add(tap[i], window[i], sum);
    store_lanes(p.silu ? silu(sum) : sum, y + t * p.channels, n);
    for (int i = 0; i + 1 < Width; ++i) window[i] = window[i + 1];
  }
}

template <int Width, typename T>
static void convolve(const CausalConv& p, int64_t begin, int64_t end, const float* scratch) {
  int64_t per_batch = (p.length + kConvRows - 1) / kConvRows;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t batch = unit / per_batch, first = unit % per_batch * kConvRows;
    int64_t rows = p.length - first < kConvRows ? p.length - first : kConvRows;
    int64_t c = 0;
    for (; c + W <= p.channels; c += W) slide<Width, T>(p, batch, first, rows, c, W, scratch);
    if (c < p.channels) slide<Width, T>(p, batch, first, rows, c, int(p.channels - c), scratch);
  }
}

template <typename T, int Width = kConvMaxWidth>
static void convolve_any(const CausalConv& p, int64_t begin, int64_t end, const float* scratch) {
  if (p.width == Width)
    convolve<Width, T>(p, begin, end, scratch);
  else if constexpr (Width > 1)
    convolve_any<T, Width - 1>(p, begin, end, scratch);
}

void causal_conv1d(const CausalConv& p, int64_t begin, int64_t end, float* scratch) {
  with_dtype(p.dtype, [&](auto t) {
    turn_weights<decltype(t)>(p, scratch);
    convolve_any<decltype(t)>(p, begin, end, scratch);
  });
}

void causal_conv1d_tail(const CausalConv& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t batch = 0; batch < p.batch; ++batch)
      for (int64_t i = 0; i + 1 < p.width; ++i) {
        const T* row = input_row<T>(p, batch, p.length + i + 1 - p.width);
        T* to = (T*)p.new_tail + (batch * (p.width - 1) + i) * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) to[c] = row != nullptr ? row[c] : T{};
      }
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
