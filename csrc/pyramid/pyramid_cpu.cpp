// See contract.h. Inside, maps are fp32 with the channels of a pixel side by side ("lanes", filled up with
// zeros to whole panels): resampling is then plain vector arithmetic, and the convolution a product of pixels
// and a packed filter.
#include "core/gemm_tile.h"
#include "core/transpose.h"
#include "pyramid/contract.h"
#include "pyramid/resample.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE int64_t at_most(int64_t x, int64_t limit) {
  return x < limit ? x : limit;
}

static ARIMG_INLINE int64_t whole_panels(int64_t channels) {
  return (channels + PANEL - 1) / PANEL * PANEL;
}

// --- maps to lanes and back --------------------------------------------------------------------------------

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

// --- resampling
// ----------------------------------------------------------------------------------------------

static void area(const Resample& p, const float* in, float* out) {
  for (int64_t y = 0; y < p.out_height; ++y)
    for (int64_t x = 0; x < p.out_width; ++x, out += PANEL) {
      Cell rows = area_cell(y, p.in_height, p.out_height), columns = area_cell(x, p.in_width, p.out_width);
      F32 left(0.f), right(0.f);
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for (int64_t j = columns.begin; j < columns.end; ++j) {
          const float* pixel = in + (i * p.in_width + j) * PANEL;
          left = left + F32::load(pixel);
          right = right + F32::load(pixel + W);
        }
      F32 count(float((rows.end - rows.begin) * (columns.end - columns.begin)));
      (left / count).store(out);
      (right / count).store(out + W);
    }
}

// to[i] = sum of weight[k] * from[position[k] * stride + i] for i in [0, n), n a multiple of W.
static void weighted_sum(const Taps& taps, const float* from, int64_t stride, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    F32 sum = F32(taps.weight[0]) * F32::load(from + taps.position[0] * stride + i);
    for (int k = 1; k < 4; ++k)
      sum = mul_add(F32(taps.weight[k]), F32::load(from + taps.position[k] * stride + i), sum);
    sum.store(to + i);
  }
}

// Every row of `in` [height, in_width, lanes] to `width` pixels.
static void widen_rows(const float* in, int64_t height, int64_t in_width, int64_t width, int64_t lanes,
                       float* out) {
  for (int64_t x = 0; x < width; ++x) {
    Taps taps = bicubic_taps(x, in_width, width);
    for (int64_t y = 0; y < height; ++y)
      weighted_sum(taps, in + y * in_width * lanes, lanes, out + (y * width + x) * lanes, lanes);
  }
}

static int64_t channel_groups(const Resample& p) {
  return (p.channels + PANEL - 1) / PANEL;
}

int64_t resample_items(const Resample& p) {
  return p.images * channel_groups(p);
}

int64_t resample_scratch(const Resample& p) {
  return PANEL * (p.in_height * (p.in_width + p.out_width) + p.out_height * p.out_width);
}

void resample(const Resample& p, float* scratch, int64_t begin, int64_t end) {
  const bool same = p.in_height == p.out_height && p.in_width == p.out_width;
  int64_t pixels = p.in_height * p.in_width, out_pixels = p.out_height * p.out_width;
  float *in = scratch, *wide = in + pixels * PANEL, *out = wide + p.in_height * p.out_width * PANEL;
  for (int64_t item = begin; item < end; ++item) {
    int64_t image = item / channel_groups(p), channel = item % channel_groups(p) * PANEL;
    int64_t channels = at_most(p.channels - channel, PANEL);
    with_dtype(p.in.dtype, [&](auto t) {
      load_lanes(view<const decltype(t)>(p.in, image, channel, channels, 0, pixels), in, PANEL);
    });
    if (!same && p.mode == Resampling::area) area(p, in, out);
    if (!same && p.mode == Resampling::bicubic) {
      int64_t row = p.out_width * PANEL;
      widen_rows(in, p.in_height, p.in_width, p.out_width, PANEL, wide);
      for (int64_t y = 0; y < p.out_height; ++y)
        weighted_sum(bicubic_taps(y, p.in_height, p.out_height), wide, row, out + y * row, row);
    }
    with_dtype(p.out.dtype, [&](auto t) {
      auto to = view<decltype(t)>(p.out, image, channel, channels, 0, out_pixels);
      store_lanes<Store::set>(same ? in : out, PANEL, to);
    });
  }
}

// --- accumulate
// ----------------------------------------------------------------------------------------------

// Packed: per panel of output channels, [PANEL] biases, then [9][input lanes][PANEL] weights.
static ARIMG_INLINE int64_t filter_panel(int64_t lanes) {
  return (9 * lanes + 1) * PANEL;
}

int64_t filter_floats(int64_t channels) {
  int64_t lanes = whole_panels(channels);
  return lanes / PANEL * filter_panel(lanes);
}

void pack_filter(const Accumulate& p, float* filter) {
  int64_t C = p.channels, lanes = whole_panels(C);
  for (int64_t i = 0; i < filter_floats(C); ++i) filter[i] = 0.f;
  with_dtype(p.filter_dtype, [&](auto t) {
    using T = decltype(t);
    const T *weight = (const T*)p.weight, *bias = (const T*)p.bias;
    for (int64_t o = 0; o < C; ++o) {
      float* biases = filter + o / PANEL * filter_panel(lanes) + o % PANEL;
      float* taps = biases + PANEL;
      *biases = p.ratio * to_float(bias[o]);
      for (int64_t i = 0; i < C; ++i)
        for (int tap = 0; tap < 9; ++tap)
          taps[(tap * lanes + i) * PANEL] = p.ratio * to_float(weight[(o * C + i) * 9 + tap]);
      taps[(4 * lanes + o) * PANEL] += 1.f - p.ratio;
    }
  });
}

// R neighbouring pixels of one row, one panel of output channels. `up` is the pixel above and left of the
// first.
template <int R>
static ARIMG_INLINE void convolve_tile(const float* up, int64_t row, int64_t lanes, const float* panel,
                                       float* out) {
  Tile<R> tile;
  tile.start(F32::load(panel), F32::load(panel + W));
  panel += PANEL;
  for (int dy = 0; dy < 3; ++dy)
    for (int dx = 0; dx < 3; ++dx, panel += lanes * PANEL)
      tile.multiply(up + dy * row + dx * lanes, lanes, panel, lanes);
  for (int r = 0; r < R; ++r) {
    tile.sum[r][0].store(out + r * lanes);
    tile.sum[r][1].store(out + r * lanes + W);
  }
}

template <int R>
static void convolve_pixels(int pixels, const float* up, int64_t row, int64_t lanes, const float* panel,
                            float* out) {
  if constexpr (R > 1)
    if (pixels < R) return convolve_pixels<R - 1>(pixels, up, row, lanes, panel, out);
  convolve_tile<R>(up, row, lanes, panel, out);
}

// `up` [rows + 2, width + 2, lanes] with its border -> out [rows, width, lanes].
static void convolve(const float* up, int64_t rows, int64_t width, int64_t lanes, const float* filter,
                     float* out) {
  int64_t row = (width + 2) * lanes;
  int64_t tiles = (width + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t first = 0; first < lanes; first += PANEL, filter += filter_panel(lanes))
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal width
        int64_t x = tile * width / tiles, end = (tile + 1) * width / tiles;
        convolve_pixels<TILE_ROWS>(int(end - x), up + y * row + x * lanes, row, lanes, filter,
                                   out + (y * width + x) * lanes + first);
      }
}

static void load_source(const Accumulate& p, int64_t image, float* to, int64_t lanes) {
  int64_t pixels = p.in_height * p.in_width;
  with_dtype(p.h.dtype, [&](auto t) {
    using T = const decltype(t);
    if (p.index == nullptr) return load_lanes(view<T>(p.h, image, 0, p.channels, 0, pixels), to, lanes);
    for (int64_t i = 0; i < pixels; ++i)
      load_lanes(view<T>(p.h, 0, 0, p.channels, p.index[image * pixels + i], 1), to + i * lanes, lanes);
  });
}

// Rows [first - 1, first + rows] of the upsampled map into the inside of `up` [rows + 2, width + 2, lanes];
// zeros outside of the map. `wide` holds the rows of the source, already of full width.
static void upsample_band(const Accumulate& p, const float* wide, int64_t first, int64_t rows, int64_t lanes,
                          float* up) {
  const bool same = p.in_height == p.height && p.in_width == p.width;
  int64_t row = p.width * lanes, stride = row + 2 * lanes;
  for (int64_t i = 0; i < rows + 2; ++i) {
    float* to = up + i * stride;
    int64_t y = first - 1 + i;
    if (y < 0 || y >= p.height) {
      for (int64_t c = 0; c < stride; ++c) to[c] = 0.f;
      continue;
    }
    for (int64_t c = 0; c < lanes; ++c) to[c] = to[stride - lanes + c] = 0.f;
    if (same)
      __builtin_memcpy(to + lanes, wide + y * row, size_t(row) * sizeof(float));
    else
      weighted_sum(bicubic_taps(y, p.in_height, p.height), wide, row, to + lanes, row);
  }
}

int64_t accumulate_scratch(const Accumulate& p, int64_t rows) {
  int64_t band = at_most(rows, p.height);
  int64_t pixels = p.in_height * (p.in_width + p.width) + (band + 2) * (p.width + 2) + band * p.width;
  return whole_panels(p.channels) * pixels;
}

void accumulate(const Accumulate& p, const float* filter, float* scratch, int64_t begin, int64_t end) {
  int64_t lanes = whole_panels(p.channels), band = at_most(end - begin, p.height);
  const bool same = p.in_height == p.height && p.in_width == p.width;
  float *small = scratch, *wide = small + p.in_height * p.in_width * lanes;
  float *up = wide + p.in_height * p.width * lanes, *u = up + (band + 2) * (p.width + 2) * lanes;
  while (begin < end) {
    int64_t image = begin / p.height, first = begin % p.height;
    int64_t rows = at_most(p.height - first, end - begin);
    int64_t pixel = first * p.width, pixels = rows * p.width;
    load_source(p, image, small, lanes);
    if (!same) widen_rows(small, p.in_height, p.in_width, p.width, lanes, wide);
    upsample_band(p, same ? small : wide, first, rows, lanes, up);
    convolve(up, rows, p.width, lanes, filter, u);
    with_dtype(p.sum.dtype, [&](auto t) {
      using T = decltype(t);
      store_lanes<Store::add>(u, lanes, view<T>(p.sum, image, 0, p.channels, pixel, pixels));
      if (p.residual.data)
        store_lanes<Store::subtract>(u, lanes, view<T>(p.residual, image, 0, p.channels, pixel, pixels));
    });
    begin += rows;
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
