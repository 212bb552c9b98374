// See contract.h. Some panels at a time are packed into the second-level cache, and each tile of rows passes
// over them while it is in the first; a lane remembers the vector of codes that its lowest score came from.
// Those three instructions per vector of scores do not show beside the D multiply-adds of long rows.
#include "quantize/code_blocks.h"
#include "quantize/sort_key.h"

namespace arimg {
namespace ARIMG_SIMD {

// Panels of a block of 256 KiB.
static ARIMG_INLINE int64_t packed_panels(int64_t dim) {
  const int64_t panels = 65536 / panel_floats(dim);
  return panels < 1 ? 1 : panels;
}

// Per row of a tile and lane: the lowest score so far and the number of its vector of W codes.
struct Lead {
  F32 score[TILE_ROWS];
  I32 vector[TILE_ROWS];
};

int64_t stream_chunk_rows(int64_t dim) {
  const int64_t tiles = 1048576 / (chunk_stride(dim) * TILE_ROWS);  // 4 MiB of x
  return TILE_ROWS * (tiles < 4 ? 4 : tiles > 64 ? 64 : tiles);
}

int64_t stream_row_floats(int64_t dim) {
  return chunk_stride(dim);
}

int64_t stream_scratch(int64_t dim) {
  return packed_panels(dim) * panel_floats(dim) +
         stream_chunk_rows(dim) / TILE_ROWS * int64_t(sizeof(Lead) / sizeof(float)) + 16;
}

void stream_rows(DType dtype, const void* x, int64_t dim, int64_t first, int64_t rows, float* to) {
  load_rows(dtype, x, dim, first, rows, (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS, to);
}

template <int R>
static void pass_over(const float* x, int64_t dim, const float* panels, int64_t n_panels, int64_t first_panel,
                      Lead& lead) {
  const int64_t stride = chunk_stride(dim);
  for (int64_t i = 0; i < n_panels; ++i, panels += (dim + 1) * PANEL) {
    Tile<R> tile;
    score_panel(tile, x, stride, dim, panels);
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) {
        const Mask better = tile.sum[r][half] < lead.score[r];
        lead.score[r] = select(better, tile.sum[r][half], lead.score[r]);
        lead.vector[r] = select(better, I32(int32_t(2 * (first_panel + i) + half)), lead.vector[r]);
      }
  }
}

static uint64_t key_of(F32 score, I32 vector) {
  uint64_t lowest = sort_key(INFINITE, 0);
  for (int lane = 0; lane < W; ++lane) {
    const uint64_t key = sort_key(score[lane], vector[lane] * W + lane);
    lowest = score[lane] < INFINITE && key < lowest ? key : lowest;
  }
  return lowest;
}

void stream_codes(const StreamCodes& p, float* scratch, int64_t panel_begin, int64_t panel_end,
                  uint64_t* keys) {
  const int64_t D = p.book.dim, stride = chunk_stride(D), block = packed_panels(D);
  Lead* leads = (Lead*)scratch;
  float* packed = scratch + stream_chunk_rows(D) / TILE_ROWS * int64_t(sizeof(Lead) / sizeof(float));
  for (int64_t t = 0; t * TILE_ROWS < p.rows; ++t)
    for (int r = 0; r < TILE_ROWS; ++r) {
      leads[t].score[r] = F32(INFINITE);
      leads[t].vector[r] = I32(0);
    }
  for (int64_t first = panel_begin; first < panel_end; first += block) {
    const int64_t n = at_most(panel_end - first, block);
    pack_codes(p.book, p.chosen, packed, first, first + n);
    for (int64_t row = 0; row < p.rows; row += TILE_ROWS)
      with_tile_rows(p.rows - row, [&](auto tile_rows) {
        pass_over<decltype(tile_rows)::count>(p.x + row * stride, D, packed, n, first,
                                              leads[row / TILE_ROWS]);
      });
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    const Lead& lead = leads[row / TILE_ROWS];
    keys[row] = key_of(lead.score[row % TILE_ROWS], lead.vector[row % TILE_ROWS]);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
