// Resampling of planes as they lie. Rows are summed by whole vectors; an output vector of the columns gathers
// its terms from two neighbouring vectors of the summed row by permutations. For *_cpu.cpp files.
//
// Against turning planes into lanes and back (lanes.h): no transposed squares, but a permutation for each
// term, so this is for few terms whose sources lie near: upsampling, and down to about half.
#pragma once

#include "pyramid/lanes.h"

namespace arimg {
namespace ARIMG_SIMD {

constexpr int MOST_TERMS = 12;
constexpr int ZERO_LANE = 2 * W - 1;  // of the two vectors: what a lane with fewer terms gathers

// The columns of W outputs: lane i sums weight[k][i] * row[begin + index[k][i]].
struct Gather {
  int32_t begin, terms, two;  // two: the second vector holds sources
  int32_t index[MOST_TERMS][W];
  float weight[MOST_TERMS][W];
};

// Whether an axis is short of terms and narrow enough; never without fast permutations.
static inline bool can_gather(const Axis& a) {
  int64_t window = (W * int64_t(a.sources) + a.targets - 1) / a.targets + most_taps(a) + 1;
  return W >= 8 && most_taps(a) <= MOST_TERMS && at_most(window, a.sources) < ZERO_LANE;
}

static inline int64_t gathers_of(const Axis& a) {
  return (a.targets + W - 1) / W;
}
static inline int64_t gathers_floats(const Axis& a) {
  return gathers_of(a) * int64_t(sizeof(Gather) / sizeof(float));
}

static void make_gathers(const Axis& a, const Bands& columns, Gather* gathers) {
  for (int64_t g = 0; g < gathers_of(a); ++g) {
    Gather& to = gathers[g];
    int64_t first = g * W, count = at_most(a.targets - first, W);
    int begin = a.sources, end = 0;
    to.terms = 0;
    for (int64_t i = 0; i < count; ++i) {
      Span s = columns.span[first + i];
      if (s.begin == s.end) continue;
      begin = s.begin < begin ? s.begin : begin;
      end = s.end > end ? s.end : end;
      to.terms = s.end - s.begin > to.terms ? s.end - s.begin : to.terms;
    }
    if (to.terms > 4) to.terms += to.terms % 2;  // of weight 0: there is code for even numbers
    to.begin = to.terms == 0 ? 0 : begin;
    to.two = end - begin > W;
    for (int k = 0; k < to.terms; ++k)
      for (int64_t i = 0; i < W; ++i) {
        Span s = i < count ? columns.span[first + i] : Span{0, 0};
        const bool used = k < s.end - s.begin;
        to.index[k][i] = used ? s.begin + k - begin : ZERO_LANE;
        to.weight[k][i] = used ? columns.weight[(first + i) * columns.taps + k] : 0.f;
      }
  }
}

// Planes that lie `plane` apart, with rows side by side.
template <typename T>
struct Planes {
  T* data;
  int64_t plane, count, width;
};

// One row of all planes: `from` is at the first source row of its span, `to` has whole vectors. All but the
// last planes are read by whole vectors too, into the next plane, which is quicker than masked loads.
template <int N>
static void sum_plane_rows(const float* weight, int count, Planes<const float> from, Planes<float> to) {
  const int64_t width = from.width, whole = from.count - 1 - (W - 1) / from.plane;
  F32 w[N > 0 ? N : 1];
  for (int k = 0; k < N; ++k) w[k] = F32(weight[k]);
  auto term = [&](int k, F32 x, F32 sum) {
    F32 factor = N > 0 ? w[k] : F32(weight[k]);
    return k == 0 ? factor * x : mul_add(factor, x, sum);
  };
  const int terms = N > 0 ? N : count;
  for (int64_t c = 0; c < from.count; ++c) {
    const float* plane = from.data + c * from.plane;
    float* row = to.data + c * to.plane;
    for (int64_t i = 0; i < width; i += W) {
      F32 sum(0.f);
      if (c < whole || i + W <= width)
#pragma GCC unroll 8
        for (int k = 0; k < terms; ++k) sum = term(k, F32::load(plane + k * width + i), sum);
      else
        for (int k = 0; k < terms; ++k)
          sum = term(k, F32::load_partial(plane + k * width + i, int(width - i)), sum);
      sum.store(row + i);
    }
  }
}

static void sum_plane_rows(const float* weight, int count, Planes<const float> from, Planes<float> to) {
  switch (count) {
    case 1:
      return sum_plane_rows<1>(weight, count, from, to);
    case 2:
      return sum_plane_rows<2>(weight, count, from, to);
    case 3:
      return sum_plane_rows<3>(weight, count, from, to);
    case 4:
      return sum_plane_rows<4>(weight, count, from, to);
    case 5:
      return sum_plane_rows<5>(weight, count, from, to);
    case 6:
      return sum_plane_rows<6>(weight, count, from, to);
    case 7:
      return sum_plane_rows<7>(weight, count, from, to);
    default:
      return sum_plane_rows<0>(weight, count, from, to);
  }
}

// The columns of one gather in `rows` rows of all planes. N > 0: as many terms, in registers.
template <int N, bool TWO, typename T>
static void sum_plane_columns(const Gather& g, int64_t first, int64_t rows, Planes<const float> from,
                              Planes<T> to) {
  const int terms = N > 0 ? N : g.terms;
  I32 index[N > 0 ? N : 1];
  F32 weight[N > 0 ? N : 1];
  for (int k = 0; k < N; ++k) index[k] = I32::load(g.index[k]), weight[k] = F32::load(g.weight[k]);
  auto index_of = [&](int k) { return N > 0 ? index[k] : I32::load(g.index[k]); };
  auto weight_of = [&](int k) { return N > 0 ? weight[k] : F32::load(g.weight[k]); };
  const F32 not_last = float_from_bits(select(lane_index() < I32(W - 1), I32(-1), I32(0)));
  const int lanes = int(at_most(to.width - first, W));
  for (int64_t c = 0; c < from.count; ++c) {
    const float* row = from.data + c * from.plane + g.begin;
    T* out = to.data + c * to.plane + first;
    for (int64_t y = 0; y < rows; ++y, row += from.width, out += to.width) {
      F32 a = F32::load(row), b(0.f), sum(0.f);
      if (TWO) b = float_from_bits(bits(F32::load(row + W)) & bits(not_last));
#pragma GCC unroll 8
      for (int k = 0; k < terms; ++k) {
        F32 term = pick(a, b, index_of(k));
        sum = k == 0 ? weight_of(k) * term : mul_add(weight_of(k), term, sum);
      }
      if (lanes == W)
        sum.store(out);
      else
        sum.store_partial(out, lanes);
    }
  }
}

template <int N, typename T>
static void sum_plane_columns(const Gather& g, int64_t first, int64_t rows, Planes<const float> from,
                              Planes<T> to) {
  if (g.two)
    sum_plane_columns<N, true>(g, first, rows, from, to);
  else
    sum_plane_columns<N, false>(g, first, rows, from, to);
}

template <typename T>
static void sum_plane_columns(const Gather& g, int64_t first, int64_t rows, Planes<const float> from,
                              Planes<T> to) {
  switch (g.terms) {
    case 2:
      return sum_plane_columns<2>(g, first, rows, from, to);
    case 3:
      return sum_plane_columns<3>(g, first, rows, from, to);
    case 4:
      return sum_plane_columns<4>(g, first, rows, from, to);
    case 6:
      return sum_plane_columns<6>(g, first, rows, from, to);
    case 8:
      return sum_plane_columns<8>(g, first, rows, from, to);
    default:
      return sum_plane_columns<0>(g, first, rows, from, to);
  }
}

// Floats between rows that are sums of source rows.
static inline int64_t summed_width(int64_t in_width) {
  return (in_width + W - 1) / W * W;
}

// Rows [first, first + count) of the output of some planes. `from` begins at source row `begin`; `summed` has
// space for count rows of all planes and two vectors more, which are read but not used.
template <typename T>
static void resample_planes(const Bands& rows, const Gather* gathers, int64_t begin, int64_t first,
                            int64_t count, Planes<const float> from, float* summed, Planes<T> to) {
  const int64_t stride = summed_width(from.width);
  Planes<float> sums{summed, count * stride, from.count, stride};
  for (int64_t y = 0; y < count; ++y) {
    Span s = rows.span[first + y];
    Planes<const float> source = from;
    if (s.begin < s.end) source.data += (s.begin - begin) * from.width;
    Planes<float> row = sums;
    row.data += y * stride;
    sum_plane_rows(rows.weight + (first + y) * rows.taps, s.end - s.begin, source, row);
  }
  Planes<const float> from_sums{summed, sums.plane, sums.count, sums.width};
  for (int64_t g = 0; g * W < to.width; ++g) sum_plane_columns(gathers[g], g * W, count, from_sums, to);
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
