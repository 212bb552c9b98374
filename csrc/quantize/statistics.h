// What a codebook learns from: per code the number of rows assigned to it and their sum.
//
// Sums are taken in fp32 and in row order, on every backend, so they are the same in every run and equal one
// scatter-add after the other. Rows whose index is not a code (such as -1) are left out.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

struct CodeStatistics {
  DType dtype;
  const void* x;         // [rows, dim], contiguous
  const int64_t* index;  // [rows]
  int64_t rows, dim, count;
  int64_t* counts;  // [count]
  float* sums;      // [count, dim]; every element is written
};

// CPU: rows are first sorted by code, each code's in order: order[starts[k]] up to order[starts[k + 1]] are
// the rows of code k; starts has count + 1 entries, order up to `rows`. Then codes [begin, end).
ARIMG_CPU_KERNEL(void, sort_by_code, (const CodeStatistics& p, int64_t* starts, int64_t* order))
ARIMG_CPU_KERNEL(void, code_statistics,
                 (const CodeStatistics& p, const int64_t* starts, const int64_t* order, int64_t begin,
                  int64_t end))

Status code_statistics_cuda(const CodeStatistics& p, void* stream);

}  // namespace arimg
