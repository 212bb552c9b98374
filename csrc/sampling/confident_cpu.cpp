// See confident.h. What is no candidate is a NaN in the row of x, which no comparison finds.
#include "sampling/confident.h"

#include "sampling/row_cpu.h"

namespace arimg {
namespace ARIMG_SIMD {

struct Found {
  int64_t count;  // of the candidates
  float lowest;   // of what is above -inf; +inf where nothing is
  float highest;
};

template <typename T>
static Found read_row(const KeepConfident& p, int64_t r, const List& row) {
  const T* from = (const T*)p.confidence + r * p.row_stride;
  const uint8_t* candidates = p.candidates ? p.candidates + r * p.candidate_stride : nullptr;
  I32 count(0);
  F32 lowest(infinity), highest(-infinity);
  for (int64_t i = 0; i < row.count; i += W) {
    const int n = row.count - i < W ? int(row.count - i) : W;
    F32 x = n == W ? F32::load(from + i) : F32::load_partial(from + i, n);
    x = select(x == x, x + F32(0.f), F32(-infinity));  // -0 -> +0
    Mask in = lane_index() < I32(n);
    if (candidates)
      in = in & ((n == W ? I32::load_bytes(candidates + i) : I32::load_bytes(candidates + i, n)) != I32(0));
    x = select(in, x, F32(__builtin_nanf("")));
    x.store(row.x + i);
    count = count - I32(in.m);
    lowest = min(select(x > F32(-infinity), x, F32(infinity)), lowest);
    highest = max(x, highest);  // the second where the first is NaN
  }
  float least = lowest[0];
  for (int lane = 1; lane < W; ++lane) least = lowest[lane] < least ? lowest[lane] : least;
  return {reduce_add(count), least, reduce_max(highest)};
}

// Keeps x > cut, and the first `left` of those that equal it.
static void mark(const List& row, float cut, uint64_t left, uint8_t* out) {
  for (int64_t i = 0; i < row.count; i += W) {
    const F32 x = F32::load(row.x + i);
    const Mask at = x == F32(cut);
    Mask kept = x > F32(cut);
    uint32_t equal = lane_bits(at);
    if (left >= uint64_t(W)) {
      kept = kept | at;
      left -= uint64_t(__builtin_popcount(equal));
    } else {
      for (; equal && left; equal &= equal - 1, --left) kept.m[__builtin_ctz(equal)] = -1;
    }
    if (i + W <= row.count)
      store_bytes(kept, out + i);
    else
      store_bytes(kept, out + i, int(row.count - i));
  }
}

static void keep_row(const Found& found, int64_t count, const List& row, const List& spare, uint8_t* out) {
  if (count <= 0) return mark(row, infinity, 0, out);
  if (count >= found.count) return mark(row, -infinity, ~uint64_t(0), out);
  const uint64_t budget = uint64_t(count);
  const Tally at_lowest = above<false>(row, found.lowest);
  if (at_lowest.mass >= budget) {
    const Cut cut = find_cut<false>(row, spare, budget, found.lowest, at_lowest, found.highest);
    return mark(row, cut.x, budget - cut.above, out);
  }
  const Tally finite = above<false>(row, -infinity);
  if (finite.mass >= budget) return mark(row, found.lowest, budget - at_lowest.mass, out);
  mark(row, -infinity, budget - finite.mass, out);
}

void keep_confident(const KeepConfident& p, int64_t begin, int64_t end, void* workspace) {
  const Workspace w = carve(workspace, p.length);
  with_dtype(p.dtype, [&](auto t) {
    for (int64_t r = begin; r < end; ++r) {
      const Found found = read_row<decltype(t)>(p, r, w.row);
      // The searches read two whole vectors at a time.
      for (int64_t i = (p.length + W - 1) / W * W; i < p.length + 2 * W; i += W)
        F32(__builtin_nanf("")).store(w.row.x + i);
      keep_row(found, count_of(p, r), w.row, w.spare, p.out + r * p.length);
    }
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
