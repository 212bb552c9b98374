// See contract.h. Maps are small, so what counts is to fill the device from one image on: a block per 16 x 4
// pixels and 8 channels where there is a convolution, a thread per element where there is none.
#include "pyramid/map_cuda.h"

namespace arimg {
namespace {

using cuda::Shared;
using cuda::SharedArena;

constexpr int TILE_WIDTH = 16, TILE_HEIGHT = 4, TILE_PIXELS = TILE_WIDTH * TILE_HEIGHT;
constexpr int THREAD_CHANNELS = 4, THREADS = 128, OUT_CHANNELS = THREADS / TILE_PIXELS * THREAD_CHANNELS;
constexpr int IN_CHANNELS = 16;  // in shared memory at a time
constexpr int UP_WIDTH = TILE_WIDTH + 2, UP_PIXELS = UP_WIDTH * (TILE_HEIGHT + 2);

// What an output pixel of one map gathers. value(row, column) reads the source.
template <typename F>
__device__ __forceinline__ float upsample(const Accumulate& p, int64_t y, int64_t x, F&& value) {
  if (p.in_height == p.height && p.in_width == p.width) return value(y, x);
  Taps rows = taps_of(p.up, int(y), int(p.in_height), int(p.height));
  Taps columns = taps_of(p.up, int(x), int(p.in_width), int(p.width));
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= columns.count) break;
    float column = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < rows.count) column = fmaf(rows.weight[i], value(rows.position[i], columns.position[j]), column);
    sum = fmaf(columns.weight[j], column, sum);
  }
  return sum;
}

// Channel `channel` of pixel `position` of the source map.
__device__ __forceinline__ float source_value(const Accumulate& p, int64_t image, int64_t channel,
                                              int64_t position) {
  if (p.index == nullptr) return load(p.h.dtype, p.h.data, place(p.h, image, channel, position));
  int64_t index = p.index[image * p.in_height * p.in_width + position];
  if (p.sign != 0.f) return uint64_t(index) >> channel & 1 ? p.sign : -p.sign;
  return load(p.h.dtype, p.h.data, place(p.h, 0, channel, index));
}

__device__ __forceinline__ void add(const Map& m, int64_t image, int64_t channel, int64_t pixel,
                                    float value) {
  int64_t at = place(m, image, channel, pixel);
  store(m.dtype, m.data, at, load(m.dtype, m.data, at) + value);
}

// Without a convolution: a thread per element.
__global__ void add_kernel(Accumulate p, int64_t total) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  // Neighbouring threads write neighbouring elements.
  int64_t pixels = p.height * p.width, image = i / (pixels * p.channels);
  int64_t channel = p.sum.channel == 1 ? i % p.channels : i / pixels % p.channels;
  int64_t pixel = p.sum.channel == 1 ? i / p.channels % pixels : i % pixels;
  float u = upsample(p, pixel / p.width, pixel % p.width, [&](int64_t row, int64_t column) {
    return source_value(p, image, channel, row * p.in_width + column);
  });
  add(p.sum, image, channel, pixel, u);
  if (p.residual.data) add(p.residual, image, channel, pixel, -u);
}

// Block x: tile of the image, y: group of output channels, z: image.
__global__ void __launch_bounds__(THREADS, 6) accumulate_kernel(Accumulate p, int tiles_across) {
  SharedArena arena;
  Shared<float> up = arena.take<float>(IN_CHANNELS * UP_PIXELS);
  Shared<float> filter = arena.take<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  const int64_t C = p.channels, image = blockIdx.z, first_out = int64_t(blockIdx.y) * OUT_CHANNELS;
  const int64_t left = int64_t(blockIdx.x % tiles_across) * TILE_WIDTH;
  const int64_t top = int64_t(blockIdx.x / tiles_across) * TILE_HEIGHT;
  const int pixel = int(threadIdx.x) % TILE_PIXELS, group = int(threadIdx.x) / TILE_PIXELS;
  const int corner = pixel / TILE_WIDTH * UP_WIDTH + pixel % TILE_WIDTH;

  auto upsampled = [&](int64_t channel, int64_t y, int64_t x) {
    if (channel >= C || y < 0 || y >= p.height || x < 0 || x >= p.width) return 0.f;
    return upsample(p, y, x, [&](int64_t row, int64_t column) {
      return source_value(p, image, channel, row * p.in_width + column);
    });
  };

  float sum[THREAD_CHANNELS];
  for (int i = 0; i < THREAD_CHANNELS; ++i) {
    int64_t out = first_out + group * THREAD_CHANNELS + i;
    sum[i] = out < C ? p.ratio * load(p.filter_dtype, p.bias, out) : 0.f;
  }
  for (int64_t first = 0; first < C; first += IN_CHANNELS) {
    __syncthreads();  // the step before no longer reads the tiles
    // Threads along channels read whole codes, threads along pixels whole rows; the tile is the same.
    for (int i = threadIdx.x; i < IN_CHANNELS * UP_PIXELS; i += THREADS) {
      int channel = p.h.channel == 1 ? i % IN_CHANNELS : i / UP_PIXELS;
      int at = p.h.channel == 1 ? i / IN_CHANNELS : i % UP_PIXELS;
      up[channel * UP_PIXELS + at] =
          upsampled(first + channel, top - 1 + at / UP_WIDTH, left - 1 + at % UP_WIDTH);
    }
    for (int i = threadIdx.x; i < IN_CHANNELS * 9 * OUT_CHANNELS; i += THREADS) {
      int step = i % (IN_CHANNELS * 9), o = i / (IN_CHANNELS * 9);
      int64_t in = first + step / 9, out = first_out + o;
      float w =
          in < C && out < C ? p.ratio * load(p.filter_dtype, p.weight, (out * C + in) * 9 + step % 9) : 0.f;
      if (in == out && step % 9 == 4) w += 1.f - p.ratio;
      filter[step * OUT_CHANNELS + o] = w;
    }
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < IN_CHANNELS; ++c)
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        float v = up[c * UP_PIXELS + corner + tap / 3 * UP_WIDTH + tap % 3];
        float4 w = filter.vec<float4>((c * 9 + tap) * OUT_CHANNELS + group * THREAD_CHANNELS);
        sum[0] = fmaf(v, w.x, sum[0]);
        sum[1] = fmaf(v, w.y, sum[1]);
        sum[2] = fmaf(v, w.z, sum[2]);
        sum[3] = fmaf(v, w.w, sum[3]);
      }
  }
  int64_t y = top + pixel / TILE_WIDTH, x = left + pixel % TILE_WIDTH;
  if (y >= p.height || x >= p.width) return;
  for (int i = 0; i < THREAD_CHANNELS; ++i) {
    int64_t out = first_out + group * THREAD_CHANNELS + i;
    if (out >= C) return;
    add(p.sum, image, out, y * p.width + x, sum[i]);
    if (p.residual.data) add(p.residual, image, out, y * p.width + x, -sum[i]);
  }
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

}  // namespace

Status accumulate_cuda(const Accumulate& p, void* stream) {
  if (p.weight == nullptr) {
    int64_t total = p.images * p.channels * p.height * p.width;
    return ARIMG_LAUNCH(add_kernel, cuda::ceil_div(total, THREADS), THREADS, 0, stream, p, total);
  }
  int64_t across = cuda::ceil_div(p.width, TILE_WIDTH), down = cuda::ceil_div(p.height, TILE_HEIGHT);
  size_t shared = cuda::shared_bytes<float>(IN_CHANNELS * UP_PIXELS) +
                  cuda::shared_bytes<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  cuda::Grid grid(across * down, cuda::ceil_div(p.channels, OUT_CHANNELS), p.images);
  return ARIMG_LAUNCH(accumulate_kernel, grid, THREADS, shared, stream, p, int(across));
}

Status sign_bits_cuda(const float* x, int64_t rows, int64_t channels, int64_t* index, void* stream) {
  int64_t blocks = cuda::ceil_div(rows, THREADS / 32);
  return ARIMG_LAUNCH(sign_bits_kernel, blocks, THREADS, 0, stream, x, rows, int(channels), index);
}

}  // namespace arimg
