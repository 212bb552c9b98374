// See contract.h. Where channels lie side by side, rows are summed as they lie; planes too where an output
// vector gathers few terms from near, else they go through lanes. W channels of planes at a time. The work is
// split into bands of output rows, so that what a band needs stays in cache.
#include "pyramid/planes.h"

namespace arimg {
namespace ARIMG_SIMD {

template <int N>
struct Number {
  static constexpr int value = N;
};

static ARIMG_INLINE bool same_size(const Resample& p) {
  return p.in_height == p.out_height && p.in_width == p.out_width;
}

// Narrow maps would leave most lanes of the planes empty.
static ARIMG_INLINE bool in_planes(const Resample& p) {
  return p.in.pixel == 1 && p.out.pixel == 1 && !same_size(p) && p.in_width + p.out_width >= W &&
         can_gather(column_axis(p));
}

static ARIMG_INLINE bool in_rows(const Resample& p) {
  return !in_planes(p) && p.in.channel == 1 && p.out.channel == 1 && p.in.dtype == p.out.dtype;
}

// A group of channels and the bands of output rows that an image is split into.
struct Pieces {
  int64_t lanes, groups, band, bands, source_rows;

  explicit Pieces(const Resample& p) {
    lanes = in_rows(p) ? p.channels : W;
    groups = in_rows(p) ? 1 : (p.channels + W - 1) / W;
    constexpr int64_t budget = 32768;  // floats, a part of a second-level cache
    int64_t row = lanes * (p.out_width + p.in_width * p.in_height / p.out_height + 1);
    band = at_most(1 + budget / row, p.out_height);
    bands = (p.out_height + band - 1) / band;
    // Rows that a band reads: those of its first target, and the steps of the others.
    int64_t reach = most_taps(row_axis(p)) + 2 + (band * p.in_height + p.out_height - 1) / p.out_height;
    source_rows = at_most(reach, p.in_height);
  }
};

int64_t resample_items(const Resample& p) {
  Pieces pieces(p);
  return p.images * pieces.groups * pieces.bands;
}

int64_t resample_scratch(const Resample& p) {
  Pieces pieces(p);
  int64_t tables = bands_floats(row_axis(p)) + bands_floats(column_axis(p));
  int64_t map = in_rows(p) ? 0 : pieces.source_rows * p.in_width + pieces.band * p.out_width;
  if (in_planes(p)) {
    tables += gathers_floats(column_axis(p)) + 3 * W;
    map += pieces.band * summed_width(p.in_width);
  }
  return tables + pieces.lanes * (p.in_width + map);
}

// V vectors of channels of the mean of a box of rows and columns; rows are summed before columns, as
// elsewhere.
template <int V, typename T, typename Load, typename Store>
static ARIMG_INLINE void box_sum(const float* down, Span y, const float* across, Span x, const T* in,
                                 int64_t row, int64_t pixel, Load&& load, Store&& store) {
  F32 sum[V];
  for (int v = 0; v < V; ++v) sum[v] = F32(0.f);
  for (int j = 0; j < x.end - x.begin; ++j) {
    F32 column[V], factor(across[j]);
    for (int v = 0; v < V; ++v) column[v] = F32(0.f);
    for (int i = 0; i < y.end - y.begin; ++i) {
      const T* from = in + i * row + j * pixel;
      for (int v = 0; v < V; ++v) {
        F32 value = load(from + v * W);
        column[v] = i == 0 ? F32(down[i]) * value : mul_add(F32(down[i]), value, column[v]);
      }
    }
    for (int v = 0; v < V; ++v) sum[v] = j == 0 ? factor * column[v] : mul_add(factor, column[v], sum[v]);
  }
  for (int v = 0; v < V; ++v) store(v, sum[v]);
}

// Boxes of rows of channels hardly overlap: each output pixel sums its own, in one pass over the input.
template <typename T>
static void area_rows(const Resample& p, const Bands& rows, const Bands& columns, int64_t y, const T* in,
                      T* out) {
  const int64_t pixel = p.in.pixel, row = p.in_width * pixel;
  Span down = rows.span[y];
  for (int64_t x = 0; x < p.out_width; ++x) {
    Span across = columns.span[x];
    const T* from = in + down.begin * row + across.begin * pixel;
    T* to = out + x * p.out.pixel;
    auto box = [&](auto v, int64_t c, auto&& load, auto&& store) {
      box_sum<decltype(v)::value>(rows.weight + y * rows.taps, down, columns.weight + x * columns.taps,
                                  across, from + c, row, pixel, load, store);
    };
    auto whole = [](const T* at) { return F32::load(at); };
    int64_t c = 0;
    for (; c + 4 * W <= p.channels; c += 4 * W)
      box(Number<4>{}, c, whole, [&](int v, F32 sum) { sum.store(to + c + v * W); });
    for (; c + W <= p.channels; c += W) box(Number<1>{}, c, whole, [&](int, F32 sum) { sum.store(to + c); });
    if (c == p.channels) continue;
    const int rest = int(p.channels - c);
    box(
        Number<1>{}, c, [&](const T* at) { return F32::load_partial(at, rest); },
        [&](int, F32 sum) { sum.store_partial(to + c, rest); });
  }
}

// Rows [first, end) of the output of one image, maps in rows of channels.
static void resample_rows(const Resample& p, const Bands& rows, const Bands& columns, int64_t image,
                          int64_t first, int64_t end, float* row) {
  with_dtype(p.in.dtype, [&](auto t) {
    using T = decltype(t);
    const T* in = (const T*)p.in.data + image * p.in.batch;
    T* out = (T*)p.out.data + image * p.out.batch;
    const bool boxes = p.mode == Resampling::area && !p.transposed;
    for (int64_t y = first; y < end; ++y) {
      T* to = out + y * p.out_width * p.out.pixel;
      if (boxes)
        area_rows(p, rows, columns, y, in, to);
      else
        resample_row(rows, columns, y, in, 0, p.in_width, p.in.pixel, p.channels, row, to, p.out_width,
                     p.out.pixel);
    }
  });
}

// The source rows that a band reads, [begin, stop); spans may be empty.
static Span source_rows(const Resample& p, const Bands& rows, int64_t first, int64_t end) {
  Span all{int(p.in_height), 0};
  for (int64_t y = first; y < end; ++y) {
    Span s = rows.span[y];
    if (s.begin == s.end) continue;
    all.begin = s.begin < all.begin ? s.begin : all.begin;
    all.end = s.end > all.end ? s.end : all.end;
  }
  return all.begin < all.end ? all : Span{0, 0};
}

// Rows [first, end) for W channels from `channel` on, in any layout and through lanes.
static void resample_lanes(const Resample& p, const Bands& rows, const Bands& columns, int64_t image,
                           int64_t channel, int64_t first, int64_t end, float* scratch,
                           const Pieces& pieces) {
  const bool same = same_size(p);
  int64_t channels = at_most(p.channels - channel, W);
  Span span = source_rows(p, rows, first, end);
  float *in = scratch, *out = in + pieces.source_rows * p.in_width * W;
  float* row = out + pieces.band * p.out_width * W;
  if (span.begin < span.end)
    with_dtype(p.in.dtype, [&](auto t) {
      load_lanes(view<const decltype(t)>(p.in, image, channel, channels, span.begin * p.in_width,
                                         (span.end - span.begin) * p.in_width),
                 in, W);
    });
  if (!same)
    for (int64_t y = first; y < end; ++y)
      resample_row(rows, columns, y, in, span.begin, p.in_width, W, W, row,
                   out + (y - first) * p.out_width * W, p.out_width, W);
  with_dtype(p.out.dtype, [&](auto t) {
    auto to =
        view<decltype(t)>(p.out, image, channel, channels, first * p.out_width, (end - first) * p.out_width);
    store_lanes<Store::set>(same ? in : out, W, to);
  });
}

static float* aligned(float* p) {  // to a vector
  return (float*)(((uintptr_t)p + 4 * W - 1) / (4 * W) * (4 * W));
}

template <typename T>
static void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) F32::load(from + i).store(to + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// The same for W planes as they lie. fp32 is read in place, other types are converted first.
static void resample_plane_group(const Resample& p, const Bands& rows, const Gather* gathers, int64_t image,
                                 int64_t channel, int64_t first, int64_t end, float* scratch,
                                 const Pieces& pieces) {
  int64_t channels = at_most(p.channels - channel, W);
  Span span = source_rows(p, rows, first, end);
  const int64_t in_width = p.in_width, size = (span.end - span.begin) * in_width;
  Planes<const float> from{nullptr, p.in.channel, channels, in_width};
  float* summed = aligned(scratch + pieces.source_rows * in_width * W);
  if (p.in.dtype == DType::f32) {
    from.data = (const float*)p.in.data + image * p.in.batch + channel * p.in.channel + span.begin * in_width;
  } else {
    with_dtype(p.in.dtype, [&](auto t) {
      auto source = view<const decltype(t)>(p.in, image, channel, channels, span.begin * in_width, size);
      for (int64_t c = 0; c < channels; ++c)
        widen(source.data + c * source.channel, size, scratch + c * size);
    });
    from.data = scratch;
    from.plane = size > 0 ? size : 1;
  }
  with_dtype(p.out.dtype, [&](auto t) {
    using T = decltype(t);
    auto to = view<T>(p.out, image, channel, channels, first * p.out_width, 0);
    resample_planes(rows, gathers, span.begin, first, end - first, from, summed,
                    Planes<T>{to.data, to.channel, channels, p.out_width});
  });
}

void resample(const Resample& p, float* scratch, int64_t begin, int64_t end) {
  Pieces pieces(p);
  Axis row_bands = row_axis(p), column_bands = column_axis(p);
  Bands rows = make_bands(row_bands, scratch);
  Bands columns = make_bands(column_bands, scratch + bands_floats(row_bands));
  float* free = scratch + bands_floats(row_bands) + bands_floats(column_bands);
  const bool planes = in_planes(p);
  Gather* gathers = (Gather*)free;
  if (planes) {
    make_gathers(column_bands, columns, gathers);
    free += gathers_floats(column_bands);
  }
  for (int64_t item = begin; item < end; ++item) {
    int64_t image = item / (pieces.groups * pieces.bands), group = item / pieces.bands % pieces.groups;
    int64_t first = item % pieces.bands * pieces.band, last = at_most(first + pieces.band, p.out_height);
    if (planes)
      resample_plane_group(p, rows, gathers, image, group * W, first, last, free, pieces);
    else if (in_rows(p))
      resample_rows(p, rows, columns, image, first, last, free);
    else
      resample_lanes(p, rows, columns, image, group * W, first, last, free, pieces);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
