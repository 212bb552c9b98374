// Feature maps of two levels of detail as one, and the gradient of that.
//
// Elements are moved, never computed with, so any type of 1, 2, 4 or 8 bytes will do and a NaN stays itself;
// the gradient sums the four pixels of a coarse region row by row in fp32. Each region is independent of all
// others. No aliasing.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

// Planes side by side: coarse [images, channels, height, width], fine and out [images, channels, 2 height,
// 2 width], is_fine [images, height, width].
struct Merge {
  const uint8_t* is_fine;
  int64_t images, channels, height, width;
};

// out = fine where is_fine, else the coarse pixel of the region. Work items are the rows of all planes of
// coarse.
ARIMG_CPU_KERNEL(void, merge,
                 (const Merge& p, const void* coarse, const void* fine, void* out, int64_t bytes,
                  int64_t begin, int64_t end))
Status merge_cuda(const Merge& p, const void* coarse, const void* fine, void* out, int64_t bytes,
                  void* stream);

// to_fine = grad where is_fine, else 0; to_coarse = the sum of the region's four where not, else 0.
ARIMG_CPU_KERNEL(void, merge_backward,
                 (const Merge& p, DType dtype, const void* grad, void* to_coarse, void* to_fine,
                  int64_t begin, int64_t end))
Status merge_backward_cuda(const Merge& p, DType dtype, const void* grad, void* to_coarse, void* to_fine,
                           void* stream);

}  // namespace arimg
