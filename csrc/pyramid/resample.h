// One axis of a resampling is a banded matrix: every target position is a weighted sum of neighbouring source
// positions. The transposed matrix, which carries gradients back, is banded too. Both are found here from the
// sizes alone, the same on CPU and GPU; a map is resampled by its rows and then by its columns.
//
// Weights are PyTorch's with corners not aligned: `area` means over floor(i in / out) .. ceil((i + 1) in /
// out), `bilinear`, and `bicubic` with a = -0.75 (Keys 1981); taps beyond the border repeat the border pixel,
// so their weights add up there. Equal sizes are the identity.
#pragma once

#include "core/dtype.h"

namespace arimg {

enum class Resampling : int { area, bilinear, bicubic };

struct Axis {
  Resampling mode;
  bool transposed;
  int sources, targets;
};

struct Span {  // the source positions [begin, end) of a target
  int begin, end;
};

static ARIMG_HD float cubic_near(float t) {  // 0 <= t <= 1
  return (1.25f * t - 2.25f) * t * t + 1.f;
}
static ARIMG_HD float cubic_far(float t) {  // 1 <= t <= 2
  return ((-0.75f * t + 3.75f) * t - 6.f) * t + 3.f;
}

static ARIMG_HD int within(int position, int size) {
  return position < 0 ? 0 : position >= size ? size - 1 : position;
}

// Where an output position lies between the inputs `left` and `left + 1`.
struct Place {
  int left;
  float t;
};

static ARIMG_HD Place place_of(Resampling mode, int out, int in_size, int out_size) {
  float at = float(in_size) / float(out_size) * (float(out) + 0.5f) - 0.5f;
  if (mode == Resampling::bilinear && at < 0.f) at = 0.f;
  int left = int(at);
  if (float(left) > at) --left;  // floor
  return {left, at - float(left)};
}

static ARIMG_HD Span forward_span(Resampling mode, int out, int in_size, int out_size) {
  if (in_size == out_size) return {out, out + 1};
  if (mode == Resampling::area)
    return {int(int64_t(out) * in_size / out_size),
            int((int64_t(out + 1) * in_size + out_size - 1) / out_size)};
  int left = place_of(mode, out, in_size, out_size).left, reach = mode == Resampling::bicubic ? 1 : 0;
  return {within(left - reach, in_size), within(left + 1 + reach, in_size) + 1};
}

// The inputs of a bilinear or bicubic output one by one; beyond the border the border pixel again.
struct Taps {
  int count, position[4];
  float weight[4];
};

static ARIMG_HD Taps taps_of(Resampling mode, int out, int in_size, int out_size) {
  Place at = place_of(mode, out, in_size, out_size);
  int left = within(at.left, in_size), right = within(at.left + 1, in_size);
  float t = at.t;
  if (mode == Resampling::bilinear)
    return {left == right ? 1 : 2, {left, right}, {left == right ? 1.f : 1.f - t, t}};
  return {4,
          {within(at.left - 1, in_size), left, right, within(at.left + 2, in_size)},
          {cubic_far(t + 1.f), cubic_near(t), cubic_near(1.f - t), cubic_far(2.f - t)}};
}

// The weights of the span of `out`, as many as it is long. Weights: float* or a view of shared memory.
template <typename Weights>
static ARIMG_HD void forward_weights(Resampling mode, int out, int in_size, int out_size, Span span,
                                     Weights weight) {
  int count = span.end - span.begin;
  const bool mean = in_size == out_size || mode == Resampling::area;
  for (int k = 0; k < count; ++k) weight[k] = mean ? 1.f / float(count) : 0.f;
  if (mean) return;
  Taps taps = taps_of(mode, out, in_size, out_size);
  for (int k = 0; k < 4; ++k)  // a fixed count, so that the taps stay in registers
    if (k < taps.count) weight[taps.position[k] - span.begin] += taps.weight[k];
}

// The most sources that any target has, or some more.
static ARIMG_HD int most_taps(const Axis& a) {
  int reach = a.mode == Resampling::bicubic ? 4 : a.mode == Resampling::bilinear ? 2 : 1;
  int64_t ratio = (int64_t(a.sources) + a.targets - 1) / a.targets;
  int64_t taps = a.mode == Resampling::area ? ratio + 1 : a.transposed ? reach * ratio + 3 : reach;
  return int(taps < a.sources ? taps : a.sources);
}

// The span of a target and its weights. The outputs that an input reaches are neighbours because both ends of
// a forward span grow with the output; they are found by bisection.
template <typename Weights>
static ARIMG_HD Span axis_weights(const Axis& a, int target, Weights weight) {
  if (!a.transposed) {
    Span span = forward_span(a.mode, target, a.sources, a.targets);
    forward_weights(a.mode, target, a.sources, a.targets, span, weight);
    return span;
  }
  auto first = [&](auto&& holds) {  // the first source for which it holds
    int low = 0, high = a.sources;
    while (low < high) {
      int middle = (low + high) / 2;
      if (holds(forward_span(a.mode, middle, a.targets, a.sources)))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  };
  Span span = {first([&](Span s) { return s.end > target; }),
               first([&](Span s) { return s.begin > target; })};
  for (int source = span.begin; source < span.end; ++source) {
    Span s = forward_span(a.mode, source, a.targets, a.sources);
    if (a.mode == Resampling::area || a.sources == a.targets) {
      weight[source - span.begin] = 1.f / float(s.end - s.begin);
      continue;
    }
    Taps taps = taps_of(a.mode, source, a.targets, a.sources);
    float sum = 0.f;
    for (int k = 0; k < 4; ++k) sum += k < taps.count && taps.position[k] == target ? taps.weight[k] : 0.f;
    weight[source - span.begin] = sum;
  }
  return span;
}

}  // namespace arimg
