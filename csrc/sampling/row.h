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

static ARIMG_HD Settings settings_of(const Rows& p, int64_t entry) {
  const float s = p.guidances != nullptr ? p.guidances[entry] : p.guidance;
  return {s, subtract(1.f, s), p.temperature, p.top_k, p.dropped, p.min_weight};
}

static ARIMG_HD uint64_t seed_of(const Draws& d, int64_t entry) {
  return d.seeds != nullptr ? uint64_t(d.seeds[entry]) : d.first_seed + uint64_t(entry);
}

static ARIMG_HD uint64_t position_of(const Draws& d, int64_t token) {
  return d.position + uint64_t(token) + (d.offset != nullptr ? uint64_t(*d.offset) : 0);
}

}  // namespace arimg
