// See contract.h. Maps are small, so what counts is to fill the device from one image on: a block per 16 x 4
// pixels and 8 channels where there is a convolution, a thread per 16 bytes of the sum where there is none.
#include "pyramid/map_cuda.h"

namespace arimg {
namespace {

using cuda::Shared;
using cuda::SharedArena;

constexpr int TILE_WIDTH = 16, TILE_HEIGHT = 4, TILE_PIXELS = TILE_WIDTH * TILE_HEIGHT;
constexpr int THREAD_CHANNELS = 4, THREADS = 128, OUT_CHANNELS = THREADS / TILE_PIXELS * THREAD_CHANNELS;
constexpr int IN_CHANNELS = 16;  // in shared memory at a time
constexpr int UP_WIDTH = TILE_WIDTH + 2, UP_PIXELS = UP_WIDTH * (TILE_HEIGHT + 2);

// Whether runs of the maps are whole and aligned: how a kernel may read and write them.
struct Vectors {
  bool source, sum, residual, filter;
};

// Channels `channel` .. + N - 1 of pixel `position` of the source map.
template <int N>
__device__ __forceinline__ void load_source(const Accumulate& p, int64_t image, int64_t channel,
                                            int64_t position, bool vectors, float (&to)[N]) {
  const int64_t row = p.index ? p.index[image * p.in_height * p.in_width + position] : 0;
  const int count = p.channels - channel < N ? int(p.channels - channel) : N;
  if (p.sign != 0.f) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      to[j] = j >= count ? 0.f : uint64_t(row) >> (channel + j) & 1 ? p.sign : -p.sign;
    return;
  }
  int64_t at = p.index ? place(p.h, 0, channel, row) : place(p.h, image, channel, position);
  if constexpr (N == 1)
    to[0] = load(p.h.dtype, p.h.data, at);
  else
    load_run(p.h.dtype, p.h.data, at, p.h.channel, count, vectors, to);
}

// The same of pixel (y, x) of the upsampled map.
template <int N>
__device__ __forceinline__ void upsample(const Accumulate& p, int64_t image, int64_t channel, int y, int x,
                                         bool vectors, float (&to)[N]) {
  if (p.in_height == p.height && p.in_width == p.width)
    return load_source(p, image, channel, y * p.width + x, vectors, to);
  Taps rows = taps_of(p.up, y, int(p.in_height), int(p.height));
  Taps columns = taps_of(p.up, x, int(p.in_width), int(p.width));
#pragma unroll
  for (int c = 0; c < N; ++c) to[c] = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= columns.count) break;
    float column[N] = {}, value[N];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= rows.count) break;
      load_source(p, image, channel, rows.position[i] * p.in_width + columns.position[j], vectors, value);
#pragma unroll
      for (int c = 0; c < N; ++c) column[c] = fmaf(rows.weight[i], value[c], column[c]);
    }
#pragma unroll
    for (int c = 0; c < N; ++c) to[c] = fmaf(columns.weight[j], column[c], to[c]);
  }
}

// N elements along the dense axis of a map, of which `count` exist: += factor * u.
template <int N>
__device__ __forceinline__ void add(const Map& m, int64_t at, int64_t step, int count, bool vectors,
                                    float factor, const float (&u)[N]) {
  float old[N];
  load_run(m.dtype, m.data, at, step, count, vectors, old);
#pragma unroll
  for (int j = 0; j < N; ++j) old[j] = fmaf(factor, u[j], old[j]);  // factor is 1 or -1: exact
  store_run(m.dtype, m.data, at, step, count, vectors, old);
}

// Without a convolution: a thread per N elements along the dense axis of the sum, channels where `rows`;
// `blocks` for each image.
template <bool rows, int N>
__global__ void __launch_bounds__(THREADS, 4) add_kernel(Accumulate p, Vectors vectors, int blocks) {
  const int width = int(p.width), pixels = int(p.height) * width, length = rows ? int(p.channels) : pixels;
  const int runs = (length + N - 1) / N, lines = rows ? pixels : int(p.channels);
  const int image = int(blockIdx.x) / blocks, i = (int(blockIdx.x) - image * blocks) * THREADS + threadIdx.x;
  const int across = i / runs, along = i % runs * N;
  if (across >= lines) return;
  const int channel = rows ? along : across, pixel = rows ? across : along;
  const int count = length - along < N ? length - along : N;
  float u[N];
  if constexpr (rows) {
    upsample(p, image, channel, pixel / width, pixel % width, vectors.source, u);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float one[1] = {0.f};
      if (j < count) upsample(p, image, channel, (pixel + j) / width, (pixel + j) % width, false, one);
      u[j] = one[0];
    }
  }
  auto add_to = [&](const Map& m, bool whole, float factor) {
    add(m, place(m, image, channel, pixel), rows ? m.channel : m.pixel, count, whole, factor, u);
  };
  add_to(p.sum, vectors.sum, 1.f);
  if (p.residual.data) add_to(p.residual, vectors.residual, -1.f);
}

// Four input channels of the pixels of a tile and its border, upsampled, into the tile; threads along
// channels read whole codes, threads along pixels whole rows.
__device__ __forceinline__ void upsample_tile(const Accumulate& p, int64_t image, int64_t first, int top,
                                              int left, bool vectors, Shared<float> up) {
  const bool rows = p.h.channel == 1;
  constexpr int FOURS = IN_CHANNELS / 4;
  for (int i = threadIdx.x; i < FOURS * UP_PIXELS; i += THREADS) {
    int channel = (rows ? i % FOURS : i / UP_PIXELS) * 4, at = rows ? i / FOURS : i % UP_PIXELS;
    int y = top - 1 + at / UP_WIDTH, x = left - 1 + at % UP_WIDTH;
    float value[4] = {};
    if (first + channel < p.channels && y >= 0 && y < p.height && x >= 0 && x < p.width)
      upsample(p, image, first + channel, y, x, vectors, value);
#pragma unroll
    for (int j = 0; j < 4; ++j) up[(channel + j) * UP_PIXELS + at] = value[j];
  }
}

// The weights of a step, [input channel, tap, output channel], with 1 - ratio at the centre. The weights of
// an output channel lie side by side in memory.
__device__ __forceinline__ void load_filter(const Accumulate& p, int64_t first, int64_t first_out,
                                            bool vectors, Shared<float> filter) {
  constexpr int STEPS = IN_CHANNELS * 9;
  const int64_t C = p.channels;
  const int steps = C - first < IN_CHANNELS ? int(C - first) * 9 : STEPS;
  for (int i = threadIdx.x; i < OUT_CHANNELS * STEPS / 4; i += THREADS) {
    int step = i % (STEPS / 4) * 4, o = i / (STEPS / 4);
    int64_t out = first_out + o;
    float weight[4] = {};
    if (out < C && step < steps)
      load_run(p.filter_dtype, p.weight, (out * C + first) * 9 + step, 1, steps - step, vectors, weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float w = p.ratio * weight[j];
      if (first + (step + j) / 9 == out && (step + j) % 9 == 4) w += 1.f - p.ratio;
      filter[(step + j) * OUT_CHANNELS + o] = w;
    }
  }
}

// Block x: tile of the image, y: group of output channels, z: image.
__global__ void __launch_bounds__(THREADS, 6)
    accumulate_kernel(Accumulate p, Vectors vectors, int tiles_across) {
  SharedArena arena;
  Shared<float> up = arena.take<float>(IN_CHANNELS * UP_PIXELS);
  Shared<float> filter = arena.take<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  const int64_t C = p.channels, image = blockIdx.z;
  const int left = int(blockIdx.x % tiles_across) * TILE_WIDTH;
  const int top = int(blockIdx.x / tiles_across) * TILE_HEIGHT;
  const int pixel = int(threadIdx.x) % TILE_PIXELS, group = int(threadIdx.x) / TILE_PIXELS * THREAD_CHANNELS;
  const int corner = pixel / TILE_WIDTH * UP_WIDTH + pixel % TILE_WIDTH;
  const int64_t first_out = int64_t(blockIdx.y) * OUT_CHANNELS, out = first_out + group;

  float sum[THREAD_CHANNELS];
#pragma unroll
  for (int i = 0; i < THREAD_CHANNELS; ++i)
    sum[i] = out + i < C ? p.ratio * load(p.filter_dtype, p.bias, out + i) : 0.f;
  for (int64_t first = 0; first < C; first += IN_CHANNELS) {
    __syncthreads();  // the step before no longer reads the tiles
    upsample_tile(p, image, first, top, left, vectors.source, up);
    load_filter(p, first, first_out, vectors.filter, filter);
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < IN_CHANNELS; ++c)
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        float v = up[c * UP_PIXELS + corner + tap / 3 * UP_WIDTH + tap % 3];
        float4 w = filter.vec<float4>((c * 9 + tap) * OUT_CHANNELS + group);
        sum[0] = fmaf(v, w.x, sum[0]);
        sum[1] = fmaf(v, w.y, sum[1]);
        sum[2] = fmaf(v, w.z, sum[2]);
        sum[3] = fmaf(v, w.w, sum[3]);
      }
  }
  int y = top + pixel / TILE_WIDTH, x = left + pixel % TILE_WIDTH;
  if (y >= p.height || x >= p.width || out >= C) return;
  const int count = C - out < THREAD_CHANNELS ? int(C - out) : THREAD_CHANNELS;
  auto add_to = [&](const Map& m, bool whole,
                    float factor) {  // in planes, neighbouring threads are neighbours
    add(m, place(m, image, out, y * p.width + x), m.channel, count, whole && m.channel == 1, factor, sum);
  };
  add_to(p.sum, vectors.sum, 1.f);
  if (p.residual.data) add_to(p.residual, vectors.residual, -1.f);
}

// A warp per row; lane i holds channels i and i + 32.
__global__ void sign_bits_kernel(const float* x, int64_t rows, int channels, int64_t* index) {
  int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  int lane = int(threadIdx.x) % 32;
  if (row >= rows) return;
  auto positive = [&](int channel) { return channel < channels && x[row * channels + channel] > 0.f; };
  uint64_t low = __ballot_sync(cuda::full_warp, positive(lane));
  uint64_t high = __ballot_sync(cuda::full_warp, positive(lane + 32));
  if (lane == 0) index[row] = int64_t(high << 32 | low);
}

template <int N>
Vectors vectors_of(const Accumulate& p) {
  const int64_t pixels = p.height * p.width, rows = p.channels;
  auto whole = [&](const Map& m) { return m.data && whole_runs<N>(m, rows, pixels); };
  Map source = p.h, filter{p.filter_dtype, const_cast<void*>(p.weight), 0, 1, 9 * p.channels};
  if (p.index) source.batch = 0;  // the codebook
  return {source.channel == 1 && whole(source), whole(p.sum), whole(p.residual),
          p.weight && whole_runs<4>(filter, 9 * p.channels, 1)};
}

template <bool rows, int N>
Status add_cuda(const Accumulate& p, void* stream) {
  const int64_t pixels = p.height * p.width;
  int64_t runs = (rows ? pixels : p.channels) * cuda::ceil_div(rows ? p.channels : pixels, N);
  if (pixels * p.channels > INT32_MAX) return Status::unsupported;
  int64_t blocks = cuda::ceil_div(runs, THREADS);
  return ARIMG_LAUNCH((add_kernel<rows, N>), p.images * blocks, THREADS, 0, stream, p, vectors_of<N>(p),
                      int(blocks));
}

}  // namespace

Status accumulate_cuda(const Accumulate& p, void* stream) {
  if (p.weight == nullptr) {
    const bool rows = p.sum.channel == 1;
    if (p.sum.dtype == DType::f32) return rows ? add_cuda<true, 4>(p, stream) : add_cuda<false, 4>(p, stream);
    return rows ? add_cuda<true, 8>(p, stream) : add_cuda<false, 8>(p, stream);
  }
  int64_t across = cuda::ceil_div(p.width, TILE_WIDTH), down = cuda::ceil_div(p.height, TILE_HEIGHT);
  size_t shared = cuda::shared_bytes<float>(IN_CHANNELS * UP_PIXELS) +
                  cuda::shared_bytes<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  cuda::Grid grid(across * down, cuda::ceil_div(p.channels, OUT_CHANNELS), p.images);
  return ARIMG_LAUNCH(accumulate_kernel, grid, THREADS, shared, stream, p, vectors_of<4>(p), int(across));
}

Status sign_bits_cuda(const float* x, int64_t rows, int64_t channels, int64_t* index, void* stream) {
  int64_t blocks = cuda::ceil_div(rows, THREADS / 32);
  return ARIMG_LAUNCH(sign_bits_kernel, blocks, THREADS, 0, stream, x, rows, int(channels), index);
}

}  // namespace arimg
