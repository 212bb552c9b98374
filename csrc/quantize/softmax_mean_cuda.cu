// See softmax_mean.h. The tiles of the search; a tile's weights go to shared memory, from where each thread
// adds to four rows of up to four columns. More than 32 dimensions: the blocks of each 32 columns score
// again.
#include "quantize/softmax_mean.h"

#include "quantize/score_tile.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int QUADS = ROWS / 4;                   // groups of four rows
constexpr int COLUMN_STEP = THREADS / QUADS;      // columns that the threads take at once
constexpr int OWN_COLUMNS = DEPTH / COLUMN_STEP;  // of a thread
constexpr int WEIGHT_STRIDE = ROWS + 4;           // spreads the stores over the banks
static_assert(GPU_SEGMENT % CODES == 0 && OWN_COLUMNS == 4);

// Logits of the thread's four rows and eight codes; -infinity beyond the end.
template <typename TL, int WIDTH>
__device__ __forceinline__ void add_logits(float (&sum)[THREAD_ROWS][THREAD_CODES], const SoftmaxMean& p,
                                           int64_t row, int64_t first, int64_t lane_code) {
#pragma unroll
  for (int r = 0; r < THREAD_ROWS; ++r) {
    const TL* logits = (const TL*)p.logits + (row + r < p.rows ? row + r : p.rows - 1) * p.logits_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t code = first + lane_code + half * (CODES / 2);
      Four<TL> four;
      if constexpr (WIDTH == 4) {
        if (code < p.count) four = *reinterpret_cast<const Four<TL>*>(logits + code);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float logit = -INFINITY;
        if (code + i < p.count) logit = to_float(WIDTH == 4 ? four.value[i] : logits[code + i]);
        float& exponent = sum[r][4 * half + i];
        exponent = code + i < p.count ? exponent + logit : -INFINITY;
      }
    }
  }
}

// Grid: tiles of rows, segments of the codebook, groups of 32 columns.
template <typename TL, int WIDTH>
__global__ void __launch_bounds__(THREADS, 3)
    softmax_mean_kernel(SoftmaxMean p, Codebook book, const float* offsets, float* parts) {
  const int64_t first_row = int64_t(blockIdx.x) * ROWS, begin = blockIdx.y * GPU_SEGMENT;
  const int64_t end = begin + GPU_SEGMENT < p.count ? begin + GPU_SEGMENT : p.count;
  const int64_t d0 = int64_t(blockIdx.z) * DEPTH;
  const int columns = p.dim - d0 < DEPTH ? int(p.dim - d0) : DEPTH;
  const int quad = threadIdx.x % QUADS, column = threadIdx.x / QUADS;
  SharedArena arena;
  Shared<float> weights = arena.take<float>(CODES * WEIGHT_STRIDE);
  Shared<float> decays = arena.take<float>(ROWS);
  ScoreTile<float, float, WIDTH, true> tile(arena, p.x, book, offsets, first_row, p.rows);

  float a[THREAD_ROWS], b[THREAD_ROWS], top[THREAD_ROWS], total[THREAD_ROWS];
  for (int r = 0; r < THREAD_ROWS; ++r) {
    const int64_t row = first_row + tile.row(r) < p.rows ? first_row + tile.row(r) : p.rows - 1;
    a[r] = p.scale[row] / (p.sigma[row] * p.sigma[row]);
    b[r] = a[r] * p.scale[row];
    top[r] = -INFINITY;
    total[r] = 0.f;
  }
  float sums[OWN_COLUMNS][4] = {};
  for (int64_t first = begin; first < end; first += CODES) {
    float sum[THREAD_ROWS][THREAD_CODES];
    tile.scores(sum, first, end);
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) sum[r][c] = fmaf(-a[r], sum[r][c], -b[r] * tile.offset(c));
    add_logits<TL, WIDTH>(sum, p, first_row + tile.row(0), first, tile.code_lane() * 4);
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r) {
      float highest = top[r];
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) highest = fmaxf(highest, sum[r][c]);
      highest = warp_reduce_max<CODE_LANES>(highest);
      const float base = highest == -INFINITY ? 0.f : highest;
      const float decay = expf(top[r] - base);
      total[r] *= decay;
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) {
        sum[r][c] = expf(sum[r][c] - base);
        total[r] += sum[r][c];
      }
      top[r] = highest;
      if (tile.code_lane() == 0) decays[tile.row(r)] = decay;
    }
#pragma unroll
    for (int c = 0; c < THREAD_CODES; ++c)
      weights.template vec<float4>(tile.code(c) * WEIGHT_STRIDE + tile.row(0)) =
          make_float4(sum[0][c], sum[1][c], sum[2][c], sum[3][c]);
    tile.load_columns(first, end, d0);
    __syncthreads();
    float4 shrink = decays.template vec<float4>(4 * quad);
#pragma unroll
    for (int j = 0; j < OWN_COLUMNS; ++j) {
      const int d = column + j * COLUMN_STEP;
      if (d >= columns) break;
      float (&out)[4] = sums[j];
      out[0] *= shrink.x;
      out[1] *= shrink.y;
      out[2] *= shrink.z;
      out[3] *= shrink.w;
      for (int i = 0; i < CODES; i += 4) {
        const float4 value = tile.code_values(d, i);
        const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float4 w = weights.template vec<float4>((i + k) * WEIGHT_STRIDE + 4 * quad);
          out[0] = fmaf(w.x, values[k], out[0]);
          out[1] = fmaf(w.y, values[k], out[1]);
          out[2] = fmaf(w.z, values[k], out[2]);
          out[3] = fmaf(w.w, values[k], out[3]);
        }
      }
    }
    __syncthreads();  // the weights and decays are no longer read
  }
  for (int r = 0; r < THREAD_ROWS; ++r) {
    const float all = warp_reduce_sum<CODE_LANES>(total[r]);
    const int64_t row = first_row + tile.row(r);
    if (tile.code_lane() != 0) continue;
    decays[tile.row(r)] = all;
    if (parts != nullptr && blockIdx.z == 0 && row < p.rows) {
      float* part = parts + (blockIdx.y * p.rows + row) * (p.dim + 2);
      part[0] = top[r];
      part[1] = all;
    }
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + 4 * quad + i;
    const float all = decays[4 * quad + i];
    if (row >= p.rows) continue;
    for (int j = 0; j < OWN_COLUMNS && column + j * COLUMN_STEP < columns; ++j) {
      const int64_t d = d0 + column + j * COLUMN_STEP;
      if (parts != nullptr)
        parts[(blockIdx.y * p.rows + row) * (p.dim + 2) + 2 + d] = sums[j][i];
      else
        p.out[row * p.dim + d] = all == 0.f ? 0.f : sums[j][i] / all;
    }
  }
}

// One thread per element of out; the segments in order.
__global__ void combine_segments_kernel(SoftmaxMean p, const float* parts, int64_t segments) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows * p.dim) return;
  const int64_t row = i / p.dim, d = i % p.dim, step = p.rows * (p.dim + 2);
  const float* part = parts + row * (p.dim + 2);
  float top = -INFINITY, total = 0.f, sum = 0.f;
  for (int64_t s = 0; s < segments; ++s) top = fmaxf(top, part[s * step]);
  if (top == -INFINITY) top = 0.f;
  for (int64_t s = 0; s < segments; ++s) {
    const float decay = expf(part[s * step] - top);
    total = fmaf(decay, part[s * step + 1], total);
    sum = fmaf(decay, part[s * step + 2 + d], sum);
  }
  p.out[i] = total == 0.f ? 0.f : sum / total;
}

template <typename TL, int WIDTH>
Status launch(const SoftmaxMean& p, const Codebook& book, const float* offsets, float* parts, void* stream) {
  Grid grid(ceil_div(p.rows, ROWS), softmax_mean_segments(p.count), ceil_div(p.dim, DEPTH));
  size_t shared = SCORE_TILE_BYTES + shared_bytes<float>(CODES * WEIGHT_STRIDE) + shared_bytes<float>(ROWS);
  return ARIMG_LAUNCH((softmax_mean_kernel<TL, WIDTH>), grid, THREADS, shared, stream, p, book, offsets,
                      parts);
}

}  // namespace

Status softmax_mean_cuda(const SoftmaxMean& p, const float* offsets, float* parts, void* stream) {
  const Codebook book{DType::f32, p.codes, p.count, p.dim, Metric::l2};
  const int64_t segments = softmax_mean_segments(p.count);
  if (segments == 1) parts = nullptr;
  Status status = with_dtype(p.logits_dtype, [&](auto t) {
    using TL = decltype(t);
    bool fours =
        four_fit<float>(p.x, p.dim) && four_fit<float>(p.codes, p.dim) && four_fit<TL>(p.logits, p.count);
    return (fours ? launch<TL, 4> : launch<TL, 1>)(p, book, offsets, parts, stream);
  });
  if (status != Status::ok || segments == 1) return status;
  return ARIMG_LAUNCH(combine_segments_kernel, ceil_div(p.rows * p.dim, 128), 128, 0, stream, p, parts,
                      segments);
}

}  // namespace arimg
