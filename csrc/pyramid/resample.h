// Where the taps of a resampled pixel lie, the same on CPU and GPU.
#pragma once

#include "core/dtype.h"

namespace arimg {

struct Cell {  // the input positions [begin, end) that an output position averages
  int64_t begin, end;
};

static ARIMG_HD Cell area_cell(int64_t out, int64_t in_size, int64_t out_size) {
  return {out * in_size / out_size, ((out + 1) * in_size + out_size - 1) / out_size};
}

struct Taps {
  int position[4];
  float weight[4];
};

// The cubic kernel for a = -0.75 (Keys 1981).
static ARIMG_HD float cubic_near(float t) {  // 0 <= t <= 1
  return (1.25f * t - 2.25f) * t * t + 1.f;
}
static ARIMG_HD float cubic_far(float t) {  // 1 <= t <= 2
  return ((-0.75f * t + 3.75f) * t - 6.f) * t + 3.f;
}

static ARIMG_HD Taps bicubic_taps(int64_t out, int64_t in_size, int64_t out_size) {
  float scale = float(in_size) / float(out_size);
  float at = scale * (float(out) + 0.5f) - 0.5f;
  int left = int(at);
  if (float(left) > at) --left;  // floor
  float t = at - float(left);
  Taps taps;
  for (int i = 0; i < 4; ++i) {
    int position = left - 1 + i, last = int(in_size) - 1;
    taps.position[i] = position < 0 ? 0 : position > last ? last : position;
  }
  taps.weight[0] = cubic_far(t + 1.f);
  taps.weight[1] = cubic_near(t);
  taps.weight[2] = cubic_near(1.f - t);
  taps.weight[3] = cubic_far(2.f - t);
  return taps;
}

}  // namespace arimg
