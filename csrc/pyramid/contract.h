// Resampling, and what one scale of a residual pyramid adds to the running sum.
//
// Weights: see resample.h. fp32 inside, rows before columns, each output element one chain of multiply-adds
// over its sources in their order; every output pixel is computed alone, so results depend neither on the
// batch nor on how work is split nor on the layout of the maps.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"
#include "pyramid/resample.h"

namespace arimg {

// A batch of maps: channel c of pixel p (row by row) of image b is data[b * batch + c * channel + p * pixel].
struct Map {
  DType dtype;
  void* data;
  int64_t batch, channel, pixel;
};

// The maps are planes (pixel 1) or rows of channels (channel 1) of one dtype; or the sizes are equal, and a
// map in any layout is copied to another layout, from or to float32.
struct Resample {
  Resampling mode;
  bool transposed;  // the transposed matrix of the resampling from out's size to in's
  Map in, out;
  int64_t images, channels;
  int64_t in_height, in_width, out_height, out_width;
};

static ARIMG_HD Axis row_axis(const Resample& p) {
  return {p.mode, p.transposed, int(p.in_height), int(p.out_height)};
}
static ARIMG_HD Axis column_axis(const Resample& p) {
  return {p.mode, p.transposed, int(p.in_width), int(p.out_width)};
}

// v = `up`sampled h, [height, width]; u = (1 - ratio) v + ratio (conv3x3(v) + bias), or v where weight is
// nullptr; sum += u; residual -= u. `up` is bilinear or bicubic.
struct Accumulate {
  Map h;                 // [images, channels, in_height, in_width]; or, with index, the codebook:
  const int64_t* index;  // [images, in_height * in_width] rows of h (h.pixel is the row length)
  float sign;            // not 0: no codebook; channel c of a pixel is +sign where bit c of index is set,
                         // else -sign (h is unused)
  int64_t images, channels;
  Resampling up;
  int64_t in_height, in_width, height, width;
  DType filter_dtype;
  const void* weight;  // [channels, channels, 3, 3]
  const void* bias;    // [channels]
  float ratio;
  Map sum;
  Map residual;  // data may be nullptr
};

// CPU. The work items of resample are pieces of one image; those of accumulate are the rows of the output of
// all images. `filter` is the packed convolution with (1 - ratio) on its centre, so that u is one product.
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

// bit c of index[i] = x[i, c] > 0, for x [rows, channels] in fp32, channels <= 64.
ARIMG_CPU_KERNEL(void, sign_bits,
                 (const float* x, int64_t channels, int64_t* index, int64_t begin, int64_t end))
Status sign_bits_cuda(const float* x, int64_t rows, int64_t channels, int64_t* index, void* stream);

}  // namespace arimg
