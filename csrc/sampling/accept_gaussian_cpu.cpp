// See accept_gaussian_contract.h. A row costs what its accepted tokens and its tries need, no more.
#include "core/simd.h"
#include "sampling/accept_gaussian_contract.h"

namespace arimg {
namespace ARIMG_SIMD {

static double ratio_of(RatioLane (&lanes)[gaussian_lanes], double log_sigma) {
  for (int half = gaussian_lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k].merge(lanes[k + half]);
  return lanes[0].ratio(log_sigma);
}

template <typename T>
static double ratio_of_draft(const GaussianAccept& g, int64_t r, int64_t j) {
  RatioLane lanes[gaussian_lanes];
  for (int64_t i = 0; i < g.width; ++i) add_draft<T>(lanes[i % gaussian_lanes], g, r, j, i);
  return ratio_of(lanes, log_sigma_of(g, r, j));
}

// f(i, z) for every component of a try.
template <typename F>
static void each_normal(const GaussianAccept& g, uint64_t seed, uint64_t position, int64_t t, const F& f) {
  for (int64_t i = 0; i < g.width; i += 4) {
    const Philox4 x = noise_of(g, seed, position, t, i / 4);
    const int64_t left = g.width - i;
    double z[4] = {};
    normal_pair(x.word[0], x.word[1], z[0], z[1]);
    if (left > 2) normal_pair(x.word[2], x.word[3], z[2], z[3]);
    for (int k = 0; k < 4 && k < left; ++k) f(i + k, z[k]);
  }
}

// Draws token j again; returns the number of tries.
template <typename T>
static int64_t redraw(const GaussianAccept& g, int64_t r, int64_t j, T* value) {
  const uint64_t seed = seed_of(g, r), position = position_of(g, r, j);
  int64_t t = 0;
  for (; t + 1 < g.max_tries; ++t) {
    RatioLane lanes[gaussian_lanes];
    each_normal(g, seed, position, t,
                [&](int64_t i, double z) { add_try<T>(lanes[i % gaussian_lanes], g, r, j, i, z); });
    if (accepts_try(ratio_of(lanes, log_sigma_of(g, r, j)), seed, position, t)) break;
  }
  each_normal(g, seed, position, t,
              [&](int64_t i, double z) { value[i] = from_float<T>(float(redrawn<T>(g, r, j, i, z))); });
  return t + 1;
}

template <typename T>
static void accept_row(const GaussianAccept& g, int64_t r) {
  T* values = static_cast<T*>(g.values) + r * g.tokens * g.width;
  const T* x = static_cast<const T*>(g.x.data) + r * g.x.row;
  for (int64_t j = 0; j < g.tokens; ++j)
    for (int64_t i = 0; i < g.width; ++i) values[j * g.width + i] = x[j * g.x.token + i * g.x.component];
  int64_t accepted = 0;
  while (accepted < g.tokens &&
         accepts_draft(ratio_of_draft<T>(g, r, accepted), seed_of(g, r), position_of(g, r, accepted)))
    ++accepted;
  const bool rejected = accepted < g.tokens;
  g.length[r] = rejected ? accepted + 1 : accepted;
  g.tries[r] = rejected ? redraw<T>(g, r, accepted, values + accepted * g.width) : 0;
}

void gaussian_accept(const GaussianAccept& g, int64_t begin, int64_t end) {
  with_dtype(g.dtype, [&](auto t) {
    for (int64_t r = begin; r < end; ++r) accept_row<decltype(t)>(g, r);
  });
}

}  // namespace ARIMG_SIMD
}  // namespace arimg
