// From logits to kept integer weights, one block per row (contract.h), for *_cuda.cu files: what `sample` and
// the acceptance of drafts share. The row is transformed once into shared memory (or, where it does not fit,
// again in each pass); thresholds are found digit by digit on integers in the order of the floats, from
// histograms of counts or of weights. All sums are of integers, so the order of the atomics does not matter.
#pragma once

#include "core/cuda.h"
#include "core/math.h"
#include "sampling/row.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int bins = 2048;  // digits of 11, 11 and 10 bits
typedef unsigned long long Mass;

// Unsigned integers in the order of the floats, without NaN and -0.
__device__ __forceinline__ uint32_t key(float x) {
  const uint32_t b = float_bits(x);
  return b ^ (b >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ bool is_member(const uint8_t* set, bool bits, int i) {
  return bits ? set[i >> 3] >> (i & 7) & 1 : set[i] != 0;
}

// The processors as one row meets them; nullptr: none.
struct RowProcessors {
  const uint8_t* seen;
  const float* factor;
  const float* bias;
  const uint8_t* allowed;
  float penalty;
  bool seen_bits, allowed_bits, multiply_negative;

  __device__ __forceinline__ float operator()(float x, int i) const {
    if (seen != nullptr && is_member(seen, seen_bits, i))
      x = x < 0 ? multiply(x, penalty) : divide(x, penalty);
    if (factor != nullptr) x = x < 0 && !multiply_negative ? divide(x, factor[i]) : multiply(x, factor[i]);
    if (bias != nullptr) x = x + bias[i];
    if (allowed != nullptr && !is_member(allowed, allowed_bits, i)) x = -INFINITY;
    return x;
  }
};

__device__ __forceinline__ RowProcessors processors_of(const Rows& p, int64_t r) {
  const Processors& q = p.processors;
  return {row_at<uint8_t>(q.seen.plane, p, r),
          row_at<float>(q.factor, p, r),
          row_at<float>(q.bias, p, r),
          row_at<uint8_t>(q.allowed.plane, p, r),
          q.penalty,
          q.seen.bits,
          q.allowed.bits,
          q.multiply_negative};
}

// x of a row, from shared memory or, where the row does not fit, from the logits each time.
template <typename T, bool cached, bool processed>
struct Row {
  const T* cond;
  const T* uncond;  // nullptr: no guidance
  Settings set;
  int count;
  Shared<float> cache;
  RowProcessors processors;

  __device__ __forceinline__ float transform(int i) const {
    float x = to_float(cond[i]);
    if (uncond != nullptr) x = fma(set.s, x, multiply(set.t, to_float(uncond[i])));
    if constexpr (processed) x = processors(x == x ? x : -INFINITY, i);
    if (set.temperature != 1.f) x = divide(x, set.temperature);
    return x == x ? x + 0.f : -INFINITY;
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (cached) return cache[i];
    return transform(i);
  }
};

// What is left of a row.
struct Kept {
  float top;
  uint32_t least;   // of top-k
  uint32_t cut;     // of top-p; 0: none
  int last_at_cut;  // of the entries at the cut, those up to this index are kept
  int32_t min_weight;

  __device__ __forceinline__ uint32_t weight(float x, int i) const {
    const uint32_t k = key(x);
    if (k < least || k < cut || (k == cut && i > last_at_cut)) return 0;
    const int32_t w = x == top ? weight_one : exp_weight(subtract(x, top));
    return w < min_weight ? 0u : uint32_t(w);
  }
};

// The sum over the lanes up to and including this one.
__device__ __forceinline__ Mass warp_scan(Mass value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass below = __shfl_up_sync(full_warp, value, step);
    if (lane_in_warp() >= step) value += below;
  }
  return value;
}

// The sum over the threads before this one; `scratch` has 32 elements.
__device__ __forceinline__ Mass block_scan_before(Mass value, Shared<Mass> scratch) {
  const Mass upto = warp_scan(value);
  if (lane_in_warp() == 31) scratch[warp_in_block()] = upto;
  __syncthreads();
  Mass before = upto - value;
  for (int w = 0; w < warp_in_block(); ++w) before += scratch[w];
  __syncthreads();
  return before;
}

// 64-bit sums from 32-bit atomics: a shared 64-bit atomicAdd is a loop of compare-and-swap on these GPUs.
struct Histogram {
  Shared<uint32_t> low, high;

  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < bins; i += blockDim.x) low[i] = high[i] = 0;
  }
  __device__ __forceinline__ void add(int bin, uint32_t mass) const {
    const uint32_t before = atomicAdd(&low[bin], mass);
    if (before + mass < before) atomicAdd(&high[bin], 1u);
  }
  __device__ __forceinline__ Mass operator[](int bin) const { return Mass(high[bin]) << 32 | low[bin]; }
};

struct Cut {
  uint32_t key;  // of the smallest entry with mass(> x) < budget
  Mass above;    // that mass
  Mass at;       // the mass of the entries that equal it
};

struct Found {
  Mass above, at;
  uint32_t digit;
};

// The shared memory that the searches of a block work with.
struct Tools {
  Histogram histogram;
  Shared<Mass> scratch;  // [32]
  Shared<Found> found;   // [1]
  Shared<float> maxima;  // [32]
};

// In `histogram` (from the last bin down): where the mass, `above` from the start, reaches the budget.
__device__ __forceinline__ Found find_digit(const Tools& tools, Mass above, Mass budget) {
  const Histogram& histogram = tools.histogram;
  const int each = bins / int(blockDim.x);
  const int first = bins - 1 - int(threadIdx.x) * each;
  Mass sum = 0;
  for (int j = 0; j < each; ++j) sum += histogram[first - j];
  Mass before = above + block_scan_before(sum, tools.scratch);
  if (before < budget && before + sum >= budget) {
    int bin = first;
    for (; before + histogram[bin] < budget; --bin) before += histogram[bin];
    tools.found[0] = Found{before, histogram[bin], uint32_t(bin)};
  }
  __syncthreads();
  const Found result = tools.found[0];
  __syncthreads();
  return result;
}

// mass: the weights that are left, or 1 for each entry. Their sum must reach the budget.
template <bool weighted, typename R>
__device__ Cut find_cut(const R& row, const Kept& kept, Mass budget, const Tools& tools) {
  Cut cut{0, 0, 0};
  int end = 32;  // cut.key holds the bits from there on
#pragma unroll 1
  while (end > 0) {
    const int width = end > 10 ? 11 : 10, shift = end - width;
    tools.histogram.clear();
    __syncthreads();
    for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
      const float x = row[i];
      const uint32_t k = key(x);
      if (uint64_t(k) >> end != cut.key) continue;
      const uint32_t mass = weighted ? kept.weight(x, i) : 1;
      if (mass) tools.histogram.add(int(k >> shift & ((1u << width) - 1)), mass);
    }
    __syncthreads();
    const Found at = find_digit(tools, cut.above, budget);
    cut = Cut{cut.key << width | at.digit, at.above, at.at};
    end = shift;
  }
  return cut;
}

// Each warp owns a run of neighbouring entries, so that a search in index order touches one warp's run.
struct Run {
  int begin, end;
};
__device__ __forceinline__ Run run_of_warp(int count) {
  const int tiles = (count + 31) / 32, warps = warps_in_block();
  const int length = (tiles + warps - 1) / warps * 32;
  const int begin = warp_in_block() * length;
  return {begin < count ? begin : count, begin + length < count ? begin + length : count};
}

// The first index at which the running sum of mass(i) exceeds floor(u * total) = pick(total). The total must
// not be 0. All threads get the result.
template <typename MassOf, typename Pick>
__device__ int find_index(int count, const Tools& tools, MassOf mass, Pick pick) {
  const Shared<Mass> scratch = tools.scratch;
  const Run run = run_of_warp(count);
  const int lane = lane_in_warp();
  Mass sum = 0;
  for (int i = run.begin + lane; i < run.end; i += 32) sum += mass(i);
  sum = warp_reduce_sum(sum);
  if (lane == 0) scratch[warp_in_block()] = sum;
  __syncthreads();
  Mass before = 0, total = 0;
  for (int w = 0; w < warps_in_block(); ++w) {
    if (w < warp_in_block()) before += scratch[w];
    total += scratch[w];
  }
  const Mass target = pick(total);
  if (target >= before && target - before < sum) {  // true for one whole warp
    for (int base = run.begin;; base += 32) {
      const int i = base + lane;
      const Mass upto = before + warp_scan(i < run.end ? mass(i) : 0);
      const unsigned beyond = __ballot_sync(full_warp, upto > target);
      if (beyond) {
        if (lane == 0) tools.found[0].digit = uint32_t(base + __ffs(int(beyond)) - 1);
        break;
      }
      before = __shfl_sync(full_warp, upto, 31);
    }
  }
  __syncthreads();
  const int index = int(tools.found[0].digit);
  __syncthreads();
  return index;
}

template <typename R>
__device__ void apply_top_p(const R& row, Kept& kept, double dropped, const Tools& tools) {
  Mass sum = 0;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) sum += kept.weight(row[i], i);
  const Mass total = block_reduce_sum(sum, tools.scratch);
  const Mass limit = Mass(dropped * double(total));
  const Mass budget = limit < total ? total - limit : 1;
  const Cut cut = find_cut<true>(row, kept, budget, tools);
  kept.cut = cut.key;
  const Mass left = budget - cut.above;  // for the entries at the cut: kept while the sum before is below
  if (left >= cut.at) return;
  kept.last_at_cut = find_index(
      row.count, tools, [&](int i) { return key(row[i]) == cut.key ? Mass(kept.weight(row[i], i)) : 0; },
      [&](Mass) { return left - 1; });
}

// --- a whole row -------------------------------------------------------------------------------------------

constexpr size_t tools_bytes = 2 * shared_bytes<uint32_t>(bins) + shared_bytes<Mass>(32) +
                               shared_bytes<Found>(1) + shared_bytes<float>(32);

__device__ __forceinline__ Tools take_tools(SharedArena& arena) {
  Tools t;
  t.histogram = Histogram{arena.take<uint32_t>(bins), arena.take<uint32_t>(bins)};
  t.scratch = arena.take<Mass>(32);
  t.found = arena.take<Found>(1);
  t.maxima = arena.take<float>(32);
  return t;
}

// Row r of p; `cache` has room for its entries, or none. Usable after prepare().
template <typename T, bool cached, bool processed>
__device__ __forceinline__ Row<T, cached, processed> row_of(const Rows& p, int64_t r, Shared<float> cache) {
  const T* cond = static_cast<const T*>(p.logits) + r * p.row_stride;
  Row<T, cached, processed> row{cond,
                                p.guided ? cond + p.rows * p.row_stride : nullptr,
                                settings_of(p, r / p.tokens),
                                int(p.vocabulary),
                                cache,
                                {}};
  if constexpr (processed) row.processors = processors_of(p, r);
  return row;
}

// Fills the cache; what the filters keep of the row. A row always keeps something: without any x above -inf
// its first entry. All threads take part.
template <typename T, bool cached, bool processed>
__device__ __forceinline__ Kept prepare(const Row<T, cached, processed>& row, const Tools& tools) {
  float top = -INFINITY;
  for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
    const float x = row.transform(i);
    if constexpr (cached) row.cache[i] = x;
    top = fmaxf(top, x);
  }
  top = block_reduce_max(top, -INFINITY, tools.maxima);  // its barriers also publish the cache
  Kept kept{top, 0, 0, row.count, 0};
  if (top == -INFINITY || row.set.top_k == 1) {
    kept.cut = key(top);
    kept.last_at_cut = find_index(
        row.count, tools, [&](int i) { return Mass(row[i] == top); }, [](Mass) { return Mass(0); });
    return kept;
  }
  if (row.set.top_k > 0 && row.set.top_k < row.count)
    kept.least = find_cut<false>(row, kept, Mass(row.set.top_k), tools).key;
  if (row.set.dropped > 0) apply_top_p(row, kept, row.set.dropped, tools);
  kept.min_weight = row.set.min_weight;
  return kept;
}

}  // namespace
}  // namespace arimg
