// Speculative acceptance of continuous tokens: drafts x[r, j] that their last step drew from N(q_mean, q_std)
// are tested against N(p_mean, p_std), d components each, all independent. In log space and double precision:
//
//   ratio     log_sigma + sum_i log(q_std / p_std) + ((x - q_mean) / q_std)^2 / 2 - ((x - p_mean) / p_std)^2
//   / 2 accept    log u < ratio, left to right, u of draw number 1 redraw    the first rejected token: try t
//   = 0, 1, ... is x' = p_mean + p_std z with the normal numbers z of
//             draws 2^31 + t ceil(d / 4) + i (four each: Box and Muller, words 0 and 1, words 2 and 3), taken
//             if log(1 - u) > -ratio(x'), u of draw 2^30 + t; the last of max_tries is taken anyway
//   length    accepted + 1, at most n; tries: those of the redraw, 0 without one
//
// values are the drafts but for the redrawn token; nothing behind it is final. A deviation that is not
// positive and finite, or a NaN, makes the ratio NaN: the draft is rejected, and the last try stands. u =
// (word + 1/2) 2^-32. Sums over i go in eight lanes, i mod 8, that are halved: the same bits on every
// backend.
#pragma once

#include "core/math64.h"
#include "core/philox.h"
#include "core/simd_level.h"
#include "core/status.h"
#include "sampling/stream.h"

namespace arimg {

// [rows, tokens, components]; a stride is 0 where the numbers are shared.
struct Field {
  const void* data;
  int64_t row, token, component;  // elements
};

struct GaussianAccept : Stream {
  DType dtype;  // of all five
  Field x, p_mean, p_std, q_mean, q_std;
  int64_t rows, tokens, width;
  double log_sigma;
  const double* log_sigmas;  // [rows, tokens], or nullptr; added to log_sigma
  int64_t max_tries;         // 1 to 2^16
  void* values;              // [rows, tokens, width]
  int64_t* length;           // [rows]
  int64_t* tries;            // [rows]
};

ARIMG_CPU_KERNEL(void, gaussian_accept, (const GaussianAccept& p, int64_t begin, int64_t end))
Status gaussian_accept_cuda(const GaussianAccept& p, void* stream);

// --- what both kernels share ------------------------------------------------------------------------------

constexpr int gaussian_lanes = 8;
constexpr uint32_t gaussian_retry = 1u << 30, gaussian_noise = 1u << 31;

// A product of numbers too many for the range of a double.
struct LongProduct {
  double mantissa = 1;
  int exponent = 0;
  ARIMG_HD void times(double x) {  // positive, 2^-300 to 2^300
    const uint64_t b = double_bits(multiply(mantissa, x));
    exponent += int(b >> 52 & 0x7ff) - 1023;
    mantissa = bits_double((b & 0xfffffffffffffu) | uint64_t(1023) << 52);
  }
};

// One lane's part of a token's ratio.
struct RatioLane {
  LongProduct scale;     // of q_std / p_std
  double quadratic = 0;  // of the differences of squares
  int usable = 1;
  ARIMG_HD void deviations(double p_std, double q_std) {
    const double largest = 0x1p128;
    usable &= p_std > 0 && p_std < largest && q_std > 0 && q_std < largest;
    scale.times(q_std / p_std);
  }
  ARIMG_HD void distances(double z_q, double z_p) { quadratic = fma(z_q - z_p, z_q + z_p, quadratic); }
  ARIMG_HD void merge(const RatioLane& other) {
    scale.mantissa = multiply(scale.mantissa, other.scale.mantissa);  // of eight lanes below 2^8
    scale.exponent += other.scale.exponent;
    quadratic += other.quadratic;
    usable &= other.usable;
  }
  ARIMG_HD double ratio(double log_sigma) const {
    const double constant = log_sigma + log_of(scale.mantissa, scale.exponent);
    return usable ? fma(0.5, quadratic, constant) : bits_double(0x7ff8000000000000u);
  }
};

// Component i of token j of row r.
template <typename T>
static ARIMG_HD double component_of(const Field& f, int64_t r, int64_t j, int64_t i) {
  const int64_t at = r * f.row + j * f.token + i * f.component;
  return double(to_float(static_cast<const T*>(f.data)[at]));
}

static ARIMG_HD double log_sigma_of(const GaussianAccept& g, int64_t r, int64_t j) {
  return g.log_sigma + (g.log_sigmas ? g.log_sigmas[r * g.tokens + j] : 0);
}

static ARIMG_HD double unit_number(uint32_t word) {
  return multiply(double(word) + 0.5, 0x1p-32);
}

static ARIMG_HD bool accepts_draft(double ratio, uint64_t seed, uint64_t position) {
  return log_of(unit_number(philox(seed, position, 1).word[0])) < ratio;
}

static ARIMG_HD bool accepts_try(double ratio, uint64_t seed, uint64_t position, int64_t t) {
  const uint32_t word = philox(seed, position, gaussian_retry + uint32_t(t)).word[0];
  return log_of(unit_number(~word)) > -ratio;  // 1 - u
}

static ARIMG_HD Philox4 noise_of(const GaussianAccept& g, uint64_t seed, uint64_t position, int64_t t,
                                 int64_t block) {
  return philox(seed, position, gaussian_noise + uint32_t(t * ((g.width + 3) / 4) + block));
}

static ARIMG_HD void normal_pair(uint32_t a, uint32_t b, double& first, double& second) {
  const double radius = square_root(multiply(-2.0, log_of(unit_number(a))));
  double cosine, sine;
  cos_sin_of_turn(unit_number(b), cosine, sine);
  first = multiply(radius, cosine);
  second = multiply(radius, sine);
}

// Adds component i of the draft to its lane.
template <typename T>
static ARIMG_HD void add_draft(RatioLane& lane, const GaussianAccept& g, int64_t r, int64_t j, int64_t i) {
  const double x = component_of<T>(g.x, r, j, i);
  const double ps = component_of<T>(g.p_std, r, j, i), qs = component_of<T>(g.q_std, r, j, i);
  lane.deviations(ps, qs);
  lane.distances((x - component_of<T>(g.q_mean, r, j, i)) / qs,
                 (x - component_of<T>(g.p_mean, r, j, i)) / ps);
}

template <typename T>
static ARIMG_HD double redrawn(const GaussianAccept& g, int64_t r, int64_t j, int64_t i, double z) {
  return fma(component_of<T>(g.p_std, r, j, i), z, component_of<T>(g.p_mean, r, j, i));
}

// Adds component i of a try with the normal number z.
template <typename T>
static ARIMG_HD void add_try(RatioLane& lane, const GaussianAccept& g, int64_t r, int64_t j, int64_t i,
                             double z) {
  const double qs = component_of<T>(g.q_std, r, j, i);
  lane.deviations(component_of<T>(g.p_std, r, j, i), qs);
  lane.distances((redrawn<T>(g, r, j, i, z) - component_of<T>(g.q_mean, r, j, i)) / qs, z);
}

}  // namespace arimg
