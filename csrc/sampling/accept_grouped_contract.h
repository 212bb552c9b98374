// Grouped acceptance: the masses of p and q (accept_contract.h) of a group of tokens around each draft, which
// the tests compare instead of the draft's own. Around the draft d of law p[r, j]:
//
//   groups  the part of a partition: all tokens with d's number
//   ranks   without `groups`: in the ascending order of (weight_p, index), the ranks [rank(d) - half,
//           rank(d) + half), without tokens whose mass_p differs from d's by more than `limit`, and, with an
//           embedding, those whose squared distance from d's is larger than max_distance
//
// A draft that was fixed in advance has the whole mass of q to itself; an absent one has masses 0. Sums of
// integers: the same on every backend. Distances are summed in float64 in eight lanes, i mod 8, and halved.
#pragma once

#include "core/math64.h"
#include "sampling/accept_contract.h"

namespace arimg {

constexpr int largest_half = 512;
constexpr uint64_t whole_mass = uint64_t(0xffffffff) << 30;  // mass_of a weight that is the whole sum

struct GroupMasses : Window {
  const int32_t* groups;  // [vocabulary], or nullptr: ranks
  int half;               // 1 to largest_half
  int64_t limit;
  const void* embedding;  // [vocabulary, width], or nullptr
  DType dtype;            // of the embedding
  int64_t width;
  double max_distance;
  int64_t* p_mass;  // [rows, drafts]
  int64_t* q_mass;
};

// Items are drafts: [begin, end) of rows * drafts.
ARIMG_CPU_KERNEL(void, group_masses, (const GroupMasses& p, int64_t begin, int64_t end))
Status group_masses_cuda(const GroupMasses& p, void* stream);

// --- what both kernels share ------------------------------------------------------------------------------

// Tokens in the order of (weight, index).
typedef unsigned long long TokenKey;

static ARIMG_HD TokenKey key_of(int32_t weight, int64_t token) {
  return TokenKey(uint32_t(weight)) << 24 | TokenKey(token);
}
static ARIMG_HD int64_t token_of(TokenKey key) {
  return int64_t(key & 0xffffff);
}
static ARIMG_HD int32_t weight_of(TokenKey key) {
  return int32_t(key >> 24);
}

// The mass of q of one token: of a fixed draft all of it.
static ARIMG_HD uint64_t q_mass_of(const Spot& s, Scale q, int64_t token) {
  return s.q ? mass_of(s.q[token], q) : token == s.draft ? whole_mass : 0;
}

// Whether p's mass of a token differs from that of the draft by no more than the limit.
static ARIMG_HD bool within_limit(uint64_t mass, uint64_t own, int64_t limit) {
  return (mass > own ? mass - own : own - mass) <= uint64_t(limit);
}

constexpr int distance_lanes = 8;

// One lane of the squared distance of two tokens' embeddings.
template <typename T>
static ARIMG_HD double distance_lane(const GroupMasses& g, int64_t a, int64_t b, int lane) {
  const T* x = static_cast<const T*>(g.embedding) + a * g.width;
  const T* y = static_cast<const T*>(g.embedding) + b * g.width;
  double sum = 0;
  for (int64_t i = lane; i < g.width; i += distance_lanes) {
    const double difference = double(to_float(x[i])) - double(to_float(y[i]));
    sum = fma(difference, difference, sum);
  }
  return sum;
}

}  // namespace arimg
