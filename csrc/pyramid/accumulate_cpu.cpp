// See contract.h. The convolution is a product of pixels in lanes and a packed filter.
#include "core/gemm_tile.h"
#include "pyramid/lanes.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE int64_t whole_panels(int64_t channels) {
  return (channels + PANEL - 1) / PANEL * PANEL;
}

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
  const int64_t* index = p.index + (p.index ? image * pixels : 0);
  if (p.sign != 0.f) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t c = 0; c < lanes; ++c)
        to[i * lanes + c] = c >= p.channels ? 0.f : uint64_t(index[i]) >> c & 1 ? p.sign : -p.sign;
    return;
  }
  with_dtype(p.h.dtype, [&](auto t) {
    using T = const decltype(t);
    if (p.index == nullptr) return load_lanes(view<T>(p.h, image, 0, p.channels, 0, pixels), to, lanes);
    for (int64_t i = 0; i < pixels; ++i)
      load_lanes(view<T>(p.h, 0, 0, p.channels, index[i], 1), to + i * lanes, lanes);
  });
}

// Row y of the upsampled map.
static void upsample_row(const Accumulate& p, const Bands& rows, const Bands& columns, const float* source,
                         int64_t y, int64_t lanes, float* row, float* to) {
  if (p.in_height == p.height && p.in_width == p.width)
    __builtin_memcpy(to, source + y * p.width * lanes, size_t(p.width * lanes) * sizeof(float));
  else
    resample_row(rows, columns, y, source, 0, p.in_width, lanes, lanes, row, to, p.width, lanes);
}

static void zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.f;
}

// u in lanes, for rows [first, first + count) of one image.
static void added_rows(const Accumulate& p, const Bands& rows, const Bands& columns, const float* filter,
                       const float* source, int64_t first, int64_t count, int64_t lanes, float* row,
                       float* up, float* u) {
  if (p.weight == nullptr) {
    for (int64_t y = 0; y < count; ++y)
      upsample_row(p, rows, columns, source, first + y, lanes, row, u + y * p.width * lanes);
    return;
  }
  int64_t stride = (p.width + 2) * lanes;  // of `up` [count + 2, width + 2, lanes]: zeros around the map
  for (int64_t i = 0; i < count + 2; ++i) {
    float* to = up + i * stride;
    int64_t y = first - 1 + i;
    if (y < 0 || y >= p.height) {
      zero(to, stride);
      continue;
    }
    zero(to, lanes);
    zero(to + stride - lanes, lanes);
    upsample_row(p, rows, columns, source, y, lanes, row, to + lanes);
  }
  convolve(up, count, p.width, lanes, filter, u);
}

static int64_t lanes_of(const Accumulate& p) {
  return p.weight ? whole_panels(p.channels) : (p.channels + W - 1) / W * W;
}

static Axis row_axis(const Accumulate& p) {
  return {p.up, false, int(p.in_height), int(p.height)};
}
static Axis column_axis(const Accumulate& p) {
  return {p.up, false, int(p.in_width), int(p.width)};
}

int64_t accumulate_scratch(const Accumulate& p, int64_t rows) {
  int64_t band = at_most(rows, p.height), border = p.weight ? (band + 2) * (p.width + 2) : 0;
  int64_t pixels = (p.in_height + 1) * p.in_width + border + band * p.width;
  return lanes_of(p) * pixels + bands_floats(row_axis(p)) + bands_floats(column_axis(p));
}

void accumulate(const Accumulate& p, const float* filter, float* scratch, int64_t begin, int64_t end) {
  int64_t lanes = lanes_of(p), band = at_most(end - begin, p.height);
  float *source = scratch, *row = source + p.in_height * p.in_width * lanes;
  float *u = row + p.in_width * lanes, *up = u + band * p.width * lanes;
  float* tables = up + (p.weight ? (band + 2) * (p.width + 2) * lanes : 0);
  Bands row_bands = make_bands(row_axis(p), tables);
  Bands column_bands = make_bands(column_axis(p), tables + bands_floats(row_axis(p)));
  while (begin < end) {
    int64_t image = begin / p.height, first = begin % p.height;
    int64_t count = at_most(p.height - first, end - begin);
    int64_t pixel = first * p.width, pixels = count * p.width;
    load_source(p, image, source, lanes);
    added_rows(p, row_bands, column_bands, filter, source, first, count, lanes, row, up, u);
    with_dtype(p.sum.dtype, [&](auto t) {
      using T = decltype(t);
      store_lanes<Store::add>(u, lanes, view<T>(p.sum, image, 0, p.channels, pixel, pixels));
      if (p.residual.data)
        store_lanes<Store::subtract>(u, lanes, view<T>(p.residual, image, 0, p.channels, pixel, pixels));
    });
    begin += count;
  }
}

void sign_bits(const float* x, int64_t channels, int64_t* index, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* row = x + i * channels;
    uint64_t bits = 0;
    int64_t c = 0;
    for (; c + W <= channels; c += W) bits |= uint64_t(lane_bits(F32::load(row + c) > F32(0.f))) << c;
    for (; c < channels; ++c) bits |= uint64_t(row[c] > 0.f) << c;
    index[i] = int64_t(bits);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
