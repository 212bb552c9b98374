// See contract.h. Maps are small, so what counts is to fill the device from one image on: resampling takes a
// thread per output element, accumulate a block per 16 x 4 pixels and 8 channels.
#include "pyramid/contract.h"

#include "core/cuda.h"
#include "pyramid/resample.h"

namespace arimg {
namespace {

using cuda::Shared;
using cuda::SharedArena;

// Storage types are chosen at run time: the branch is the same for all threads, and three dtypes in three
// places would be 27 kernels.
__device__ __forceinline__ float load(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return to_float(static_cast<const Half*>(data)[i]);
}

__device__ __forceinline__ void store(DType dtype, void* data, int64_t i, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = value;
  else if (dtype == DType::bf16)
    static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(value);
  else
    static_cast<Half*>(data)[i] = from_float<Half>(value);
}

__device__ __forceinline__ int64_t place(const Map& m, int64_t image, int64_t channel, int64_t pixel) {
  return image * m.batch + channel * m.channel + pixel * m.pixel;
}

// value(position) resampled at one output pixel: rows first narrowed by the column taps, as on the CPU.
template <typename F>
__device__ __forceinline__ float bicubic(const Taps& rows, const Taps& columns, F&& value) {
  float sum = 0.f;
  for (int i = 0; i < 4; ++i) {
    float row = columns.weight[0] * value(rows.position[i], columns.position[0]);
    for (int j = 1; j < 4; ++j)
      row = fmaf(columns.weight[j], value(rows.position[i], columns.position[j]), row);
    sum = i == 0 ? rows.weight[0] * row : fmaf(rows.weight[i], row, sum);
  }
  return sum;
}

__global__ void resample_kernel(Resample p, int64_t total) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  // Neighbouring threads write neighbouring elements.
  int64_t pixels = p.out_height * p.out_width;
  int64_t channel = p.out.channel == 1 ? i % p.channels : i / pixels % p.channels;
  int64_t pixel = p.out.channel == 1 ? i / p.channels % pixels : i % pixels;
  int64_t image = i / (pixels * p.channels);
  int64_t y = pixel / p.out_width, x = pixel % p.out_width;
  auto value = [&](int64_t row, int64_t column) {
    return load(p.in.dtype, p.in.data, place(p.in, image, channel, row * p.in_width + column));
  };
  float result = 0.f;
  if (p.in_height == p.out_height && p.in_width == p.out_width) {
    result = value(y, x);
  } else if (p.mode == Resampling::area) {
    Cell rows = area_cell(y, p.in_height, p.out_height), columns = area_cell(x, p.in_width, p.out_width);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = columns.begin; column < columns.end; ++column) result += value(row, column);
    result = __fdiv_rn(result, float((rows.end - rows.begin) * (columns.end - columns.begin)));
  } else {
    result =
        bicubic(bicubic_taps(y, p.in_height, p.out_height), bicubic_taps(x, p.in_width, p.out_width), value);
  }
  store(p.out.dtype, p.out.data, place(p.out, image, channel, pixel), result);
}

constexpr int TILE_WIDTH = 16, TILE_HEIGHT = 4, TILE_PIXELS = TILE_WIDTH * TILE_HEIGHT;
constexpr int THREAD_CHANNELS = 4, THREADS = 128, OUT_CHANNELS = THREADS / TILE_PIXELS * THREAD_CHANNELS;
constexpr int IN_CHANNELS = 16;  // in shared memory at a time
constexpr int UP_WIDTH = TILE_WIDTH + 2, UP_PIXELS = UP_WIDTH * (TILE_HEIGHT + 2);

// Block x: tile of the image, y: group of output channels, z: image.
__global__ void __launch_bounds__(THREADS, 6) accumulate_kernel(Accumulate p, int tiles_across) {
  SharedArena arena;
  Shared<float> up = arena.take<float>(IN_CHANNELS * UP_PIXELS);
  Shared<float> filter = arena.take<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  const int64_t C = p.channels, image = blockIdx.z, first_out = int64_t(blockIdx.y) * OUT_CHANNELS;
  const int64_t left = int64_t(blockIdx.x % tiles_across) * TILE_WIDTH;
  const int64_t top = int64_t(blockIdx.x / tiles_across) * TILE_HEIGHT;
  const bool same = p.in_height == p.height && p.in_width == p.width;
  const int64_t in_pixels = p.in_height * p.in_width;
  const int pixel = int(threadIdx.x) % TILE_PIXELS, group = int(threadIdx.x) / TILE_PIXELS;
  const int corner = pixel / TILE_WIDTH * UP_WIDTH + pixel % TILE_WIDTH;

  auto source = [&](int64_t channel, int64_t position) {
    if (p.index == nullptr) return load(p.h.dtype, p.h.data, place(p.h, image, channel, position));
    return load(p.h.dtype, p.h.data, place(p.h, 0, channel, p.index[image * in_pixels + position]));
  };
  auto upsampled = [&](int64_t channel, int64_t y, int64_t x) {
    if (channel >= C || y < 0 || y >= p.height || x < 0 || x >= p.width) return 0.f;
    if (same) return source(channel, y * p.width + x);
    return bicubic(bicubic_taps(y, p.in_height, p.height), bicubic_taps(x, p.in_width, p.width),
                   [&](int row, int column) { return source(channel, row * p.in_width + column); });
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
    int64_t at = place(p.sum, image, out, y * p.width + x);
    store(p.sum.dtype, p.sum.data, at, load(p.sum.dtype, p.sum.data, at) + sum[i]);
    if (p.residual.data == nullptr) continue;
    at = place(p.residual, image, out, y * p.width + x);
    store(p.residual.dtype, p.residual.data, at, load(p.residual.dtype, p.residual.data, at) - sum[i]);
  }
}

}  // namespace

Status resample_cuda(const Resample& p, void* stream) {
  int64_t total = p.images * p.channels * p.out_height * p.out_width;
  return ARIMG_LAUNCH(resample_kernel, cuda::ceil_div(total, 128), 128, 0, stream, p, total);
}

Status accumulate_cuda(const Accumulate& p, void* stream) {
  int64_t across = cuda::ceil_div(p.width, TILE_WIDTH), down = cuda::ceil_div(p.height, TILE_HEIGHT);
  size_t shared = cuda::shared_bytes<float>(IN_CHANNELS * UP_PIXELS) +
                  cuda::shared_bytes<float>(IN_CHANNELS * 9 * OUT_CHANNELS);
  cuda::Grid grid(across * down, cuda::ceil_div(p.channels, OUT_CHANNELS), p.images);
  return ARIMG_LAUNCH(accumulate_kernel, grid, THREADS, shared, stream, p, int(across));
}

}  // namespace arimg
