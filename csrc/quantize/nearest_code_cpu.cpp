// See contract.h.
//
// Rows are taken in chunks whose fp32 copy stays in the second-level cache, codes in blocks that stay in the
// first. Within a block only the lowest score per lane is kept (one `min` per vector of scores); between
// blocks each lane remembers the block it came from; the winning block of a row is scored once more to find
// the index. That is about D + 1 vector instructions per W scores, where tracking indices would take D + 3.
#include "quantize/code_blocks.h"

namespace arimg {
namespace ARIMG_SIMD {

// --- search
// --------------------------------------------------------------------------------------------------

static ARIMG_INLINE int64_t chunk_rows(int64_t dim) {
  int64_t tiles = 32768 / (dim * TILE_ROWS);  // 128 KiB of x
  return TILE_ROWS * (tiles < 1 ? 1 : tiles > 32 ? 32 : tiles);
}

// Per row of a chunk and lane: the lowest score so far and the block that it is from.
struct Best {
  F32 score[TILE_ROWS];
  I32 block[TILE_ROWS];
};

int64_t nearest_code_scratch(int64_t dim) {
  int64_t rows = chunk_rows(dim);
  return rows * chunk_stride(dim) + rows / TILE_ROWS * int64_t(sizeof(Best) / sizeof(float)) + 16;
}

// DIM: the dimension when known to the compiler, else 0. R: the rows of the tile that count.
template <int DIM, int R>
static void search_block(const float* x, int64_t dim, const float* panels, int64_t n_panels, int block,
                         Best& best) {
  const int64_t D = DIM > 0 ? DIM : dim, stride = DIM > 0 ? DIM : chunk_stride(dim);
  F32 lowest[R];
  for (int r = 0; r < R; ++r) lowest[r] = F32(INFINITE);
  for (int64_t i = 0; i < n_panels; ++i, panels += (D + 1) * PANEL) {
    // Hides that x is the same for all panels: else the compiler broadcasts all of it in advance and loads
    // whole vectors where it could load one float for two multiply-adds.
    asm("" : "+r"(x));
    Tile<R> tile;
    score_panel(tile, x, stride, D, panels);
    for (int r = 0; r < R; ++r)  // the second operand of min is kept when the first is NaN
      lowest[r] = min(tile.sum[r][0], min(tile.sum[r][1], lowest[r]));
  }
  for (int r = 0; r < R; ++r) {
    Mask better = lowest[r] < best.score[r];
    best.score[r] = select(better, lowest[r], best.score[r]);
    best.block[r] = select(better, I32(block), best.block[r]);
  }
}

struct Winner {
  float score;
  int block;
};

static Winner winner_of(F32 score, I32 block) {
  Winner winner{score[0], block[0]};
  for (int lane = 1; lane < W; ++lane)
    if (score[lane] < winner.score || (score[lane] == winner.score && block[lane] < winner.block))
      winner = {score[lane], block[lane]};
  return winner;
}

// The first code of some panels whose score for one row is as low as this: the same chain of multiply-adds
// gives the same bits again. 0 if no score is (all of the row's are NaN or infinite).
static int64_t first_with_score(float score, const float* x, int64_t D, const float* panels,
                                int64_t n_panels) {
  for (int64_t i = 0; i < n_panels; ++i, panels += (D + 1) * PANEL) {
    Tile<1> tile;
    score_panel(tile, x, D, D, panels);
    for (int half = 0; half < 2; ++half) {
      const uint32_t found = lane_bits(tile.sum[0][half] <= F32(score));
      if (found != 0) return i * PANEL + half * W + __builtin_ctz(found);
    }
  }
  return 0;
}

template <int DIM>
static void search_chunk(const NearestCode& p, const float* x, Best* best, int64_t rows, int64_t* index) {
  const int64_t D = p.dim, stride = chunk_stride(D), floats = panel_floats(D);
  const int64_t panels = code_panels(p.count), per_block = block_panels(D);
  for (int64_t t = 0; t * TILE_ROWS < rows; ++t)
    for (int r = 0; r < TILE_ROWS; ++r) {
      best[t].score[r] = F32(INFINITE);
      best[t].block[r] = I32(0);
    }
  for (int64_t first = 0, block = 0; first < panels; first += per_block, ++block) {
    const int64_t n = at_most(panels - first, per_block);
    for (int64_t row = 0; row < rows; row += TILE_ROWS)
      with_tile_rows(rows - row, [&](auto tile_rows) {
        search_block<DIM, decltype(tile_rows)::count>(x + row * stride, D, p.packed + first * floats, n,
                                                      int(block), best[row / TILE_ROWS]);
      });
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Best& b = best[row / TILE_ROWS];
    const Winner winner = winner_of(b.score[row % TILE_ROWS], b.block[row % TILE_ROWS]);
    const int64_t first = winner.block * per_block;
    index[row] = first * PANEL;
    if (winner.score < INFINITE)
      index[row] += first_with_score(winner.score, x + row * stride, D, p.packed + first * floats,
                                     at_most(panels - first, per_block));
  }
}

void nearest_code(const NearestCode& p, float* scratch, int64_t begin, int64_t end) {
  int64_t D = p.dim, chunk = chunk_rows(D);
  Best* best = (Best*)scratch;
  float* x = scratch + chunk / TILE_ROWS * int64_t(sizeof(Best) / sizeof(float));
  for (int64_t row = begin; row < end; row += chunk) {
    int64_t rows = at_most(end - row, chunk);
    load_rows(p.dtype, p.x, D, row, rows, chunk, x);
    auto search = D == 4    ? search_chunk<4>
                  : D == 8  ? search_chunk<8>
                  : D == 16 ? search_chunk<16>
                  : D == 32 ? search_chunk<32>
                            : search_chunk<0>;
    search(p, x, best, rows, p.index + row);
  }
}

// --- the gradient of a lookup
// ----------------------------------------------------------------------------------

template <typename T>
static void scatter_add(const LookupBackward& p, float* sums, int64_t begin, int64_t end) {
  int64_t D = p.dim;
  for (int64_t i = 0; i < (end - begin) * D; ++i) sums[i] = 0.f;
  for (int64_t row = 0; row < p.rows; ++row) {
    int64_t k = p.index[row];
    if (k < begin || k >= end) continue;
    const T* grad = (const T*)p.grad + row * D;
    float* sum = sums + (k - begin) * D;
    int64_t d = 0;
    for (; d + W <= D; d += W) (F32::load(sum + d) + F32::load(grad + d)).store(sum + d);
    for (; d < D; ++d) sum[d] += to_float(grad[d]);
  }
  T* out = (T*)p.out + begin * D;
  int64_t n = (end - begin) * D, i = 0;
  for (; i + W <= n; i += W) F32::load(sums + i).store(out + i);
  for (; i < n; ++i) out[i] = from_float<T>(sums[i]);
}

void lookup_backward(const LookupBackward& p, float* scratch, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto t) { scatter_add<decltype(t)>(p, scratch, begin, end); });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
