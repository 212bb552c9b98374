// See contract.h. Where channels lie side by side, rows are summed as they lie; planes go through lanes, W
// channels at a time. The work is split into bands of output rows, so that what a band needs stays in cache.
#include "pyramid/lanes.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE bool in_rows(const Resample& p) {
  return p.in.channel == 1 && p.out.channel == 1 && p.in.dtype == p.out.dtype;
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
  return tables + pieces.lanes * (p.in_width + map);
}

// Rows [first, end) of the output of one image, maps in rows of channels.
static void resample_rows(const Resample& p, const Bands& rows, const Bands& columns, int64_t image,
                          int64_t first, int64_t end, float* row) {
  with_dtype(p.in.dtype, [&](auto t) {
    using T = decltype(t);
    const T* in = (const T*)p.in.data + image * p.in.batch;
    T* out = (T*)p.out.data + image * p.out.batch;
    for (int64_t y = first; y < end; ++y)
      resample_row(rows, columns, y, in, 0, p.in_width, p.in.pixel, p.channels, row,
                   out + y * p.out_width * p.out.pixel, p.out_width, p.out.pixel);
  });
}

// The same for W channels from `channel` on, in any layout and through lanes.
static void resample_lanes(const Resample& p, const Bands& rows, const Bands& columns, int64_t image,
                           int64_t channel, int64_t first, int64_t end, float* scratch,
                           const Pieces& pieces) {
  const bool same = p.in_height == p.out_height && p.in_width == p.out_width;
  int64_t channels = at_most(p.channels - channel, W);
  int64_t begin = p.in_height, stop = 0;  // the source rows of the band; spans may be empty
  for (int64_t y = first; y < end; ++y) {
    Span s = rows.span[y];
    if (s.begin == s.end) continue;
    begin = at_most(s.begin, begin);
    stop = s.end > stop ? s.end : stop;
  }
  float *in = scratch, *out = in + pieces.source_rows * p.in_width * W;
  float* row = out + pieces.band * p.out_width * W;
  if (begin < stop)
    with_dtype(p.in.dtype, [&](auto t) {
      load_lanes(view<const decltype(t)>(p.in, image, channel, channels, begin * p.in_width,
                                         (stop - begin) * p.in_width),
                 in, W);
    });
  if (!same)
    for (int64_t y = first; y < end; ++y)
      resample_row(rows, columns, y, in, begin, p.in_width, W, W, row, out + (y - first) * p.out_width * W,
                   p.out_width, W);
  with_dtype(p.out.dtype, [&](auto t) {
    auto to =
        view<decltype(t)>(p.out, image, channel, channels, first * p.out_width, (end - first) * p.out_width);
    store_lanes<Store::set>(same ? in : out, W, to);
  });
}

void resample(const Resample& p, float* scratch, int64_t begin, int64_t end) {
  Pieces pieces(p);
  Axis row_bands = row_axis(p), column_bands = column_axis(p);
  Bands rows = make_bands(row_bands, scratch);
  Bands columns = make_bands(column_bands, scratch + bands_floats(row_bands));
  float* free = scratch + bands_floats(row_bands) + bands_floats(column_bands);
  for (int64_t item = begin; item < end; ++item) {
    int64_t image = item / (pieces.groups * pieces.bands), group = item / pieces.bands % pieces.groups;
    int64_t first = item % pieces.bands * pieces.band, last = at_most(first + pieces.band, p.out_height);
    if (in_rows(p))
      resample_rows(p, rows, columns, image, first, last, free);
    else
      resample_lanes(p, rows, columns, image, group * W, first, last, free, pieces);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
