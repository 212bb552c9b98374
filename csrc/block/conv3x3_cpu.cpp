// See conv3x3.h.
#include "block/conv3x3.h"

#include "core/exp.h"
#include "core/gemm_tile.h"
#include "core/lanes.h"
#include "core/transpose.h"

namespace arimg {
namespace ARIMG_SIMD {
namespace {

constexpr int OUT = 4, IN = 6, POINTS = IN * IN;  // a tile's outputs and inputs per side, and its products
constexpr int64_t CHUNK_FLOATS = 1 << 20;         // of transformed tiles, about
constexpr int64_t GROUP = 4 * TILE_ROWS;          // tiles that share a pass over the filters of a panel

static ARIMG_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
// Floats between the planes of the 36 points: an odd number of cache lines, so that they do not share a set.
static ARIMG_INLINE int64_t plane(int64_t floats) {
  return (ceil_div(floats, 16) | 1) * 16;
}

// Sizes and places in the scratch.
struct Plan {
  int64_t tile_columns, tile_rows, chunks, chunk_rows;  // chunk_rows: tile rows of one chunk
  int64_t channels;                                     // padded to whole vectors
  int64_t pixel_columns;                                // of the activated pixels, with their border
  int64_t tiles_plane, filter_plane, product_plane;
  int64_t pixels, tiles, filters, taps, products, floats;

  explicit Plan(const Conv3x3& p) {
    tile_columns = ceil_div(p.width, OUT);
    tile_rows = ceil_div(p.height, OUT);
    channels = ceil_div(p.channels, W) * W;
    chunks = at_most(1 + tile_rows * tile_columns * channels * POINTS / CHUNK_FLOATS, tile_rows);
    chunk_rows = ceil_div(tile_rows, chunks);
    chunks = ceil_div(tile_rows, chunk_rows);
    pixel_columns = tile_columns * OUT + 2;
    tiles_plane = plane(chunk_rows * tile_columns * channels);
    filter_plane = plane(p.channels * PANEL);
    product_plane = plane(GROUP * PANEL);
    pixels = 0;
    tiles = pixels + plane((chunk_rows * OUT + 2) * pixel_columns * channels);
    filters = tiles + POINTS * tiles_plane;
    taps = filters + POINTS * filter_plane;
    products = taps + plane(9 * W * PANEL);
    floats = products + POINTS * product_plane;
  }
};

// --- activated pixels ---------------------------------------------------------------------------------

template <typename T>
static void activate_pixel(const T* x, const float* scale, const float* shift, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; c += W) {
    int64_t n = channels - c;
    F32 value = load_lanes(x + c, n);
    if (scale != nullptr) value = silu(mul_add(value, load_lanes(scale + c, n), load_lanes(shift + c, n)));
    if (n < W) value = select(lane_index() < I32(int32_t(n)), value, F32(0.f));
    value.store(to + c);
  }
}

static void clear(float* to, int64_t floats) {
  for (int64_t i = 0; i < floats; i += W) F32(0.f).store(to + i);
}

// Rows [first, first + rows) of the input, from column -1; zero outside the image.
template <typename T>
static void activate(const Conv3x3& p, const Plan& plan, int64_t image, int64_t first, int64_t rows,
                     float* to) {
  const int64_t source_columns = p.width / p.up, source_rows = p.height / p.up;
  const T* x = (const T*)p.x + image * source_rows * source_columns * p.channels;
  const float* scale = p.scale == nullptr ? nullptr : p.scale + image * p.channels;
  const float* shift = p.scale == nullptr ? nullptr : p.shift + image * p.channels;
  for (int64_t row = first; row < first + rows; ++row) {
    if (row < 0 || row >= p.height) {
      clear(to, plan.pixel_columns * plan.channels);
      to += plan.pixel_columns * plan.channels;
      continue;
    }
    for (int64_t column = -1; column < plan.pixel_columns - 1; ++column, to += plan.channels) {
      if (column < 0 || column >= p.width)
        clear(to, plan.channels);
      else
        activate_pixel(x + (row / p.up * source_columns + column / p.up) * p.channels, scale, shift,
                       p.channels, to);
    }
  }
}

// --- the three transforms -----------------------------------------------------------------------------

static ARIMG_INLINE void transform_input(const F32 (&d)[IN], F32 (&t)[IN]) {
  const F32 four(4.f), five(5.f), two(2.f);
  F32 even = d[4] - four * d[2], odd = d[3] - four * d[1];
  F32 even2 = d[4] - d[2], odd2 = two * (d[3] - d[1]);
  t[0] = mul_add(four, d[0], d[4]) - five * d[2];
  t[1] = even + odd;
  t[2] = even - odd;
  t[3] = even2 + odd2;
  t[4] = even2 - odd2;
  t[5] = mul_add(four, d[1], d[5]) - five * d[3];
}

static ARIMG_INLINE void transform_filter(const F32 (&g)[3], F32 (&t)[IN]) {
  F32 ends = (g[0] + g[2]) * F32(-1.f / 6), wide = mul_add(g[0], F32(1.f / 24), g[2] * F32(1.f / 6));
  t[0] = g[0] * F32(0.25f);
  t[1] = ends - g[1] * F32(1.f / 6);
  t[2] = ends + g[1] * F32(1.f / 6);
  t[3] = wide + g[1] * F32(1.f / 12);
  t[4] = wide - g[1] * F32(1.f / 12);
  t[5] = g[2];
}

static ARIMG_INLINE void transform_output(const F32 (&m)[IN], F32 (&y)[OUT]) {
  F32 s1 = m[1] + m[2], s2 = m[3] + m[4], d1 = m[1] - m[2], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = mul_add(F32(2.f), d2, d1);
  y[2] = mul_add(F32(4.f), s2, s1);
  y[3] = mul_add(F32(8.f), d2, d1) + m[5];
}

// to[point][channels] from the tile whose first pixel is at `from`.
static ARIMG_INLINE void transform_tile(const Plan& plan, const float* from, float* to) {
  for (int64_t c = 0; c < plan.channels; c += W) {
    F32 rows[IN][IN];
    for (int i = 0; i < IN; ++i) {
      F32 d[IN];
      for (int j = 0; j < IN; ++j) d[j] = F32::load(from + (i * plan.pixel_columns + j) * plan.channels + c);
      transform_input(d, rows[i]);
    }
    for (int j = 0; j < IN; ++j) {
      F32 d[IN], t[IN];
      for (int i = 0; i < IN; ++i) d[i] = rows[i][j];
      transform_input(d, t);
      for (int i = 0; i < IN; ++i) t[i].store(to + (i * IN + j) * plan.tiles_plane + c);
    }
  }
}

// The filters of outputs [first, first + PANEL): to[point][channel][PANEL].
template <typename T>
static void transform_filters(const Conv3x3& p, const Plan& plan, int64_t first, float* taps, float* to) {
  const int64_t outputs = at_most(p.outputs - first, PANEL), row = p.channels * 9;
  const T* weight = (const T*)p.weight + first * row;
  if (outputs < PANEL) clear(taps, 9 * W * PANEL);
  for (int64_t c = 0; c < p.channels; c += W) {
    const int64_t n = at_most(p.channels - c, W);
    transposed_copy(weight + c * 9, row, outputs, n * 9, taps, PANEL);
    for (int64_t i = 0; i < n; ++i) {
      for (int half = 0; half < PANEL; half += W) {
        F32 rows[3][IN];
        for (int a = 0; a < 3; ++a) {
          F32 g[3];
          for (int b = 0; b < 3; ++b) g[b] = F32::load(taps + (i * 9 + a * 3 + b) * PANEL + half);
          transform_filter(g, rows[a]);
        }
        for (int j = 0; j < IN; ++j) {
          F32 g[3] = {rows[0][j], rows[1][j], rows[2][j]}, t[IN];
          transform_filter(g, t);
          for (int a = 0; a < IN; ++a)
            t[a].store(to + (a * IN + j) * plan.filter_plane + (c + i) * PANEL + half);
        }
      }
    }
  }
}

// --- products and outputs -----------------------------------------------------------------------------

// R tiles times a panel of filters, at one point.
template <int R>
static void multiply_rows(const float* tiles, int64_t stride, const float* filters, int64_t channels,
                          float* to) {
  Tile<R> tile;
  tile.start(F32(0.f), F32(0.f));
  tile.multiply(tiles, stride, filters, channels);
  for (int r = 0; r < R; ++r) {
    tile.sum[r][0].store(to + r * PANEL);
    tile.sum[r][1].store(to + r * PANEL + W);
  }
}

template <int R = TILE_ROWS>
static ARIMG_INLINE void multiply(int64_t rows, const float* tiles, int64_t stride, const float* filters,
                                  int64_t channels, float* to) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<R - 1>(rows, tiles, stride, filters, channels, to);
  }
  multiply_rows<R>(tiles, stride, filters, channels, to);
}

// The outputs of one tile, for W channels from `channel`.
template <typename T>
static ARIMG_INLINE void finish_tile(const Conv3x3& p, const Plan& plan, const float* products, F32 bias,
                                     int64_t image, int64_t tile, int64_t channel) {
  const int64_t top = tile / plan.tile_columns * OUT, left = tile % plan.tile_columns * OUT;
  const int64_t n = p.outputs - channel;
  F32 columns[OUT][IN], y[OUT];
  for (int j = 0; j < IN; ++j) {
    F32 m[IN];
    for (int i = 0; i < IN; ++i) m[i] = F32::load(products + (i * IN + j) * plan.product_plane);
    transform_output(m, y);
    for (int i = 0; i < OUT; ++i) columns[i][j] = y[i];
  }
  for (int i = 0; i < OUT && top + i < p.height; ++i) {
    transform_output(columns[i], y);
    int64_t at = ((image * p.height + top + i) * p.width + left) * p.outputs + channel;
    for (int j = 0; j < OUT && left + j < p.width; ++j, at += p.outputs) {
      F32 value = y[j] + bias;
      if (p.residual != nullptr) value = value + load_lanes((const T*)p.residual + at, n);
      store_lanes(value, (T*)p.out + at, n);
    }
  }
}

// Tiles [first, first + count) of a chunk that begins at tile `origin` of the image, for one panel.
template <typename T>
static void multiply_group(const Conv3x3& p, const Plan& plan, float* scratch, int64_t image, int64_t origin,
                           int64_t first, int64_t count, int64_t panel) {
  float* products = scratch + plan.products;
  const int64_t groups = ceil_div(count, TILE_ROWS), rows = ceil_div(count, groups);  // of equal size
  for (int point = 0; point < POINTS; ++point) {
    const float* tiles = scratch + plan.tiles + point * plan.tiles_plane + first * plan.channels;
    for (int64_t r = 0; r < count; r += rows)
      multiply(at_most(count - r, rows), tiles + r * plan.channels, plan.channels,
               scratch + plan.filters + point * plan.filter_plane, p.channels,
               products + point * plan.product_plane + r * PANEL);
  }
  for (int half = 0; half < PANEL; half += W) {
    const int64_t channel = panel * PANEL + half;
    if (channel >= p.outputs) break;
    F32 bias(0.f);
    if (p.bias != nullptr)
      with_dtype(p.weight_dtype, [&](auto t) {
        bias = load_lanes((const decltype(t)*)p.bias + channel, p.outputs - channel);
      });
    for (int64_t r = 0; r < count; ++r)
      finish_tile<T>(p, plan, products + r * PANEL + half, bias, image, origin + first + r, channel);
  }
}

template <typename T>
static void chunk(const Conv3x3& p, const Plan& plan, int64_t image, int64_t index, int64_t panel_begin,
                  int64_t panel_end, float* scratch) {
  const int64_t first_row = index * plan.chunk_rows;
  const int64_t tile_rows = at_most(plan.tile_rows - first_row, plan.chunk_rows);
  activate<T>(p, plan, image, first_row * OUT - 1, tile_rows * OUT + 2, scratch + plan.pixels);
  for (int64_t row = 0; row < tile_rows; ++row)
    for (int64_t column = 0; column < plan.tile_columns; ++column)
      transform_tile(plan,
                     scratch + plan.pixels + (row * OUT * plan.pixel_columns + column * OUT) * plan.channels,
                     scratch + plan.tiles + (row * plan.tile_columns + column) * plan.channels);
  const int64_t tiles = tile_rows * plan.tile_columns;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    with_dtype(p.weight_dtype, [&](auto t) {
      transform_filters<decltype(t)>(p, plan, panel * PANEL, scratch + plan.taps, scratch + plan.filters);
    });
    for (int64_t first = 0; first < tiles; first += GROUP)
      multiply_group<T>(p, plan, scratch, image, first_row * plan.tile_columns, first,
                        at_most(tiles - first, GROUP), panel);
  }
}

}  // namespace

int64_t conv3x3_chunks(const Conv3x3& p) {
  return Plan(p).chunks;
}

int64_t conv3x3_panels(const Conv3x3& p) {
  return ceil_div(p.outputs, PANEL);
}

int64_t conv3x3_scratch(const Conv3x3& p) {
  return Plan(p).floats;
}

void conv3x3(const Conv3x3& p, int64_t splits, int64_t unit, float* scratch) {
  Plan plan(p);
  const int64_t split = unit % splits, index = unit / splits % plan.chunks;
  const int64_t panels = conv3x3_panels(p);
  with_dtype(p.dtype, [&](auto t) {
    chunk<decltype(t)>(p, plan, unit / splits / plan.chunks, index, split * panels / splits,
                       (split + 1) * panels / splits, scratch);
  });
}

template <typename T>
static void moments(const ChannelMoments& p) {
  const T* x = (const T*)p.x;
  for (int64_t c = 0; c < p.channels; c += W) {
    const int64_t n = p.channels - c;
    F32 sum(0.f), squares(0.f);
    for (int64_t i = 0; i < p.pixels; ++i) sum = sum + load_lanes(x + i * p.channels + c, n);
    const F32 mean = sum / F32(float(p.pixels));
    for (int64_t i = 0; i < p.pixels; ++i) {
      F32 deviation = load_lanes(x + i * p.channels + c, n) - mean;
      squares = mul_add(deviation, deviation, squares);
    }
    store_lanes(mean, p.mean + c, n);
    store_lanes(squares, p.squares + c, n);
  }
}

void channel_moments(const ChannelMoments& p) {
  with_dtype(p.dtype, [&](auto t) { moments<decltype(t)>(p); });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
