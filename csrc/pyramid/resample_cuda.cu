// See contract.h. A block takes some output rows of a group of channels of one image: it finds the weights of
// its rows and of all columns, sums the rows into shared memory, and the columns from there. What lies side
// by side (channels, or the pixels of a row) goes through a thread in 16-byte pieces where it is aligned and
// divides into them, else element by element. A map that only changes its layout or dtype is turned in tiles.
#include "core/chunk.h"
#include "pyramid/map_cuda.h"

namespace arimg {
namespace {

using cuda::chunk;
using cuda::Shared;
using cuda::SharedArena;

constexpr int THREADS = 128;

struct Tiling {
  int rows, group, bands, groups, row_taps, column_taps;
};

// Piece i of V elements of [rows, width, channels] (the pixels of a channel lie together where `planes`).
struct Element {
  int row, x, channel;
};
template <bool planes, int V>
__device__ __forceinline__ Element element_of(int i, int rows, int width, int channels) {
  if constexpr (planes) {
    int across = width / V;
    return {i / across % rows, i % across * V, i / across / rows};
  } else {
    int deep = channels / V;
    return {i / deep / width, i / deep % width, i % deep * V};
  }
}

// Where it lies in the tile of summed rows, [rows, width, group] or [group, rows, width].
template <bool planes>
__device__ __forceinline__ int in_tile(Element e, const Tiling& t, int width) {
  return planes ? (e.channel * t.rows + e.row) * width + e.x : (e.row * width + e.x) * t.group + e.channel;
}

template <int V, typename T>
__device__ __forceinline__ void load_piece(float (&to)[V], const T* from) {
  if constexpr (V == 1)
    to[0] = to_float(*from);
  else
    cuda::load_chunk<true>(to, from, V);
}
template <int V, typename T>
__device__ __forceinline__ void store_piece(T* to, const float (&from)[V]) {
  if constexpr (V == 1)
    *to = from_float<T>(from[0]);
  else
    cuda::store_chunk<true>(to, from, V);
}

template <int V>
__device__ __forceinline__ void load_piece(float (&to)[V], Shared<float> tile, int at) {
  if constexpr (V == 1) {
    to[0] = tile[at];
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      float4 four = tile.vec<float4>(at + j);
      to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
    }
  }
}
template <int V>
__device__ __forceinline__ void store_piece(Shared<float> tile, int at, const float (&from)[V]) {
  if constexpr (V == 1) {
    tile[at] = from[0];
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 4)
      tile.vec<float4>(at + j) = make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]);
  }
}

// One more term of a sum; the first one begins it.
template <int V>
__device__ __forceinline__ void add_term(float (&sum)[V], float weight, const float (&value)[V], bool first) {
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = first ? weight * value[j] : fmaf(weight, value[j], sum[j]);
}

// IN, OUT: elements of a piece of the input and of the output.
template <typename T, bool planes, int IN, int OUT>
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
  const T* in = static_cast<const T*>(p.in.data);
  T* out = static_cast<T*>(p.out.data);

  for (int i = threadIdx.x; i < rows; i += THREADS)
    row_span[i] = axis_weights(row_axis(p), first_row + i, row_weight.part(i * t.row_taps, t.row_taps));
  for (int i = threadIdx.x; i < out_width; i += THREADS)
    column_span[i] = axis_weights(column_axis(p), i, column_weight.part(i * t.column_taps, t.column_taps));
  __syncthreads();
  for (int i = threadIdx.x; i < rows * in_width * channels / IN; i += THREADS) {
    Element e = element_of<planes, IN>(i, rows, in_width, channels);
    Span span = row_span[e.row];
    const T* from = in + place(p.in, image, first_channel + e.channel, int64_t(span.begin) * in_width + e.x);
    float sum[IN] = {}, value[IN];
    for (int k = 0; k < span.end - span.begin; ++k, from += in_width * p.in.pixel) {
      load_piece(value, from);
      add_term(sum, row_weight[e.row * t.row_taps + k], value, k == 0);
    }
    store_piece(tile, in_tile<planes>(e, t, in_width), sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * out_width * channels / OUT; i += THREADS) {
    Element e = element_of<planes, OUT>(i, rows, out_width, channels);
    int64_t pixel = int64_t(first_row + e.row) * out_width + e.x;
    T* to = out + place(p.out, image, first_channel + e.channel, pixel);
    float sum[OUT] = {};
    if constexpr (planes) {  // each pixel has its own terms
      int line = in_tile<planes>({e.row, 0, e.channel}, t, in_width);
#pragma unroll
      for (int j = 0; j < OUT; ++j) {
        Span span = column_span[e.x + j];
        for (int k = 0; k < span.end - span.begin; ++k) {
          float w = column_weight[(e.x + j) * t.column_taps + k], v = tile[line + span.begin + k];
          sum[j] = k == 0 ? w * v : fmaf(w, v, sum[j]);
        }
      }
    } else {
      Span span = column_span[e.x];
      float value[OUT];
      for (int k = 0; k < span.end - span.begin; ++k) {
        load_piece(value, tile, in_tile<planes>({e.row, span.begin + k, e.channel}, t, in_width));
        add_term(sum, column_weight[e.x * t.column_taps + k], value, k == 0);
      }
    }
    store_piece(to, sum);
  }
}

size_t shared_memory(const Resample& p, const Tiling& t) {
  return cuda::shared_bytes<Span>(t.rows) + cuda::shared_bytes<Span>(p.out_width) +
         cuda::shared_bytes<float>(t.rows * t.row_taps) +
         cuda::shared_bytes<float>(p.out_width * t.column_taps) +
         cuda::shared_bytes<float>(t.rows * p.in_width * t.group);
}

// `piece`: a group of channels side by side is a multiple of it.
Tiling tiling(const Resample& p, bool planes, int piece) {
  Tiling t{};
  t.row_taps = most_taps(row_axis(p));
  t.column_taps = most_taps(column_axis(p));
  // Four to sixteen elements for each thread, as many as leave some blocks for each multiprocessor, and no
  // more shared memory than several blocks can have at once.
  int64_t width = p.in_width > p.out_width ? p.in_width : p.out_width;
  int64_t share = p.images * p.channels * p.out_height * width / (4 * cuda::multiprocessors());
  int64_t elements = share < 4 * THREADS ? 4 * THREADS : share > 16 * THREADS ? 16 * THREADS : share;
  int64_t group = planes ? elements / (p.out_height * width) : 8 * piece;
  t.group = int(group < 1 ? 1 : group < p.channels ? group : p.channels);
  int64_t rows = elements / (width * t.group);
  t.rows = int(rows < 1 ? 1 : rows > p.out_height ? p.out_height : rows);
  while (shared_memory(p, t) > 24 * 1024 && t.rows > 1) t.rows = (t.rows + 1) / 2;
  const int least = planes ? 1 : piece;
  while (shared_memory(p, t) > 48 * 1024 && t.group > least)
    t.group = int(cuda::ceil_div((t.group + 1) / 2, least)) * least;
  t.bands = int(cuda::ceil_div(p.out_height, t.rows));
  t.groups = int(cuda::ceil_div(p.channels, t.group));
  return t;
}

template <typename T, bool planes, int IN, int OUT>
Status launch(const Resample& p, const Tiling& t, size_t shared, void* stream) {
  return ARIMG_LAUNCH((resample_kernel<T, planes, IN, OUT>), p.images * t.groups * t.bands, THREADS, shared,
                      stream, p, t);
}

template <typename T, bool planes>
Status resample(const Resample& p, void* stream) {
  Tiling t = tiling(p, planes, chunk<T>);
  size_t shared = shared_memory(p, t);
  if (shared > cuda::max_shared_bytes()) return Status::unsupported;
  auto pieces = [&](const Map& m, int64_t width) {
    return cuda::chunk_aligned<T>(m.data, planes ? m.channel : m.pixel) && m.batch % chunk<T> == 0 &&
           (planes ? width : p.channels) % chunk<T> == 0;
  };
  constexpr int V = chunk<T>;
  if (pieces(p.in, p.in_width))
    return pieces(p.out, p.out_width) ? launch<T, planes, V, V>(p, t, shared, stream)
                                      : launch<T, planes, V, 1>(p, t, shared, stream);
  return pieces(p.out, p.out_width) ? launch<T, planes, 1, V>(p, t, shared, stream)
                                    : launch<T, planes, 1, 1>(p, t, shared, stream);
}

constexpr int SIDE = 32;

// Piece i of V elements of a tile, along channels where `rows`, else along pixels; `count` of them exist.
struct Piece {
  int pixel, channel, count;
};
template <int V>
__device__ __forceinline__ Piece piece_of(int i, bool rows, int pixels, int channels) {
  int along = i % (SIDE / V) * V, line = i / (SIDE / V);
  int count = line < (rows ? pixels : channels) ? (rows ? channels : pixels) - along : 0;
  return rows ? Piece{line, along, count} : Piece{along, line, count};
}

// Block x: image and tile of pixels, y: tile of channels. `vectors`: the pieces are whole and aligned.
template <typename From, typename To>
__global__ void __launch_bounds__(THREADS)
    relayout_kernel(Resample p, int64_t total, bool in_vectors, bool out_vectors) {
  SharedArena arena;
  Shared<float> tile = arena.take<float>(SIDE * (SIDE + 1));  // [pixel, channel]; the last column is unused
  const int64_t across = cuda::ceil_div(total, SIDE), image = int64_t(blockIdx.x) / across;
  const int64_t pixel = int64_t(blockIdx.x) % across * SIDE, channel = int64_t(blockIdx.y) * SIDE;
  const int pixels = total - pixel < SIDE ? int(total - pixel) : SIDE;
  const int channels = p.channels - channel < SIDE ? int(p.channels - channel) : SIDE;
  auto at = [&](Piece e, bool rows, int j) {
    return (e.pixel + (rows ? 0 : j)) * (SIDE + 1) + e.channel + (rows ? j : 0);
  };

  const bool in_rows = p.in.channel == 1, out_rows = p.out.channel == 1;
  for (int i = threadIdx.x; i < SIDE * SIDE / chunk<From>; i += THREADS) {
    Piece e = piece_of<chunk<From>>(i, in_rows, pixels, channels);
    if (e.count <= 0) continue;
    const From* from =
        static_cast<const From*>(p.in.data) + place(p.in, image, channel + e.channel, pixel + e.pixel);
    float value[chunk<From>];
    if (in_vectors) {
      cuda::load_chunk<true>(value, from, chunk<From>);
    } else {
#pragma unroll
      for (int j = 0; j < chunk<From>; ++j)
        value[j] = j < e.count ? to_float(from[j * (in_rows ? p.in.channel : p.in.pixel)]) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < chunk<From>; ++j)
      if (j < e.count) tile[at(e, in_rows, j)] = value[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SIDE * SIDE / chunk<To>; i += THREADS) {
    Piece e = piece_of<chunk<To>>(i, out_rows, pixels, channels);
    if (e.count <= 0) continue;
    To* to = static_cast<To*>(p.out.data) + place(p.out, image, channel + e.channel, pixel + e.pixel);
    float value[chunk<To>];
#pragma unroll
    for (int j = 0; j < chunk<To>; ++j) value[j] = j < e.count ? tile[at(e, out_rows, j)] : 0.f;
    if (out_vectors) {
      cuda::store_chunk<true>(to, value, chunk<To>);
    } else {
#pragma unroll
      for (int j = 0; j < chunk<To>; ++j)
        if (j < e.count) to[j * (out_rows ? p.out.channel : p.out.pixel)] = from_float<To>(value[j]);
    }
  }
}

template <typename T>
bool whole_pieces(const Map& m, int64_t pixels, int64_t channels) {
  const bool rows = m.channel == 1;
  return (rows || m.pixel == 1) && cuda::chunk_aligned<T>(m.data, rows ? m.pixel : m.channel) &&
         m.batch % chunk<T> == 0 && (rows ? channels : pixels) % chunk<T> == 0;
}

template <typename From, typename To>
Status relayout(const Resample& p, void* stream) {
  int64_t pixels = p.in_height * p.in_width;
  cuda::Grid grid(p.images * cuda::ceil_div(pixels, SIDE), cuda::ceil_div(p.channels, SIDE));
  return ARIMG_LAUNCH(
      (relayout_kernel<From, To>), grid, THREADS, cuda::shared_bytes<float>(SIDE * (SIDE + 1)), stream, p,
      pixels, whole_pieces<From>(p.in, pixels, p.channels), whole_pieces<To>(p.out, pixels, p.channels));
}

}  // namespace

Status resample_cuda(const Resample& p, void* stream) {
  if (p.in.dtype == p.out.dtype) {
    if (p.in.pixel == 1 && p.out.pixel == 1)
      return with_dtype(p.in.dtype, [&](auto t) { return resample<decltype(t), true>(p, stream); });
    if (p.in.channel == 1 && p.out.channel == 1)
      return with_dtype(p.in.dtype, [&](auto t) { return resample<decltype(t), false>(p, stream); });
  }
  if (p.in_height != p.out_height || p.in_width != p.out_width) return Status::unsupported;
  if (p.in.dtype == DType::f32)
    return with_dtype(p.out.dtype, [&](auto t) { return relayout<float, decltype(t)>(p, stream); });
  if (p.out.dtype == DType::f32)
    return with_dtype(p.in.dtype, [&](auto t) { return relayout<decltype(t), float>(p, stream); });
  return Status::unsupported;
}

}  // namespace arimg
