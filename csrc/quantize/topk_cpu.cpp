// See topk.h. As nearest_code, but with a list per row: scores below the row's threshold are appended; a list
// that is full is cut back to the k lowest, and the threshold becomes the highest of these. Codes come in
// increasing index, so one that equals the threshold can no longer win. A row appends about
// k (2 + log2(K / 2k)) of its K scores, the rest cost a comparison.
#include "quantize/code_blocks.h"
#include "quantize/sort_key.h"
#include "quantize/topk.h"

namespace arimg {
namespace ARIMG_SIMD {

static ARIMG_INLINE int64_t list_room(int k) {
  return (2 * k + PANEL + W - 1) / W * W;
}

// Candidates of the rows of a chunk. `keys` is room to select in.
struct Lists {
  int64_t room;
  uint64_t* keys;    // [room]
  float* threshold;  // [rows]
  int32_t* count;    // [rows]
  float* score;      // [rows, room + W]; Compress stores whole vectors
  int32_t* index;    // [rows, room + W]

  ARIMG_INLINE float* scores(int64_t row) const { return score + row * (room + W); }
  ARIMG_INLINE int32_t* indices(int64_t row) const { return index + row * (room + W); }
};

// Puts the keys below the pivot first and gives their number. Without branches: which keys are low is random.
static ARIMG_INLINE int64_t split(uint64_t* keys, int64_t n, uint64_t pivot) {
  int64_t below = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t key = keys[i];
    keys[i] = keys[below];
    keys[below] = key;
    below += key < pivot;
  }
  return below;
}

// One of the keys that is not the lowest. Keys are distinct.
static ARIMG_INLINE uint64_t pivot_of(const uint64_t* keys, int64_t n) {
  uint64_t a = keys[0], b = keys[n / 2], c = keys[n - 1];
  uint64_t low = a < b ? a : b, high = a < b ? b : a;
  return n < 3 || c > high ? high : c > low ? c : low;
}

// Puts the k lowest first, in any order.
static void select_lowest(uint64_t* keys, int64_t n, int64_t k) {
  while (n > 1 && k > 0 && k < n) {
    int64_t below = split(keys, n, pivot_of(keys, n));
    if (below >= k) {
      n = below;
    } else {
      keys += below;
      n -= below;
      k -= below;
    }
  }
}

static void sort(uint64_t* keys, int64_t n) {
  while (n > 12) {
    int64_t below = split(keys, n, pivot_of(keys, n));
    sort(keys, below);
    keys += below;
    n -= below;
  }
  for (int64_t i = 1; i < n; ++i) {
    uint64_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Leaves the k lowest of a row in `keys`.
static void select(const Lists& lists, int64_t row, int k) {
  int32_t n = lists.count[row];
  for (int32_t i = 0; i < n; ++i) lists.keys[i] = sort_key(lists.scores(row)[i], lists.indices(row)[i]);
  select_lowest(lists.keys, n, k);
}

// Noinline: rare, and the registers of the loop that calls it hold scores.
static __attribute__((noinline)) void cut_back(const Lists& lists, int64_t row, int k) {
  select(lists, row, k);
  uint64_t highest = 0;
  for (int i = 0; i < k; ++i) {
    uint64_t key = lists.keys[i];
    highest = key > highest ? key : highest;
    lists.scores(row)[i] = key_score(key);
    lists.indices(row)[i] = key_index(key);
  }
  lists.count[row] = k;
  lists.threshold[row] = key_score(highest);
}

// Appends the chosen lanes of the scores of codes [code, code + PANEL).
static __attribute__((noinline)) void append(const Lists& lists, int64_t row, int k, F32 left, F32 right,
                                             Mask of_left, Mask of_right, int64_t code) {
  if (lists.count[row] + PANEL > lists.room) cut_back(lists, row, k);
  auto put = [&](F32 scores, Mask chosen, int64_t first) {
    Compress compress(chosen);
    int32_t at = lists.count[row];
    compress(scores).store(lists.scores(row) + at);
    compress(lane_index() + I32(int32_t(first))).store(lists.indices(row) + at);
    lists.count[row] = at + compress.count;
  };
  put(left, of_left, code);
  put(right, of_right, code + W);
}

// DIM: the dimension when known to the compiler, else 0.
template <int DIM>
static void search_tile(const NearestCodes& p, const float* x, int64_t first_panel, int64_t n_panels,
                        const Lists& lists, int64_t row) {
  const int64_t D = DIM > 0 ? DIM : p.dim, stride = DIM > 0 ? DIM : chunk_stride(D);
  const float* panel = p.packed + first_panel * (D + 1) * PANEL;
  for (int64_t i = first_panel; i < first_panel + n_panels; ++i, panel += (D + 1) * PANEL) {
    asm("" : "+r"(x));  // as in nearest_code
    Tile<TILE_ROWS> tile;
    score_panel(tile, x, stride, D, panel);
    int64_t code = i * PANEL;
    if (code < p.k) {  // a list is never shorter than k, even of scores that are NaN
      I32 last(int32_t(at_most(p.count - code, PANEL)));
      Mask left = lane_index() < last, right = lane_index() + I32(W) < last;
      for (int r = 0; r < TILE_ROWS; ++r)
        append(lists, row + r, p.k, tile.sum[r][0], tile.sum[r][1], left, right, code);
      continue;
    }
    for (int r = 0; r < TILE_ROWS; ++r) {
      F32 threshold(lists.threshold[row + r]);
      Mask left = tile.sum[r][0] < threshold, right = tile.sum[r][1] < threshold;
      if (any(left | right)) append(lists, row + r, p.k, tile.sum[r][0], tile.sum[r][1], left, right, code);
    }
  }
}

template <int DIM>
static void search_chunk(const NearestCodes& p, const float* x, const Lists& lists, int64_t rows,
                         int64_t first_row) {
  int64_t D = p.dim, stride = chunk_stride(D);
  int64_t panels = (p.count + PANEL - 1) / PANEL, per_block = block_panels(D);
  int64_t padded = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  for (int64_t row = 0; row < padded; ++row) {
    lists.threshold[row] = INFINITE;
    lists.count[row] = 0;
  }
  for (int64_t first = 0; first < panels; first += per_block)
    for (int64_t row = 0; row < padded; row += TILE_ROWS)
      search_tile<DIM>(p, x + row * stride, first, at_most(panels - first, per_block), lists, row);
  for (int64_t row = 0; row < rows; ++row) {
    select(lists, row, p.k);
    sort(lists.keys, p.k);
    float squares = 0.f;
    for (int64_t d = 0; d < D; ++d)
      squares = __builtin_fmaf(x[row * stride + d], x[row * stride + d], squares);
    for (int i = 0; i < p.k; ++i) {
      int64_t at = (first_row + row) * p.k + i;
      p.value[at] = value_of_score(p.metric, key_score(lists.keys[i]), squares);
      p.index[at] = key_index(lists.keys[i]);
    }
  }
}

// Rows whose fp32 copy takes 128 KiB (of long rows more, so that codes do not come from memory for every
// tile) and whose lists take 256 KiB at most.
static ARIMG_INLINE int64_t chunk_rows(int64_t dim, int k) {
  int64_t by_x = 32768 / (dim * TILE_ROWS);
  by_x = by_x < 8 ? 8 : by_x;
  int64_t by_lists = 32768 / ((list_room(k) + W) * TILE_ROWS);
  int64_t tiles = at_most(at_most(by_x, by_lists), 32);
  return TILE_ROWS * (tiles < 1 ? 1 : tiles);
}

int64_t nearest_codes_scratch(int64_t dim, int k) {
  int64_t rows = chunk_rows(dim, k), room = list_room(k);
  return rows * (chunk_stride(dim) + 2 + 2 * (room + W)) + 2 * room + 32;
}

void nearest_codes(const NearestCodes& p, float* scratch, int64_t begin, int64_t end) {
  int64_t D = p.dim, chunk = chunk_rows(D, p.k), room = list_room(p.k);
  Lists lists{room, (uint64_t*)scratch, nullptr, nullptr, nullptr, nullptr};
  lists.threshold = scratch + 2 * room;
  lists.count = (int32_t*)(lists.threshold + chunk);
  lists.score = lists.threshold + 2 * chunk;
  lists.index = (int32_t*)(lists.score + chunk * (room + W));
  float* x = lists.score + 2 * chunk * (room + W);
  for (int64_t row = begin; row < end; row += chunk) {
    int64_t rows = at_most(end - row, chunk);
    load_rows(p.dtype, p.x, D, row, rows, chunk, x);
    auto search = D == 4    ? search_chunk<4>
                  : D == 8  ? search_chunk<8>
                  : D == 16 ? search_chunk<16>
                  : D == 32 ? search_chunk<32>
                            : search_chunk<0>;
    search(p, x, lists, rows, row);
  }
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
