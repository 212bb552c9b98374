// See cached.h. Few rows: a block takes one part of the keys of one head and up to 8 rows, with ordinary
// multiply-adds, as reading the keys takes the time; a second launch combines the parts. More rows: the tiles
// of attention_*_cuda.cu, which do not read one-byte caches.
#include "attention/rows.h"
#include "core/chunk.h"
#include "kv_cache/load_codes.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int part_keys = int(kCachedGpuPartKeys), warps = 4;

// `lanes` neighbouring lanes, a power of two, share a key, each with `chunks` pieces of 16 bytes.
template <typename T, int chunks>
struct Piece {
  static constexpr int width = chunk<T>;
  int lanes, lane, group, groups;  // group: of the block's keys at one time

  __device__ __forceinline__ explicit Piece(int lanes)
      : lanes(lanes),
        lane(lane_in_warp() % lanes),
        group(warp_in_block() * (32 / lanes) + lane_in_warp() / lanes),
        groups(warps * (32 / lanes)) {}
  __device__ __forceinline__ int channel(int i) const { return (i * lanes + lane) * width; }
  __device__ __forceinline__ void load_codes(float (&to)[chunks][width], const uint8_t* row, float scale,
                                             Storage storage, int dim, bool aligned) const {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      if (channel(i) >= dim) {
#pragma unroll
        for (int j = 0; j < width; ++j) to[i][j] = 0.f;
      } else if (aligned) {
        cuda::load_codes<T, true>(to[i], row + channel(i), width, scale, storage);
      } else {
        cuda::load_codes<T, false>(to[i], row + channel(i), width, scale, storage);
      }
    }
  }
  __device__ __forceinline__ void load(float (&to)[chunks][width], const T* row, int dim,
                                       bool aligned) const {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      if (channel(i) >= dim) {
#pragma unroll
        for (int j = 0; j < width; ++j) to[i][j] = 0.f;
      } else if (aligned) {
        load_chunk<true>(to[i], row + channel(i), width);
      } else {
        load_chunk<false>(to[i], row + channel(i), width);
      }
    }
  }
};

// Keys or values of one head as floats. One-byte caches: `rows` finds the fresh ones alone.
template <typename T, bool coded>
struct Stored {
  HeadRows<T, true> rows;
  __device__ __forceinline__ Stored(const void* data, const AttentionStrides& s, const float*,
                                    const void* data_new, const AttentionStrides& s_new, const Attention&,
                                    const Cache& c, const KeyView& view, int64_t batch, int64_t kv_head)
      : rows(data, s, data_new, s_new, c, view, batch, kv_head) {}
  template <int chunks>
  __device__ __forceinline__ void load(const Piece<T, chunks>& piece, float (&to)[chunks][chunk<T>], int n,
                                       int dim, bool aligned) const {
    piece.load(to, rows(n), dim, aligned);
  }
};
template <typename T>
struct Stored<T, true> {
  HeadRows<T, true> rows;
  HeadRows<uint8_t, true> codes;
  HeadRows<float, true> factors;
  Storage storage;
  __device__ __forceinline__ Stored(const void* data, const AttentionStrides& s, const float* scale,
                                    const void* data_new, const AttentionStrides& s_new, const Attention& p,
                                    const Cache& c, const KeyView& view, int64_t batch, int64_t kv_head)
      : rows(nullptr, s, data_new, s_new, c, view, batch, kv_head),
        codes(data, s, nullptr, s_new, c, view, batch, kv_head),
        factors(scale, AttentionStrides{p.kv_heads * c.page_size, c.page_size, 1}, nullptr, s_new, c, view,
                batch, kv_head),
        storage(c.storage) {}
  template <int chunks>
  __device__ __forceinline__ void load(const Piece<T, chunks>& piece, float (&to)[chunks][chunk<T>], int n,
                                       int dim, bool aligned) const {
    if (n < rows.old)
      piece.load_codes(to, codes(n), *factors(n), storage, dim, aligned);
    else
      piece.load(to, rows(n), dim, aligned);
  }
};

// Row r of a key head's rows: query r % queries of head r / queries of the group.
struct RowPlace {
  int64_t head, query;
  __device__ __forceinline__ RowPlace(const Attention& p, int64_t kv_head, int64_t r)
      : head(kv_head * (p.heads / p.kv_heads) + r / p.queries), query(r % p.queries) {}
  __device__ __forceinline__ int64_t index(const Attention& p, int64_t batch) const {
    return (batch * p.heads + head) * p.queries + query;
  }
};

template <typename T, int R, int chunks, bool coded>
__global__ void __launch_bounds__(warps * 32, 2)
    cached_part_kernel(CachedAttention c, int lanes, bool aligned) {
  const Attention& p = c.rows;
  const int dim = int(p.dim), padded = lanes * chunks * chunk<T>;
  SharedArena arena;
  auto scores = arena.take<float>(R * part_keys);
  auto sums = arena.take<float>(warps * R * padded);
  auto scratch = arena.take<float>(32);

  const int64_t part = blockIdx.x % c.parts, kv_head = blockIdx.x / c.parts % p.kv_heads;
  const int64_t batch = blockIdx.x / c.parts / p.kv_heads;
  const int first_row = int(blockIdx.y) * R, rows = int(p.queries * (p.heads / p.kv_heads));
  const KeyView view(p, c.cache, batch);
  const Stored<T, coded> keys(p.k, p.k_stride, c.cache.k_scale, c.cache.k_new, c.cache.k_new_stride, p,
                              c.cache, view, batch, kv_head);
  const Stored<T, coded> values(p.v, p.v_stride, c.cache.v_scale, c.cache.v_new, c.cache.v_new_stride, p,
                                c.cache, view, batch, kv_head);
  const int first = int(part) * part_keys, count = Max{}(Min{}(view.keys - first, part_keys), 0);

  const Piece<T, chunks> piece(lanes);
  float q[R][chunks][chunk<T>];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const RowPlace place(p, kv_head, Min{}(first_row + r, rows - 1));
    piece.load(q[r],
               static_cast<const T*>(p.q) + batch * p.q_stride.batch + place.head * p.q_stride.head +
                   place.query * p.q_stride.row,
               dim, aligned);
    const float scale = p.scale * (p.head_scale != nullptr ? p.head_scale[place.head] : 1.f) * kLog2E;
#pragma unroll
    for (int i = 0; i < chunks; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) q[r][i][j] *= scale;
  }
  // All lanes of a warp go the same number of rounds; keys beyond the last are read as the last.
  for (int base = 0; base < count; base += piece.groups) {
    const int n = base + piece.group, key = first + Min{}(n, count - 1);
    float k[chunks][chunk<T>];
    keys.load(piece, k, key, dim, aligned);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < chunks; ++i)
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) s = __fmaf_rn(q[r][i][j], k[i][j], s);
      for (int step = lanes / 2; step > 0; step /= 2) s += __shfl_xor_sync(full_warp, s, step);
      if (piece.lane != 0 || n >= count) continue;
      if (key >= view.sinks) {  // a fresh key: not every row need see it
        const RowPlace place(p, kv_head, Min{}(first_row + r, rows - 1));
        if (!RowKeys(p, view, batch, place.query, true).sees(key, view.sinks)) s = -INFINITY;
      }
      scores[r * part_keys + n] = s;
    }
  }
  __syncthreads();

  float highest[R], weight[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float top = -INFINITY, total = 0.f;
    for (int n = thread_in_block(); n < count; n += warps * 32) top = fmaxf(top, scores[r * part_keys + n]);
    highest[r] = block_reduce_max(top, -INFINITY, scratch);
    const float from = highest[r] == -INFINITY ? 0.f : highest[r];
    for (int n = thread_in_block(); n < count; n += warps * 32) {
      float& s = scores[r * part_keys + n];
      s = exp2f(s - from);
      total += s;
    }
    weight[r] = block_reduce_sum(total, scratch);
  }

  float sum[R][chunks][chunk<T>];
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < chunks; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) sum[r][i][j] = 0.f;
  for (int n = piece.group; n < count; n += piece.groups) {
    float v[chunks][chunk<T>];
    values.load(piece, v, first + n, dim, aligned);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float w = scores[r * part_keys + n];
#pragma unroll
      for (int i = 0; i < chunks; ++i)
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j) sum[r][i][j] = __fmaf_rn(w, v[i][j], sum[r][i][j]);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < chunks; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        float s = sum[r][i][j];
        for (int step = lanes; step < 32; step *= 2) s += __shfl_xor_sync(full_warp, s, step);
        if (lane_in_warp() < lanes) sums[(warp_in_block() * R + r) * padded + piece.channel(i) + j] = s;
      }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (first_row + r >= rows) break;
    const RowPlace place(p, kv_head, first_row + r);
    float* to = c.partial + (place.index(p, batch) * c.parts + part) * (p.dim + 2);
    T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + place.head * p.out_stride.head +
             place.query * p.out_stride.row;
    for (int d = thread_in_block(); d < dim; d += warps * 32) {
      float s = 0.f;
      for (int w = 0; w < warps; ++w) s += sums[(w * R + r) * padded + d];
      if (c.parts > 1)
        to[d] = s;
      else
        out[d] = from_float<T>(s * inverse_weight(weight[r]));
    }
    if (c.parts > 1 && thread_in_block() == 0) {
      to[dim] = highest[r];
      to[dim + 1] = weight[r];
    }
  }
}

// A warp per row of [batch, heads, queries].
template <typename T>
__global__ void __launch_bounds__(warps * 32) cached_combine_kernel(CachedAttention c) {
  const Attention& p = c.rows;
  const int64_t row = int64_t(blockIdx.x) * warps + warp_in_block();
  if (row >= p.batch * p.heads * p.queries) return;
  const int dim = int(p.dim), step = dim + 2;
  const float* parts = c.partial + row * c.parts * step;
  float top = -INFINITY, weight = 0.f;
  for (int64_t i = 0; i < c.parts; ++i) top = fmaxf(top, parts[i * step + dim]);
  const float from = top == -INFINITY ? 0.f : top;
  for (int64_t i = 0; i < c.parts; ++i)
    weight = __fmaf_rn(parts[i * step + dim + 1], exp2f(parts[i * step + dim] - from), weight);
  const int64_t batch = row / p.queries / p.heads, head = row / p.queries % p.heads, query = row % p.queries;
  T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head +
           query * p.out_stride.row;
  for (int d = lane_in_warp(); d < dim; d += 32) {
    float s = 0.f;
    for (int64_t i = 0; i < c.parts; ++i)
      s = __fmaf_rn(parts[i * step + d], exp2f(parts[i * step + dim] - from), s);
    out[d] = from_float<T>(s * inverse_weight(weight));
  }
}

template <typename T, int R, int chunks, bool coded>
Status launch_parts(const CachedAttention& c, int lanes, void* stream) {
  const Attention& p = c.rows;
  const Grid grid(p.batch * p.kv_heads * c.parts, ceil_div(cached_rows(c), R));
  const size_t shared = shared_bytes<float>(R * part_keys) +
                        shared_bytes<float>(warps * R * lanes * chunks * chunk<T>) + shared_bytes<float>(32);
  Status status = ARIMG_LAUNCH((cached_part_kernel<T, R, chunks, coded>), grid, warps * 32, shared, stream, c,
                               lanes, rows_aligned<T>(p, c.cache));
  if (status != Status::ok || c.parts == 1) return status;
  return ARIMG_LAUNCH((cached_combine_kernel<T>), ceil_div(p.batch * p.heads * p.queries, warps), warps * 32,
                      0, stream, c);
}

template <typename T, int chunks, bool coded>
Status dispatch_rows(const CachedAttention& c, int lanes, void* stream) {
  const int64_t rows = cached_rows(c);
  if (rows <= 1) return launch_parts<T, 1, chunks, coded>(c, lanes, stream);
  if (rows <= 2) return launch_parts<T, 2, chunks, coded>(c, lanes, stream);
  if (rows <= 4) return launch_parts<T, 4, chunks, coded>(c, lanes, stream);
  return launch_parts<T, 8, chunks, coded>(c, lanes, stream);
}

template <typename T, bool coded>
Status dispatch_lanes(const CachedAttention& c, void* stream) {
  const int64_t pieces = ceil_div(c.rows.dim, chunk<T>);
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  if (pieces <= 32) return dispatch_rows<T, 1, coded>(c, lanes, stream);
  if constexpr (sizeof(T) == 4) return dispatch_rows<T, 2, coded>(c, lanes, stream);
  return Status::unsupported;
}

}  // namespace

Status cached_attention_cuda(const CachedAttention& c, void* stream) {
  const Attention& p = c.rows;
  if (p.keys + c.cache.fresh > key_limit - 2 * part_keys || p.dim > 256) return Status::unsupported;
  if (cached_rows(c) > kCachedGpuSplitRows) return attention_tiles_cuda(p, c.cache, true, stream);
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    return c.cache.storage == Storage::same ? dispatch_lanes<T, false>(c, stream)
                                            : dispatch_lanes<T, true>(c, stream);
  });
}

}  // namespace arimg
