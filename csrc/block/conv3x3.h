// 3x3 convolution of stride 1 and zero padding 1 on the CPU, with what stands around it in a decoder: the
// group norm and SiLU before it, the doubling of the image before it, the residual after it.
//
// Winograd's F(4x4, 3x3) (Lavin & Gray, arXiv 1509.09308) takes 36 products per 16 outputs where the direct
// form takes 144. Tiles are worked in chunks of whole tile rows, and the outputs of a chunk in panels, so
// that the activated pixels, the transformed tiles, the transformed filters of a panel and their products all
// stay in the caches: no tensor but x, the residual and the result is read or written, and the filters are
// kept in the form they have. Arithmetic is float32. Every output is one fixed chain of operations, whatever
// the chunks, the batch and the threads.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"

namespace arimg {

struct Conv3x3 {
  DType dtype;           // of x, residual and out
  const void* x;         // [batch, height / up, width / up, channels] contiguous
  const float* scale;    // [batch, channels]: the input is silu(x * scale + shift); nullptr: it is x
  const float* shift;    // with scale
  DType weight_dtype;    // of weight and bias
  const void* weight;    // [outputs, channels, 3, 3] contiguous
  const void* bias;      // [outputs], or nullptr
  const void* residual;  // as out, or nullptr
  void* out;             // [batch, height, width, outputs] contiguous
  int64_t batch, height, width, channels, outputs;
  int64_t up;  // 1, or 2: each pixel of x stands for 2 x 2 of the input
};

// A unit of work is one chunk of one image and one of `splits` parts of its panels.
ARIMG_CPU_KERNEL(int64_t, conv3x3_chunks, (const Conv3x3& p))  // of one image
ARIMG_CPU_KERNEL(int64_t, conv3x3_panels, (const Conv3x3& p))
ARIMG_CPU_KERNEL(int64_t, conv3x3_scratch, (const Conv3x3& p))  // floats, 64-byte aligned
ARIMG_CPU_KERNEL(void, conv3x3, (const Conv3x3& p, int64_t splits, int64_t unit, float* scratch))

// The mean of each channel over some pixels and the sum of its squared deviations from it.
struct ChannelMoments {
  DType dtype;
  const void* x;  // [pixels, channels] contiguous
  float* mean;    // [channels]
  float* squares;
  int64_t pixels, channels;
};

ARIMG_CPU_KERNEL(void, channel_moments, (const ChannelMoments& p))

}  // namespace arimg
