// See contract.h. A block takes some output rows of a group of channels of one image: it finds the weights of
// its rows and of all columns, sums the rows into shared memory, and the columns from there. Groups are wide
// where channels lie side by side, so that neighbouring threads touch neighbouring elements.
#include "pyramid/map_cuda.h"

namespace arimg {
namespace {

using cuda::Shared;
using cuda::SharedArena;

constexpr int THREADS = 128;

struct Tiling {
  int rows, group, bands, groups, row_taps, column_taps;
};

// Element i of [rows, width, group] as (row, x, channel), in the order in which a map of this layout lies.
struct Element {
  int row, x, channel;
};
__device__ __forceinline__ Element element_of(int i, const Map& m, int rows, int width, int group) {
  if (m.channel == 1) return {i / group / width, i / group % width, i % group};
  return {i / width % rows, i % width, i / width / rows};
}

__global__ void __launch_bounds__(THREADS) resample_kernel(Resample p, Tiling t) {
  SharedArena arena;
  Shared<Span> row_span = arena.take<Span>(t.rows), column_span = arena.take<Span>(p.out_width);
  Shared<float> row_weight = arena.take<float>(t.rows * t.row_taps);
  Shared<float> column_weight = arena.take<float>(p.out_width * t.column_taps);
  Shared<float> tile = arena.take<float>(t.rows * p.in_width * t.group);
  const int in_width = int(p.in_width), out_width = int(p.out_width);
  const int64_t image = int64_t(blockIdx.x) / (int64_t(t.groups) * t.bands);
  const int64_t first_channel = int64_t(blockIdx.x) / t.bands % t.groups * t.group;
  const int first_row = int(blockIdx.x % t.bands) * t.rows;
  const int rows = int(p.out_height) - first_row < t.rows ? int(p.out_height) - first_row : t.rows;
  const int64_t left = p.channels - first_channel;
  const int channels = left < t.group ? int(left) : t.group;

  for (int i = threadIdx.x; i < rows; i += THREADS)
    row_span[i] = axis_weights(row_axis(p), first_row + i, row_weight.part(i * t.row_taps, t.row_taps));
  for (int i = threadIdx.x; i < out_width; i += THREADS)
    column_span[i] = axis_weights(column_axis(p), i, column_weight.part(i * t.column_taps, t.column_taps));
  __syncthreads();
  for (int i = threadIdx.x; i < rows * in_width * channels; i += THREADS) {
    Element e = element_of(i, p.in, rows, in_width, channels);
    Span span = row_span[e.row];
    float sum = 0.f;
    for (int y = span.begin; y < span.end; ++y) {
      int64_t at = place(p.in, image, first_channel + e.channel, int64_t(y) * in_width + e.x);
      float w = row_weight[e.row * t.row_taps + y - span.begin], v = load(p.in.dtype, p.in.data, at);
      sum = y == span.begin ? w * v : fmaf(w, v, sum);
    }
    tile[(e.row * in_width + e.x) * t.group + e.channel] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * out_width * channels; i += THREADS) {
    Element e = element_of(i, p.out, rows, out_width, channels);
    Span span = column_span[e.x];
    float sum = 0.f;
    for (int x = span.begin; x < span.end; ++x) {
      float w = column_weight[e.x * t.column_taps + x - span.begin];
      float v = tile[(e.row * in_width + x) * t.group + e.channel];
      sum = x == span.begin ? w * v : fmaf(w, v, sum);
    }
    int64_t pixel = int64_t(first_row + e.row) * out_width + e.x;
    store(p.out.dtype, p.out.data, place(p.out, image, first_channel + e.channel, pixel), sum);
  }
}

size_t shared_memory(const Resample& p, const Tiling& t) {
  return cuda::shared_bytes<Span>(t.rows) + cuda::shared_bytes<Span>(p.out_width) +
         cuda::shared_bytes<float>(t.rows * t.row_taps) +
         cuda::shared_bytes<float>(p.out_width * t.column_taps) +
         cuda::shared_bytes<float>(t.rows * p.in_width * t.group);
}

}  // namespace

Status resample_cuda(const Resample& p, void* stream) {
  Tiling t{};
  t.group = p.in.channel != 1 && p.out.channel != 1 ? 1 : p.channels < 32 ? int(p.channels) : 32;
  t.row_taps = most_taps(row_axis(p));
  t.column_taps = most_taps(column_axis(p));
  // About eight elements for each thread, and no more shared memory than several blocks can have at once.
  int64_t width = p.in_width > p.out_width ? p.in_width : p.out_width;
  int64_t rows = 8 * THREADS / (width * t.group);
  t.rows = int(rows < 1 ? 1 : rows > p.out_height ? p.out_height : rows);
  while (shared_memory(p, t) > 24 * 1024 && t.rows > 1) t.rows = (t.rows + 1) / 2;
  while (shared_memory(p, t) > 48 * 1024 && t.group > 1) t.group = (t.group + 1) / 2;
  size_t shared = shared_memory(p, t);
  if (shared > cuda::max_shared_bytes()) return Status::unsupported;
  t.bands = int(cuda::ceil_div(p.out_height, t.rows));
  t.groups = int(cuda::ceil_div(p.channels, t.group));
  return ARIMG_LAUNCH(resample_kernel, p.images * t.groups * t.bands, THREADS, shared, stream, p, t);
}

}  // namespace arimg
