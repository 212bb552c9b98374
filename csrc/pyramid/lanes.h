// Maps as fp32 pixels with their channels side by side ("lanes", filled up with zeros), where resampling is
// plain vector arithmetic: copies there and back, and the two passes of a resampling. For *_cpu.cpp files.
#pragma once

#include "core/lanes.h"
#include "core/transpose.h"
#include "pyramid/contract.h"

namespace arimg {
namespace ARIMG_SIMD {

// The part of one image of a map: some channels, some pixels.
template <typename T>
struct View {
  T* data;
  int64_t channel, pixel, channels, pixels;
};

template <typename T>
static void load_lanes(View<T> from, float* to, int64_t lanes) {
  for (int64_t p = 0; p < from.pixels; ++p)
    for (int64_t c = from.channels; c < lanes; ++c) to[p * lanes + c] = 0.f;
  if (from.channel == 1) {
    for (int64_t p = 0; p < from.pixels; ++p) {
      const T* pixel = from.data + p * from.pixel;
      int64_t c = 0;
      for (; c + W <= from.channels; c += W) F32::load(pixel + c).store(to + p * lanes + c);
      for (; c < from.channels; ++c) to[p * lanes + c] = to_float(pixel[c]);
    }
  } else if (from.pixel == 1) {
    transposed_copy(from.data, from.channel, from.channels, from.pixels, to, lanes);
  } else {
    for (int64_t c = 0; c < from.channels; ++c)
      for (int64_t p = 0; p < from.pixels; ++p)
        to[p * lanes + c] = to_float(from.data[c * from.channel + p * from.pixel]);
  }
}

enum class Store { set, add, subtract };

template <Store HOW, typename V>
static ARIMG_INLINE V combine(V old, V value) {
  return HOW == Store::set ? value : HOW == Store::add ? old + value : old - value;
}

template <Store HOW, typename T>
static void store_lanes(const float* from, int64_t lanes, View<T> to) {
  if (to.channel == 1) {
    for (int64_t p = 0; p < to.pixels; ++p) {
      T* pixel = to.data + p * to.pixel;
      const float* value = from + p * lanes;
      int64_t c = 0;
      for (; c + W <= to.channels; c += W)
        combine<HOW>(F32::load(pixel + c), F32::load(value + c)).store(pixel + c);
      for (; c < to.channels; ++c) pixel[c] = from_float<T>(combine<HOW>(to_float(pixel[c]), value[c]));
    }
  } else {
    auto square = [&](int64_t p, int64_t c) {
      F32 block[W];
      for (int i = 0; i < W; ++i) block[i] = F32::load(from + (p + i) * lanes + c);
      transpose(block);
      for (int i = 0; i < W; ++i) {
        T* place = to.data + (c + i) * to.channel + p;
        combine<HOW>(F32::load(place), block[i]).store(place);
      }
    };
    auto single = [&](int64_t p, int64_t c) {
      T* place = to.data + c * to.channel + p * to.pixel;
      *place = from_float<T>(combine<HOW>(to_float(*place), from[p * lanes + c]));
    };
    if (to.pixel == 1)
      for_squares(to.pixels, to.channels, square, single);
    else
      for (int64_t i = 0; i < to.pixels * to.channels; ++i) single(i / to.channels, i % to.channels);
  }
}

template <typename T>
static ARIMG_INLINE View<T> view(const Map& m, int64_t image, int64_t channel, int64_t channels,
                                 int64_t pixel, int64_t pixels) {
  T* data = (T*)m.data + image * m.batch + channel * m.channel + pixel * m.pixel;
  return {data, m.channel, m.pixel, channels, pixels};
}

// --- resampling ------------------------------------------------------------------------------------------

// The banded matrix of an axis (resample.h) as a table in working memory.
struct Bands {
  int taps;
  Span* span;
  float* weight;  // [targets, taps]
};

static inline int64_t bands_floats(const Axis& a) {
  return int64_t(a.targets) * (2 + most_taps(a));
}

static Bands make_bands(const Axis& a, float* memory) {
  Bands bands{most_taps(a), (Span*)memory, memory + 2 * int64_t(a.targets)};
  for (int i = 0; i < a.targets; ++i)
    bands.span[i] = axis_weights(a, i, bands.weight + int64_t(i) * bands.taps);
  return bands;
}

// N > 0: as many terms, their weights in registers; N = 0: `count` terms.
template <int N, typename From, typename To>
static ARIMG_INLINE void sum_terms(const float* weight, int count, const From* from, int64_t stride, To* to,
                                   int64_t n) {
  if (N > 0) count = N;
  F32 w[N > 0 ? N : 1];
  for (int k = 0; k < N; ++k) w[k] = F32(weight[k]);
  auto weight_of = [&](int k) { return N > 0 ? w[k] : F32(weight[k]); };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    F32 sum = count == 0 ? F32(0.f) : weight_of(0) * F32::load(from + i);
#pragma GCC unroll 4
    for (int k = 1; k < count; ++k) sum = mul_add(weight_of(k), F32::load(from + k * stride + i), sum);
    sum.store(to + i);
  }
  if (i == n) return;
  int rest = int(n - i);
  F32 sum = count == 0 ? F32(0.f) : weight_of(0) * F32::load_partial(from + i, rest);
  for (int k = 1; k < count; ++k)
    sum = mul_add(weight_of(k), F32::load_partial(from + k * stride + i, rest), sum);
  sum.store_partial(to + i, rest);
}

// to[i] = sum of weight[k] * from[k * stride + i] over k in [0, count) and for i in [0, n).
template <typename From, typename To>
static ARIMG_INLINE void weighted_sum(const float* weight, int count, const From* from, int64_t stride,
                                      To* to, int64_t n) {
  switch (count) {
    case 1:
      return sum_terms<1>(weight, count, from, stride, to, n);
    case 2:
      return sum_terms<2>(weight, count, from, stride, to, n);
    case 3:
      return sum_terms<3>(weight, count, from, stride, to, n);
    case 4:
      return sum_terms<4>(weight, count, from, stride, to, n);
    default:
      return sum_terms<0>(weight, count, from, stride, to, n);
  }
}

// One row of `out` from `in`, whose pixels lie `pixel` apart and whose first row is row `first` of the map;
// `row` holds in_width * channels floats.
template <typename From, typename To>
static void resample_row(const Bands& rows, const Bands& columns, int64_t y, const From* in, int64_t first,
                         int64_t in_width, int64_t in_pixel, int64_t channels, float* row, To* out,
                         int64_t out_width, int64_t out_pixel) {
  Span span = rows.span[y];
  const float* weight = rows.weight + y * rows.taps;
  const From* source = in + (span.begin - first) * in_width * in_pixel;
  int count = span.end - span.begin;
  if (in_pixel == channels)
    weighted_sum(weight, count, source, in_width * in_pixel, row, in_width * channels);
  else
    for (int64_t x = 0; x < in_width; ++x)
      weighted_sum(weight, count, source + x * in_pixel, in_width * in_pixel, row + x * channels, channels);
  for (int64_t x = 0; x < out_width; ++x) {
    Span s = columns.span[x];
    weighted_sum(columns.weight + x * columns.taps, s.end - s.begin, row + s.begin * channels, channels,
                 out + x * out_pixel, channels);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
