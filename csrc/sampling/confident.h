// The most confident entries of each row: the `count` largest among the candidates, of equals the lower
// index, all candidates where there are no more. A NaN counts as -inf, -0 equals +0.
//
// No sort: the count-th largest value is searched for, then everything above it is kept, and as many of those
// that equal it as are left, from the lowest index on. A row depends on itself alone.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct KeepConfident {
  DType dtype;
  const void* confidence;  // [rows, length], the rows row_stride elements apart
  int64_t row_stride;
  int64_t rows, length;       // length at most max_vocabulary
  const uint8_t* candidates;  // [rows, length], not 0 for the candidates; or nullptr: all
  int64_t candidate_stride;
  const int64_t* counts;  // [rows], or nullptr: `count`; below 0 is 0
  int64_t count;
  uint8_t* out;  // [rows, length], 0 or 1
};

// Rows [begin, end). `workspace`: row_workspace(length) bytes (contract.h), aligned for float, per thread.
ARIMG_CPU_KERNEL(void, keep_confident, (const KeepConfident& p, int64_t begin, int64_t end, void* workspace))
Status keep_confident_cuda(const KeepConfident& p, void* stream);

static ARIMG_HD int64_t count_of(const KeepConfident& p, int64_t r) {
  return p.counts != nullptr ? p.counts[r] : p.count;
}

}  // namespace arimg
