// See contract.h. Squares of W codes and W dimensions are turned in registers; the squared lengths are summed
// on the way.
#include "quantize/code_blocks.h"

namespace arimg {
namespace ARIMG_SIMD {

int64_t code_panels(int64_t count) {
  return (count + PANEL - 1) / PANEL;
}

int64_t panel_floats(int64_t dim) {
  return (dim + 1) * PANEL;
}

// Codes code(0), ..., code(lanes - 1) into lanes of values[d], zeros into the others. Returns the sums of the
// squares, each one chain in increasing dimension. Nothing is read from `end` on.
template <typename T, typename Code>
static ARIMG_INLINE F32 turn_codes(Code&& code, int lanes, int64_t D, const T* end, float* values) {
  F32 squares(0.f);
  for (int64_t d = 0; d < D; d += W) {
    const int n = int(at_most(D - d, W));
    // A whole vector of the last code may reach beyond the end.
    const bool whole = lanes == W && code(W - 1) + d + W <= end;
    F32 block[W];
    for (int i = 0; i < W; ++i) {
      if (whole) __builtin_prefetch(code(i) + W * D + d);  // the next W codes
      block[i] = whole ? F32::load(code(i) + d) : i < lanes ? F32::load_partial(code(i) + d, n) : F32(0.f);
    }
    transpose(block);
    for (int i = 0; i < n; ++i) {
      block[i].store(values + (d + i) * PANEL);
      squares = mul_add(block[i], block[i], squares);
    }
  }
  return squares;
}

static void normalise(F32 squares, int64_t D, float* values) {
  F32 length = sqrt(squares);
  length = select(length < F32(1e-12f), F32(1e-12f), length);  // keeps a NaN
  for (int64_t d = 0; d < D; ++d) (F32::load(values + d * PANEL) / length).store(values + d * PANEL);
}

template <typename T>
static void pack_panel(const Codebook& book, const int32_t* chosen, int64_t panel, float* out) {
  const int64_t D = book.dim, first = panel * PANEL;
  const int lanes = int(at_most(book.count - first, PANEL));
  auto code = [&](int64_t i) {
    return (const T*)book.codes + (chosen == nullptr ? i : int64_t(chosen[i])) * D;
  };
  const T* end = code(book.count - 1) + D;
  for (int half = 0; half < PANEL; half += W) {
    float* values = out + PANEL + half;
    const int n = lanes - half < 0 ? 0 : int(at_most(lanes - half, W));
    F32 squares = turn_codes([&](int i) { return code(first + half + i); }, n, D, end, values);
    if (book.metric == Metric::cosine) normalise(squares, D, values);
    (book.metric == Metric::l2 ? F32(0.5f) * squares : F32(0.f)).store(out + half);
  }
  for (int lane = lanes; lane < PANEL; ++lane) out[lane] = INFINITE;
}

void pack_codes(const Codebook& book, const int32_t* chosen, float* packed, int64_t panel_begin,
                int64_t panel_end) {
  with_dtype(book.dtype, [&](auto t) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel, packed += panel_floats(book.dim))
      pack_panel<decltype(t)>(book, chosen, panel, packed);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
