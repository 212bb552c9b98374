// What holds for one row of contract.h's `Rows`, the same on every backend.
#pragma once

#include "core/math.h"
#include "sampling/contract.h"

namespace arimg {

struct Settings {
  float s, t, temperature;
  int64_t top_k;
  double dropped;
  int32_t min_weight;
};

// Numbers in tensors cannot be refused, so each has a meaning: a temperature that is not above 0 is greedy, a
// top-p that is not above 0 keeps the most likely token, a NaN does nothing.
static ARIMG_HD Settings settings_of(const Rows& p, int64_t entry) {
  const float s = p.guidances != nullptr ? p.guidances[entry] : p.guidance;
  Settings set{s, subtract(1.f, s), p.temperature, p.top_k, p.dropped, p.min_weight};
  if (p.top_ks != nullptr) set.top_k = p.top_ks[entry];
  if (p.temperatures != nullptr) {
    set.temperature = p.temperatures[entry];
    if (!(set.temperature > 0)) {
      set.temperature = 1;
      set.top_k = 1;
    }
  }
  if (p.top_ps != nullptr) {
    const float top_p = p.top_ps[entry];
    set.dropped = !(top_p < 1) ? 0 : top_p > 0 ? 1 - double(top_p) : 1;
  }
  if (p.min_ps != nullptr) {
    const float min_p = p.min_ps[entry];
    const float least = multiply(min_p > 0 ? min_p < 1 ? min_p : 1.f : 0.f, float(weight_one));
    set.min_weight = int32_t(least);
    if (float(set.min_weight) < least) ++set.min_weight;  // rounded up
  }
  return set;
}

template <typename T>
static ARIMG_HD const T* row_at(const Plane& p, const Rows& rows, int64_t r) {
  if (p.data == nullptr) return nullptr;
  return static_cast<const T*>(p.data) + r / rows.tokens * p.entry_stride + r % rows.tokens * p.token_stride;
}

static ARIMG_HD uint64_t seed_of(const Draws& d, int64_t entry) {
  return d.seeds != nullptr ? uint64_t(d.seeds[entry]) : d.first_seed + uint64_t(entry);
}

static ARIMG_HD uint64_t position_of(const Draws& d, int64_t token) {
  return d.position + uint64_t(token) + (d.offset != nullptr ? uint64_t(*d.offset) : 0);
}

}  // namespace arimg
