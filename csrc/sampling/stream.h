// Which random numbers the rows of a call use: row r has a seed and a first position of its own.
#pragma once

#include "core/dtype.h"

namespace arimg {

struct Stream {
  const int64_t* seeds;  // [rows], or nullptr: first_seed + row
  uint64_t first_seed;
  const int64_t* positions;  // [rows] or, with one_position, [1], added to position; or nullptr
  bool one_position;
  uint64_t position;
};

static ARIMG_HD uint64_t seed_of(const Stream& s, int64_t row) {
  return s.seeds ? uint64_t(s.seeds[row]) : s.first_seed + uint64_t(row);
}

static ARIMG_HD uint64_t position_of(const Stream& s, int64_t row, int64_t token) {
  const uint64_t own = s.positions ? uint64_t(s.positions[s.one_position ? 0 : row]) : 0;
  return s.position + uint64_t(token) + own;
}

}  // namespace arimg
