// Resampling, and what one scale of a residual pyramid adds to the running sum.
//
// Area: the mean over input rows floor(i H / h) .. ceil((i + 1) H / h) and the like columns. Bicubic: a =
// -0.75, corners not aligned, taps beyond the border repeat the border pixel. Equal sizes copy. fp32 inside;
// every output pixel is computed alone, so results depend neither on the batch nor on how work is split.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

// A batch of maps: channel c of pixel p (row by row) of image b is data[b * batch + c * channel + p * pixel].
struct Map {
  DType dtype;
  void* data;
  int64_t batch, channel, pixel;
};

enum class Resampling : int { area, bicubic };

struct Resample {
  Resampling mode;
  Map in, out;
  int64_t images, channels;
  int64_t in_height, in_width, out_height, out_width;
};

// u = (1 - ratio) v + ratio (conv3x3(v) + bias) with v = bicubic(h, [height, width]); sum += u; residual -=
// u.
struct Accumulate {
  Map h;                 // [images, channels, in_height, in_width]; or, with index, the codebook:
  const int64_t* index;  // [images, in_height * in_width] rows of h (h.pixel is the row length)
  int64_t images, channels;
  int64_t in_height, in_width, height, width;
  DType filter_dtype;
  const void* weight;  // [channels, channels, 3, 3]
  const void* bias;    // [channels]
  float ratio;
  Map sum;
  Map residual;  // data may be nullptr
};

// CPU. The work items of resample are image x group of channels; those of accumulate are the rows of the
// output of all images. `filter` is the packed convolution with (1 - ratio) on its centre, so that u is one
// product.
ARIMG_CPU_KERNEL(int64_t, resample_items, (const Resample& p))
ARIMG_CPU_KERNEL(int64_t, resample_scratch, (const Resample& p))
ARIMG_CPU_KERNEL(void, resample, (const Resample& p, float* scratch, int64_t begin, int64_t end))

ARIMG_CPU_KERNEL(int64_t, filter_floats, (int64_t channels))
ARIMG_CPU_KERNEL(void, pack_filter, (const Accumulate& p, float* filter))
ARIMG_CPU_KERNEL(int64_t, accumulate_scratch, (const Accumulate& p, int64_t rows))
ARIMG_CPU_KERNEL(void, accumulate,
                 (const Accumulate& p, const float* filter, float* scratch, int64_t begin, int64_t end))

// GPU: one launch each.
Status resample_cuda(const Resample& p, void* stream);
Status accumulate_cuda(const Accumulate& p, void* stream);

}  // namespace arimg
