// Speculative acceptance: a window of drafted tokens is tested against the laws of the target, and each row
// commits what the target itself could have drawn. The output law is exactly the target's, whatever the
// drafts.
//
// A law is a row of integer weights and their sum, as contract.h makes them. Laws p[r, 0 .. drafts] belong to
// the positions position[r] + j; draft j was drawn from law q[r, q_start[r] + j], and a draft whose law lies
// beyond q_laws (or without q) was fixed in advance: its law is one there. For j = 0, 1, ...:
//
//   accept    draw_below(Q) < P, with P = mass_p(draft), Q = mass_q(draft), draw number 1;
//             a fixed draft: draw_below(sum of p's weights) < weight_p(draft)
//   reject    at the first j that is not accepted: a draw from max(0, mass_p - mass_q), draw number 2
//             (a fixed draft: from p without it), and the rest of the row is the tail
//   all       a draw from p[drafts], draw number 0, as `sample` draws it
//   length    accepted drafts + 1; a draft outside of [0, vocabulary) means that there is none: rejected, and
//             the token is drawn from all of p
//   tail      none: -1. redraw: from p[j], draw number 0, as `sample` draws it: the noise of a position stays
//             the same from call to call. couple: the same test and residual with draw numbers 3 + 2 step and
//             4 + 2 step, so that a tail draft stays as it was with probability 1 - TV(p, q). gumbel: the
//             token with the smallest exponential(its number of draw 0) / weight, as `sample` chooses it:
//             the noise belongs to the position and the token.
//
// mass scales weights to a sum of 2^62 (1 - 2^-31 at most below), so that p and q compare as integers: no
// result depends on the order of a summation, and the output law is off by less than 2^-30 in total
// variation. Needs no pass over the vocabulary but one for the residual and one for each token of the tail.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/philox.h"
#include "core/simd_level.h"
#include "core/status.h"
#include "sampling/contract.h"
#include "sampling/stream.h"

namespace arimg {

// The law of each row of logits.
struct TokenLaw : Rows {
  int32_t* weights;  // [rows, vocabulary]
  int64_t* totals;   // [rows]
};

ARIMG_CPU_KERNEL(void, token_law, (const TokenLaw& p, int64_t begin, int64_t end, void* workspace))
Status token_law_cuda(const TokenLaw& p, void* stream);

enum class Tail : int64_t { none, redraw, couple, gumbel };

// Drafts with the laws that they are tested by.
struct Window : Stream {
  const int32_t* p;        // [rows, drafts + 1, vocabulary]
  const int64_t* p_total;  // [rows, drafts + 1]
  const int32_t* q;        // [rows, q_laws, vocabulary], or nullptr
  const int64_t* q_total;  // [rows, q_laws]
  int64_t q_laws;
  const int64_t* q_start;  // [rows], or nullptr: 0
  const int64_t* draft;    // [rows, drafts]
  int64_t rows, drafts, vocabulary;
};

struct Accept : Window {
  const int64_t* p_mass;  // [rows, drafts], or nullptr: what the test compares instead of the draft's own
  const int64_t* q_mass;  // masses (grouped acceptance), in units of 2^-62
  const int64_t* steps;   // [1], added to step; or nullptr
  uint64_t step;
  Tail tail;
  int64_t* tokens;  // [rows, drafts + 1]
  int64_t* length;  // [rows]
};

// The items of a row are its drafts + 1 tokens: items [begin, end) of rows * (drafts + 1).
ARIMG_CPU_KERNEL(void, accept, (const Accept& p, int64_t begin, int64_t end))
Status accept_cuda(const Accept& p, void* stream);

// --- what both kernels share ------------------------------------------------------------------------------

// 2^62 / total as factor * 2^(left - right).
struct Scale {
  uint32_t factor;
  int right, left;
};

static ARIMG_HD Scale scale_of(int64_t total) {
  const double value = double(total);
  uint64_t b;
  memcpy(&b, &value, 8);
  if (total <= 0) return {0, 0, 0};
  const int shift = int(b >> 52) - 1022 - 31;  // value = m 2^(shift + 31) with m in [1/2, 1)
  b = (b & 0xfffffffffffffu) | uint64_t(1022) << 52;
  double m;
  memcpy(&m, &b, 8);
  const double factor = 0x1p31 / m;
  return {factor < 0x1p32 ? uint32_t(factor) : 0xffffffffu, shift > 0 ? shift : 0, shift < 0 ? -shift : 0};
}

static ARIMG_HD uint64_t mass_of(int32_t weight, Scale s) {
  return (uint64_t(uint32_t(weight)) * s.factor >> s.right) << s.left;
}

// One token of the window, with the laws that it is drawn and tested by.
struct Spot {
  const int32_t* p;
  const int32_t* q;  // nullptr: a fixed draft, or none
  int64_t p_total, q_total;
  int64_t draft;  // -1: none
  uint64_t seed, position;
};

static ARIMG_HD Spot spot_of(const Window& a, int64_t r, int64_t j) {
  Spot s{};
  const int64_t law = r * (a.drafts + 1) + j;
  s.p = a.p + law * a.vocabulary;
  s.p_total = a.p_total[law];
  s.seed = seed_of(a, r);
  s.position = position_of(a, r, j);
  s.draft = j < a.drafts ? a.draft[r * a.drafts + j] : -1;
  if (s.draft < 0 || s.draft >= a.vocabulary) s.draft = -1;
  const int64_t from = (a.q_start ? a.q_start[r] : 0) + j;
  if (s.draft >= 0 && a.q && from >= 0 && from < a.q_laws) {
    s.q = a.q + (r * a.q_laws + from) * a.vocabulary;
    s.q_total = a.q_total[r * a.q_laws + from];
  }
  return s;
}

static ARIMG_HD bool accepts(const Spot& s, uint32_t draw) {
  if (s.draft < 0) return false;
  const int32_t weight = s.p[s.draft];
  if (!s.q) return draw_below(uint64_t(s.p_total), s.seed, s.position, draw) < uint64_t(uint32_t(weight));
  const uint64_t q = mass_of(s.q[s.draft], scale_of(s.q_total));
  return draw_below(q, s.seed, s.position, draw) < mass_of(weight, scale_of(s.p_total));
}

// The test of draft j of row r within the window.
static ARIMG_HD bool accepts_draft(const Accept& a, int64_t r, int64_t j) {
  const Spot s = spot_of(a, r, j);
  if (!a.p_mass || s.draft < 0) return accepts(s, 1);
  const int64_t at = r * a.drafts + j;
  return draw_below(uint64_t(a.q_mass[at]), s.seed, s.position, 1) < uint64_t(a.p_mass[at]);
}

static ARIMG_HD uint32_t coupled_draw(const Accept& a) {
  return uint32_t(3 + 2 * (a.step + (a.steps ? uint64_t(a.steps[0]) : 0)));
}

}  // namespace arimg
