// See linear_rows.h. Sixteen outputs per block; its warps share the inputs and add up in a fixed order.
//
// 16-bit x: tensor cores, m16n8k16 with 16 rows of weights as A and 8 rows of x as B, so up to 8 rows cost
// what one does (rows beyond 8 take a second product with the same weights). Which input stands for which k
// is free, as long as A and B agree: a lane takes WORDS consecutive words of its two rows of weights, in
// fours. 32-bit x: multiply-adds in fp32, four outputs per warp, lanes along the inputs.
#include "block/activation_cuda.h"
#include "core/mma.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int OUTPUTS = 16;  // per block
constexpr int WARPS = 8;     // of the tensor core kernel
constexpr int AHEAD = 4;     // spans whose weights are loaded together

struct Int4 {};

template <typename TW>
constexpr int bits_of = 8 * sizeof(TW);
template <>
constexpr int bits_of<Int4> = 4;

template <typename TW>
constexpr bool scaled = bits_of<TW> <= 8;

// Inputs that a row of weights holds.
template <typename TW>
__device__ __forceinline__ int64_t stored_inputs(const LinearRows& p) {
  return scaled<TW> ? whole_blocks(p.in) : p.in;
}

template <typename T>
__device__ __forceinline__ float optional_value(const void* p, int64_t i) {
  return p == nullptr ? 0.f : to_float(static_cast<const T*>(p)[i]);
}

// Output o of row m from its sums.
template <typename T>
__device__ __forceinline__ void finish(const LinearRows& p, float sum, float factor, int64_t m, int64_t o) {
  float y = activate(p.activation, sum + optional_value<T>(p.weight.bias, o));
  if (p.factor.data != nullptr) y *= factor + optional_value<T>(p.factor.bias, o);
  y += optional_value<T>(p.residual, m * p.outs + o);
  static_cast<T*>(p.out)[m * p.outs + o] = from_float<T>(y);
}

// Rows beyond the last are read as the last; their sums go nowhere.
__device__ __forceinline__ const char* weight_row(const LinearRows& p, const LinearRows::Weight& weight,
                                                  int64_t o) {
  return static_cast<const char*>(weight.data) + (o < p.outs ? o : p.outs - 1) * weight.row_bytes;
}
__device__ __forceinline__ float weight_scale(const LinearRows& p, const LinearRows::Weight& weight,
                                              int64_t o, int64_t group) {
  return weight.scale[(o < p.outs ? o : p.outs - 1) * linear_groups(p) + group];
}

// Byte i of `bytes`, unsigned, minus `zero`, exactly: the mantissa of 2^23 + byte.
__device__ __forceinline__ float byte_value(uint32_t bytes, int i, float zero) {
  return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u + unsigned(i))) - (8388608.f + zero);
}

// ---------------------------------------------------------------------------------------------------------
// Tensor cores

// Four weights as two registers of two, in the order of the products with x (`pair_x`).
template <typename T, typename TW>
struct Four {
  static __device__ __forceinline__ void weights(uint32_t (&out)[2], const uint32_t* words, int step) {
    out[0] = words[2 * step];
    out[1] = words[2 * step + 1];
  }
};
template <typename T>
struct Four<T, int8_t> {
  static __device__ __forceinline__ void weights(uint32_t (&out)[2], const uint32_t* words, int step) {
    const uint32_t bytes = words[step] ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out[i] = pack2<T>(byte_value(bytes, 2 * i, 128.f), byte_value(bytes, 2 * i + 1, 128.f));
  }
};

// Two 16-bit numbers plus two others; the sums must be exact.
template <typename T>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
#if defined(ARIMG_EMULATOR)
  float sum[2];
  for (int i = 0; i < 2; ++i)
    sum[i] = to_float(T{uint16_t(a >> 16 * i)}) + to_float(T{uint16_t(b >> 16 * i)});
  return pack2<T>(sum[0], sum[1]);
#else
  uint32_t out;  // a fused multiply by 1: compute capability 8.0 has no addition of bf16 pairs
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#endif
}

template <typename T>
struct Four<T, Int4> {
  // Steps 2q and 2q + 1 are the low and high halves of the bytes of word q, as (0, 2) and (1, 3). The code is
  // the mantissa of 128 + code in bf16, of 1024 + code in f16.
  static __device__ __forceinline__ void weights(uint32_t (&out)[2], const uint32_t* words, int step) {
    constexpr bool bf16 = std::is_same_v<T, BFloat16>;
    constexpr uint32_t base = bf16 ? 0x43004300u : 0x64006400u;
    constexpr uint32_t minus_base_and_8 = bf16 ? 0xc308c308u : 0xe408e408u;
    const uint32_t codes = words[step / 2] >> (step % 2 * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) out[i] = add2<T>((codes >> 8 * i & 0x000f000fu) | base, minus_base_and_8);
  }
};

template <typename TW>
__device__ __forceinline__ void pair_x(uint32_t (&x)[2]) {
  if constexpr (std::is_same_v<TW, Int4>) {
    const uint32_t even = __byte_perm(x[0], x[1], 0x5410u), odd = __byte_perm(x[0], x[1], 0x7632u);
    x[0] = even;
    x[1] = odd;
  }
}

// One span of inputs: 4 lanes times WORDS words of weights.
template <typename TW, int WORDS>
struct Span {
  static constexpr int lane_inputs = WORDS * 32 / bits_of<TW>;
  static constexpr int inputs = 4 * lane_inputs;
  static constexpr int steps = lane_inputs / 4;
  // The first of the four inputs of a step, within the span.
  static __device__ __forceinline__ int input(int t, int step) {
    if constexpr (std::is_same_v<TW, Int4>)
      return WORDS == 4 ? 32 * t + step / 2 * 4 + step % 2 * 16 : 4 * t + step * 16;
    else
      return t * lane_inputs + 4 * step;
  }
};

template <typename TW, int WORDS, bool vectors>
__device__ __forceinline__ void load_words(uint32_t (&out)[WORDS], const char* row, int64_t span, int t,
                                           int64_t stored) {
  using S = Span<TW, WORDS>;
  const int64_t first = span * S::inputs + t * S::lane_inputs;  // int4 of one word: only as a position
  const char* from = row + first * bits_of<TW> / 8;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) out[i] = 0;
  if constexpr (vectors || scaled<TW>) {
    if (first < stored) {
      if constexpr (WORDS == 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        out[0] = v.x;
        out[1] = v.y;
        out[2] = v.z;
        out[3] = v.w;
      } else if constexpr (WORDS == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        out[0] = v.x;
        out[1] = v.y;
      } else {
        out[0] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
  } else {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i)
      if (first + i < stored) out[i / 2] |= uint32_t(halves[i]) << (i % 2 * 16);
  }
}

// Four inputs of row m of x from input i; 0 beyond x.
template <bool vectors>
__device__ __forceinline__ void load_x(uint32_t (&out)[2], const LinearRows& p, int m, int64_t i) {
  out[0] = out[1] = 0;
  if (m >= p.rows) return;
  const uint16_t* from = static_cast<const uint16_t*>(p.x) + m * p.in + i;
  if constexpr (vectors) {
    if (i >= p.in) return;
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    out[0] = v.x;
    out[1] = v.y;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < p.in) out[j / 2] |= uint32_t(from[j]) << (j % 2 * 16);
  }
}

// This warp's part of the sums of 16 outputs from o: sums[n] has rows 8 n to 8 n + 7 of x.
template <typename T, typename TW, int WORDS, bool vectors>
__device__ __forceinline__ void warp_sums(float (&sums)[2][4], const LinearRows& p,
                                          const LinearRows::Weight& weight, int64_t o) {
  using S = Span<TW, WORDS>;
  const int lane = lane_in_warp(), g = lane / 4, t = lane % 4;
  const int64_t stored = stored_inputs<TW>(p), spans = ceil_div(stored, S::inputs);
  const bool many = p.rows > 8, grouped = scaled<TW> && linear_groups(p) > 1;
  const char* rows[2] = {weight_row(p, weight, o + g), weight_row(p, weight, o + g + 8)};
  for (int64_t first = warp_in_block(); first < spans; first += WARPS * AHEAD) {
    uint32_t words[AHEAD][2][WORDS];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        load_words<TW, WORDS, vectors>(words[a][r], rows[r], first + a * WARPS, t, stored);
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int64_t span = first + a * WARPS;
      if (span >= spans) break;
      float span_sums[2][4] = {};
#pragma unroll
      for (int step = 0; step < S::steps; ++step) {
        uint32_t upper[2], lower[2];
        Four<T, TW>::weights(upper, words[a][0], step);
        Four<T, TW>::weights(lower, words[a][1], step);
        const uint32_t A[4] = {upper[0], lower[0], upper[1], lower[1]};
        const int64_t input = span * S::inputs + S::input(t, step);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n == 1 && !many) break;
          uint32_t B[2];
          load_x<vectors>(B, p, 8 * n + g, input);
          pair_x<TW>(B);
          mma_m16n8k16<T>(scaled<TW> ? span_sums[n] : sums[n], A, B);
        }
      }
      if constexpr (scaled<TW>) {
        float scale[2] = {1.f, 1.f};
        if (grouped) {
          const int64_t group = span * S::inputs / p.group;
          for (int r = 0; r < 2; ++r) scale[r] = weight_scale(p, weight, o + g + 8 * r, group);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] = __fmaf_rn(span_sums[n][i], scale[i / 2], sums[n][i]);
      }
    }
  }
}

template <typename T, typename TW, int WORDS, bool vectors>
__global__ void __launch_bounds__(WARPS * 32, 2) linear_rows_mma_kernel(LinearRows p) {
  SharedArena arena;
  auto parts = arena.take<float>(WARPS * LINEAR_ROWS * OUTPUTS);
  const int64_t o = int64_t(blockIdx.x) * OUTPUTS;
  const int lane = lane_in_warp(), g = lane / 4, t = lane % 4, thread = threadIdx.x;
  const int row = thread / OUTPUTS, output = thread % OUTPUTS;
  float totals[2] = {};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const LinearRows::Weight& weight = side == 0 ? p.weight : p.factor;
    if (weight.data == nullptr) break;
    float sums[2][4] = {};
    warp_sums<T, TW, WORDS, vectors>(sums, p, weight, o);
    // sums[n][i] is output g + 8 (i / 2) of row 8 n + 2 t + i % 2.
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[(warp_in_block() * LINEAR_ROWS + 8 * n + 2 * t + i % 2) * OUTPUTS + g + i / 2 * 8] = sums[n][i];
    __syncthreads();
    float total = 0.f;
    for (int warp = 0; warp < WARPS; ++warp) total += parts[(warp * LINEAR_ROWS + row) * OUTPUTS + output];
    if (scaled<TW> && linear_groups(p) == 1) total *= weight_scale(p, weight, o + output, 0);
    totals[side] = total;
    __syncthreads();
  }
  if (row < p.rows && o + output < p.outs) finish<T>(p, totals[0], totals[1], row, o + output);
}

// ---------------------------------------------------------------------------------------------------------
// fp32 x

constexpr int WARP_OUTPUTS = 4;
constexpr int TILE_ROWS = 8;

// The weights of a lane in one span: four consecutive inputs, for int4 two times four.
template <typename TW>
constexpr int pieces = std::is_same_v<TW, Int4> ? 2 : 1;

template <typename TW>
__device__ __forceinline__ int64_t lane_input(int64_t span, int lane, int piece) {
  if constexpr (std::is_same_v<TW, Int4>) return span * 256 + lane / 4 * 32 + piece * 16 + lane % 4 * 4;
  return span * 128 + lane * 4;
}

template <typename TW, bool vectors>
__device__ __forceinline__ void load_weights(float (&out)[pieces<TW>][4], const char* row, int64_t span,
                                             int lane, int64_t stored) {
  const int64_t first = lane_input<TW>(span, lane, 0);
#pragma unroll
  for (int q = 0; q < pieces<TW>; ++q)
#pragma unroll
    for (int j = 0; j < 4; ++j) out[q][j] = 0.f;
  if (first >= stored) return;
  if constexpr (std::is_same_v<TW, Int4>) {
    const uint32_t bytes = reinterpret_cast<const uint32_t*>(row)[span * 32 + lane];
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[q][j] = byte_value(bytes >> 4 * q & 0x0f0f0f0fu, j, 8.f);
  } else if constexpr (std::is_same_v<TW, int8_t>) {
    const uint32_t bytes = reinterpret_cast<const uint32_t*>(row)[span * 32 + lane] ^ 0x80808080u;
#pragma unroll
    for (int j = 0; j < 4; ++j) out[0][j] = byte_value(bytes, j, 128.f);
  } else {
    const TW* from = reinterpret_cast<const TW*>(row) + first;
    alignas(16) TW raw[4] = {};
    if constexpr (vectors) {
      if constexpr (sizeof(TW) == 4)
        *reinterpret_cast<uint4*>(raw) = *reinterpret_cast<const uint4*>(from);
      else
        *reinterpret_cast<uint2*>(raw) = *reinterpret_cast<const uint2*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < stored) raw[j] = from[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) out[0][j] = to_float(raw[j]);
  }
}

template <bool vectors>
__device__ __forceinline__ float4 load_x4(const LinearRows& p, int64_t m, int64_t i) {
  const float* from = static_cast<const float*>(p.x) + m * p.in + i;
  if constexpr (vectors) {
    if (i < p.in) return *reinterpret_cast<const float4*>(from);
    return make_float4(0.f, 0.f, 0.f, 0.f);
  } else {
    return make_float4(i < p.in ? from[0] : 0.f, i + 1 < p.in ? from[1] : 0.f, i + 2 < p.in ? from[2] : 0.f,
                       i + 3 < p.in ? from[3] : 0.f);
  }
}

// The sum of output o + lane / 8 and row m + lane % 8.
template <typename TW, bool vectors>
__device__ __forceinline__ float lane_sum(const LinearRows& p, const LinearRows::Weight& weight, int64_t o,
                                          int64_t m) {
  const int lane = lane_in_warp();
  const int64_t stored = stored_inputs<TW>(p), spans = ceil_div(stored, 128 * pieces<TW>);
  const bool grouped = scaled<TW> && linear_groups(p) > 1;
  float sums[WARP_OUTPUTS][TILE_ROWS] = {};
  for (int64_t span = 0; span < spans; ++span) {
    float w[WARP_OUTPUTS][pieces<TW>][4];
#pragma unroll
    for (int r = 0; r < WARP_OUTPUTS; ++r) {
      load_weights<TW, vectors>(w[r], weight_row(p, weight, o + r), span, lane, stored);
      if (grouped && lane_input<TW>(span, lane, 0) < p.in) {
        // The lane's inputs lie in one block, hence in one group.
        const float scale = weight_scale(p, weight, o + r, lane_input<TW>(span, lane, 0) / p.group);
#pragma unroll
        for (int q = 0; q < pieces<TW>; ++q)
#pragma unroll
          for (int j = 0; j < 4; ++j) w[r][q][j] *= scale;
      }
    }
#pragma unroll
    for (int row = 0; row < TILE_ROWS; ++row) {
      if (m + row >= p.rows) break;
#pragma unroll
      for (int q = 0; q < pieces<TW>; ++q) {
        const float4 x = load_x4<vectors>(p, m + row, lane_input<TW>(span, lane, q));
#pragma unroll
        for (int r = 0; r < WARP_OUTPUTS; ++r) {
          float sum = sums[r][row];
          sum = __fmaf_rn(w[r][q][0], x.x, sum);
          sum = __fmaf_rn(w[r][q][1], x.y, sum);
          sum = __fmaf_rn(w[r][q][2], x.z, sum);
          sums[r][row] = __fmaf_rn(w[r][q][3], x.w, sum);
        }
      }
    }
  }
  float mine = 0.f;
#pragma unroll
  for (int r = 0; r < WARP_OUTPUTS; ++r)
#pragma unroll
    for (int row = 0; row < TILE_ROWS; ++row) {
      if (m + row >= p.rows) break;
      const float sum = warp_reduce_sum(sums[r][row]);
      if (lane == r * TILE_ROWS + row) mine = sum;
    }
  const int64_t output = o + lane / TILE_ROWS;
  return scaled<TW> && !grouped ? mine * weight_scale(p, weight, output, 0) : mine;
}

template <typename TW, bool vectors>
__global__ void __launch_bounds__(32 * OUTPUTS / WARP_OUTPUTS, 4) linear_rows_kernel(LinearRows p) {
  const int64_t o = int64_t(blockIdx.x) * OUTPUTS + warp_in_block() * WARP_OUTPUTS;
  const int lane = lane_in_warp();
  for (int64_t m = 0; m < p.rows; m += TILE_ROWS) {
    const float sum = lane_sum<TW, vectors>(p, p.weight, o, m);
    const float factor = p.factor.data == nullptr ? 0.f : lane_sum<TW, vectors>(p, p.factor, o, m);
    const int64_t row = m + lane % TILE_ROWS, output = o + lane / TILE_ROWS;
    if (row < p.rows && output < p.outs) finish<float>(p, sum, factor, row, output);
  }
}

// ---------------------------------------------------------------------------------------------------------

// Whether a lane may read `bytes` at a time from rows that begin at `data`.
bool aligned_rows(const void* data, int64_t row_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes) == 0 && row_bytes % bytes == 0;
}

// Whether x and the weights can be read in vectors of `weight_bytes` and four elements of x.
bool fits_vectors(const LinearRows& p, int64_t weight_bytes) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  return p.in % 8 == 0 && aligned_rows(p.x, p.in * element, 4 * element) &&
         aligned_rows(p.weight.data, p.weight.row_bytes, weight_bytes) &&
         aligned_rows(p.factor.data, p.factor.row_bytes, weight_bytes);
}

template <typename T, typename TW, int WORDS>
Status launch_mma(const LinearRows& p, void* stream) {
  const size_t shared = shared_bytes<float>(WARPS * LINEAR_ROWS * OUTPUTS);
  const int64_t grid = ceil_div(p.outs, OUTPUTS);
  if (fits_vectors(p, 4 * WORDS))
    return ARIMG_LAUNCH((linear_rows_mma_kernel<T, TW, WORDS, true>), grid, WARPS * 32, shared, stream, p);
  return ARIMG_LAUNCH((linear_rows_mma_kernel<T, TW, WORDS, false>), grid, WARPS * 32, shared, stream, p);
}

template <typename TW>
Status launch_plain(const LinearRows& p, void* stream) {
  const int64_t grid = ceil_div(p.outs, OUTPUTS);
  constexpr int threads = 32 * OUTPUTS / WARP_OUTPUTS;
  if (fits_vectors(p, scaled<TW> ? 4 : bits_of<TW> / 2))
    return ARIMG_LAUNCH((linear_rows_kernel<TW, true>), grid, threads, 0, stream, p);
  return ARIMG_LAUNCH((linear_rows_kernel<TW, false>), grid, threads, 0, stream, p);
}

// A span must lie in one group.
template <typename T>
Status launch_half(const LinearRows& p, WeightType own, void* stream) {
  const bool one = linear_groups(p) == 1;
  if (p.weight_type == own) return launch_mma<T, T, 4>(p, stream);
  if (p.weight_type == WeightType::int8)
    return (one || p.group % 64 == 0 ? launch_mma<T, int8_t, 4> : launch_mma<T, int8_t, 2>)(p, stream);
  if (p.weight_type == WeightType::int4)
    return (one || p.group % 128 == 0 ? launch_mma<T, Int4, 4> : launch_mma<T, Int4, 1>)(p, stream);
  return Status::unsupported;  // the operator's caller computes it in fp32
}

}  // namespace

Status linear_rows_cuda(const LinearRows& p, void* stream) {
  if (p.dtype == DType::bf16) return launch_half<BFloat16>(p, WeightType::bf16, stream);
  if (p.dtype == DType::f16) return launch_half<Half>(p, WeightType::f16, stream);
  switch (p.weight_type) {
    case WeightType::bf16:
      return launch_plain<BFloat16>(p, stream);
    case WeightType::f16:
      return launch_plain<Half>(p, stream);
    case WeightType::int8:
      return launch_plain<int8_t>(p, stream);
    case WeightType::int4:
      return launch_plain<Int4>(p, stream);
    default:
      return launch_plain<float>(p, stream);
  }
}

}  // namespace arimg
