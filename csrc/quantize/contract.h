// Nearest code: for each row of x the index of the code with the lowest score, without an N x K matrix.
//
// The score of code c is offset(c) - x . c, summed in fp32 as one chain in increasing dimension, starting at
// the offset: half the squared length for `l2` (the squared length of x, common to all codes, is left out), 0
// for `dot` and `cosine` (whose codes are normalised first; the length of x changes no order). Equal scores:
// the lowest index. A score that is NaN never wins; where none wins (a row with a NaN) the index is 0.
// Where multiply-add is fused (all but the scalar CPU level) every backend computes the same bits.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

namespace arimg {

enum class Metric : int { l2, cosine, dot };

struct Codebook {
  DType dtype;
  const void* codes;  // [count, dim], contiguous
  int64_t count, dim;
  Metric metric;
};

// Which codes may be chosen: rows are in `groups` equal runs, and each run has its own set.
struct Allowed {
  const bool* codes = nullptr;  // [groups, count]; nullptr: all
  int64_t groups = 1;
};

// CPU: codes are packed into panels, one code per vector lane: [dim + 1][lanes] floats, the offsets and then
// the codes; the last panel is filled up with codes that never win. With `chosen` (increasing) packed code i
// is code chosen[i], and book.count the number of these. `packed` receives panel_begin and those that follow.
ARIMG_CPU_KERNEL(int64_t, code_panels, (int64_t count))
ARIMG_CPU_KERNEL(int64_t, panel_floats, (int64_t dim))
ARIMG_CPU_KERNEL(void, pack_codes,
                 (const Codebook& book, const int32_t* chosen, float* packed, int64_t panel_begin,
                  int64_t panel_end))

struct NearestCode {
  DType dtype;
  const void* x;  // [rows, dim], contiguous
  const float* packed;
  int64_t count, dim;
  int64_t* index;  // [rows]
};

// Floats of working memory that a call of nearest_code needs.
ARIMG_CPU_KERNEL(int64_t, nearest_code_scratch, (int64_t dim))
// Rows [begin, end).
ARIMG_CPU_KERNEL(void, nearest_code, (const NearestCode& p, float* scratch, int64_t begin, int64_t end))

// The same search without a packed copy of the codebook, for codebooks that would be read from memory again
// and again: a chunk of rows against codes that are packed a cache full at a time. Any ranges of panels may
// be searched one by one: the key (sort_key.h) of a row is the lowest of its keys.
struct StreamCodes {
  Codebook book;
  const int32_t* chosen;  // as in pack_codes
  const float* x;         // as stream_rows writes it
  int64_t rows;           // stream_chunk_rows at most
};

ARIMG_CPU_KERNEL(int64_t, stream_chunk_rows, (int64_t dim))
// Floats of a row of a chunk, and of working memory that a call of stream_codes needs.
ARIMG_CPU_KERNEL(int64_t, stream_row_floats, (int64_t dim))
ARIMG_CPU_KERNEL(int64_t, stream_scratch, (int64_t dim))
// Rows [first, first + rows) of x [.., dim] for StreamCodes; `to` has room for stream_chunk_rows.
ARIMG_CPU_KERNEL(void, stream_rows,
                 (DType dtype, const void* x, int64_t dim, int64_t first, int64_t rows, float* to))
ARIMG_CPU_KERNEL(void, stream_codes,
                 (const StreamCodes& p, float* scratch, int64_t panel_begin, int64_t panel_end,
                  uint64_t* keys))

// GPU: code_offsets_cuda writes offsets [groups, count] (for `cosine` the lengths of the codes; NaN for codes
// that are not allowed, so that their scores are NaN); then
// nearest_code_cuda is one launch, or, where the rows alone do not fill the device, one over parts of the
// codebook and one that combines them, with `parts` [splits, rows] between.
struct NearestCodeGpu {
  DType dtype;
  const void* x;  // [rows, dim], contiguous
  Codebook book;
  const float* offsets;  // [groups, count]
  const bool* allowed;   // as in Allowed
  int64_t groups, rows;
  int64_t* index;   // [rows]
  uint64_t* parts;  // unused when splits is 1
  int splits;
};

// Rows and codes that one block of threads takes at a time.
constexpr int GPU_TILE_ROWS = 64, GPU_TILE_CODES = 64;

// Parts of the codebook that make about 256 blocks, each of several tiles. The result does not depend on it.
static inline int nearest_code_splits(int64_t rows, int64_t count) {
  int64_t row_tiles = (rows + GPU_TILE_ROWS - 1) / GPU_TILE_ROWS;
  int64_t wanted = 256 / (row_tiles < 1 ? 1 : row_tiles);
  int64_t limit = count / (2 * GPU_TILE_CODES);
  int64_t splits = wanted < limit ? wanted : limit;
  return int(splits < 1 ? 1 : splits);
}

Status code_offsets_cuda(const Codebook& book, const bool* allowed, int64_t groups, float* offsets,
                         void* stream);
Status nearest_code_cuda(const NearestCodeGpu& p, void* stream);
// The first launch alone: the keys (sort_key.h) of the parts when splits > 1.
Status nearest_code_parts_cuda(const NearestCodeGpu& p, void* stream);

// The gradient of a lookup: out[k] = sum of grad rows whose index is k, in row order and in fp32.
struct LookupBackward {
  DType dtype;
  const void* grad;  // [rows, dim], contiguous
  const int64_t* index;
  void* out;  // [count, dim]; every element is written
  int64_t rows, dim, count;
};

// Codes [begin, end); scratch holds dim * (end - begin) floats.
ARIMG_CPU_KERNEL(void, lookup_backward, (const LookupBackward& p, float* scratch, int64_t begin, int64_t end))
Status lookup_backward_cuda(const LookupBackward& p, void* stream);

}  // namespace arimg
