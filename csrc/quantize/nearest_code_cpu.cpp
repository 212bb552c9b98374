// See contract.h.
//
// Rows are taken in chunks whose fp32 copy stays in the second-level cache, codes in blocks that stay in the
// first. Within a block only the lowest score per lane is kept (one `min` per vector of scores); between
// blocks each lane remembers the block it came from; the winning block of a row is scored once more to find
// the index. That is about D + 1 vector instructions per W scores, where tracking indices would take D + 3.
#include "core/transpose.h"
#include "quantize/code_blocks.h"

namespace arimg {
namespace ARIMG_SIMD {

int64_t code_panels(int64_t count) {
  return (count + PANEL - 1) / PANEL;
}

int64_t panel_floats(int64_t dim) {
  return (dim + 1) * PANEL;
}

// --- packing
// -------------------------------------------------------------------------------------------------

template <typename T>
static void pack_panel(const Codebook& book, const int32_t* chosen, int64_t panel, float* out) {
  int64_t D = book.dim, first = panel * PANEL;
  int lanes = int(at_most(book.count - first, PANEL));
  auto code = [&](int64_t i) {
    return (const T*)book.codes + (chosen == nullptr ? first + i : int64_t(chosen[first + i])) * D;
  };
  float* values = out + PANEL;
  transposed_rows(code, lanes, D, values, PANEL);
  for (int lane = lanes; lane < PANEL; ++lane)
    for (int64_t d = 0; d < D; ++d) values[d * PANEL + lane] = 0.f;
  for (int half = 0; half < PANEL; half += W) {
    F32 squares(0.f), length(1.f);
    for (int64_t d = 0; d < D; ++d) {
      F32 c = F32::load(values + d * PANEL + half);
      squares = mul_add(c, c, squares);
    }
    if (book.metric == Metric::cosine) {
      length = sqrt(squares);
      length = select(length < F32(1e-12f), F32(1e-12f), length);  // keeps a NaN
    }
    for (int64_t d = 0; d < D; ++d) {
      float* c = values + d * PANEL + half;
      F32 negated = F32(-1.f) * F32::load(c);
      (book.metric == Metric::cosine ? negated / length : negated).store(c);
    }
    (book.metric == Metric::l2 ? F32(0.5f) * squares : F32(0.f)).store(out + half);
  }
  for (int lane = lanes; lane < PANEL; ++lane) out[lane] = INFINITE;
}

void pack_codes(const Codebook& book, const int32_t* chosen, float* packed, int64_t panel_begin,
                int64_t panel_end) {
  with_dtype(book.dtype, [&](auto t) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      pack_panel<decltype(t)>(book, chosen, panel, packed + panel * panel_floats(book.dim));
  });
}

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
  return rows * dim + rows / TILE_ROWS * int64_t(sizeof(Best) / sizeof(float)) + 16;
}

// DIM: the dimension when known to the compiler, else 0.
template <int DIM>
static void search_block(const float* x, int64_t dim, const float* panels, int64_t n_panels, int block,
                         Best& best) {
  const int64_t D = DIM > 0 ? DIM : dim;
  F32 lowest[TILE_ROWS];
  for (int r = 0; r < TILE_ROWS; ++r) lowest[r] = F32(INFINITE);
  for (int64_t i = 0; i < n_panels; ++i, panels += (D + 1) * PANEL) {
    // Hides that x is the same for all panels: else the compiler broadcasts all of it in advance and loads
    // whole vectors where it could load one float for two multiply-adds.
    asm("" : "+r"(x));
    Tile<TILE_ROWS> tile;
    score_panel(tile, x, D, panels);
    for (int r = 0; r < TILE_ROWS; ++r)  // the second operand of min is kept when the first is NaN
      lowest[r] = min(tile.sum[r][0], min(tile.sum[r][1], lowest[r]));
  }
  for (int r = 0; r < TILE_ROWS; ++r) {
    Mask better = lowest[r] < best.score[r];
    best.score[r] = select(better, lowest[r], best.score[r]);
    best.block[r] = select(better, I32(block), best.block[r]);
  }
}

static int winning_block(F32 score, I32 block) {
  float lowest = score[0];
  int winner = block[0];
  for (int lane = 1; lane < W; ++lane)
    if (score[lane] < lowest || (score[lane] == lowest && block[lane] < winner)) {
      lowest = score[lane];
      winner = block[lane];
    }
  return winner;
}

// The first lowest score of one row among the codes of some panels.
static int64_t first_lowest(const float* x, int64_t D, const float* panels, int64_t n_panels) {
  float lowest = INFINITE;
  int64_t index = 0;
  for (int64_t i = 0; i < n_panels; ++i, panels += (D + 1) * PANEL) {
    Tile<1> tile;
    score_panel(tile, x, D, panels);
    for (int half = 0; half < 2; ++half) {
      if (!any(tile.sum[0][half] < F32(lowest))) continue;
      for (int lane = 0; lane < W; ++lane)
        if (tile.sum[0][half][lane] < lowest) {
          lowest = tile.sum[0][half][lane];
          index = i * PANEL + half * W + lane;
        }
    }
  }
  return index;
}

template <int DIM>
static void search_chunk(const NearestCode& p, const float* x, Best* best, int64_t rows, int64_t* index) {
  int64_t D = p.dim, panels = code_panels(p.count), per_block = block_panels(D), floats = panel_floats(D);
  int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t t = 0; t < tiles; ++t)
    for (int r = 0; r < TILE_ROWS; ++r) {
      best[t].score[r] = F32(INFINITE);
      best[t].block[r] = I32(0);
    }
  for (int64_t first = 0, block = 0; first < panels; first += per_block, ++block) {
    int64_t n = at_most(panels - first, per_block);
    for (int64_t t = 0; t < tiles; ++t)
      search_block<DIM>(x + t * TILE_ROWS * D, D, p.packed + first * floats, n, int(block), best[t]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Best& b = best[row / TILE_ROWS];
    int64_t first = winning_block(b.score[row % TILE_ROWS], b.block[row % TILE_ROWS]) * per_block;
    index[row] = first * PANEL +
                 first_lowest(x + row * D, D, p.packed + first * floats, at_most(panels - first, per_block));
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
