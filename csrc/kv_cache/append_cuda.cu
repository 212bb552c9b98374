// See contract.h. A few neighbouring lanes take one head's vector of one token: q, k or v.
#include "core/chunk.h"
#include "core/cuda.h"
#include "kv_cache/codes.h"
#include "kv_cache/contract.h"

namespace arimg {
namespace {

using namespace cuda;

constexpr int threads = 256;

template <int n>
__device__ __forceinline__ void load_floats(float (&to)[n], const float* from) {  // aligned to them
  if constexpr (n == 2) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  }
}

// A row's norm and rotation, the same for all its lanes.
struct Work {
  float factor;         // of the norm
  const float* weight;  // per channel, or nullptr
  const float* cos;     // the row of the token, or nullptr: no rotation
  const float* sin;
  bool known;  // whether the tables have such a row
};

// `width` lanes hold one row of `dim` elements, each lane `pieces` chunks of it.
template <typename T, int width, int pieces, bool vectors>
struct Row {
  float value[pieces][chunk<T>];

  static __device__ __forceinline__ int element(int piece) {
    return (piece * width + lane_in_warp() % width) * chunk<T>;
  }
  __device__ __forceinline__ void load(const T* from, int dim) {
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i), count = dim - d;
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) value[i][j] = 0.f;
      if (count > 0) load_chunk<vectors>(value[i], from + d, count);
    }
  }
  __device__ __forceinline__ void store(T* to, int dim) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i), count = dim - d;
      if (count > 0) store_chunk<vectors>(to + d, value[i], count);
    }
  }
  __device__ __forceinline__ float squares() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) sum = __fmaf_rn(value[i][j], value[i][j], sum);
    return warp_reduce_sum<width>(sum);
  }
  // The bits of the largest magnitude; a NaN is above all.
  __device__ __forceinline__ int largest() const {
    int most = int(float_bits(kSmallestAmax));
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) most = max(most, bits(value[i][j]) & 0x7fffffff);
    return warp_reduce_max<width>(most);
  }
  __device__ __forceinline__ void normalise(const Work& work, int dim) {
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const int d = element(i) + j;
        value[i][j] *= work.factor;
        if (work.weight && d < dim) value[i][j] *= work.weight[d];
      }
  }
  __device__ __forceinline__ void rotate_pairs(const Work& work, int dim) {
    constexpr int n = chunk<T> / 2;
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i);
      if (d >= dim) continue;
      float c[n], s[n];
      if constexpr (vectors) {
        load_floats<n>(c, work.cos + d / 2);
        load_floats<n>(s, work.sin + d / 2);
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          c[j] = d + 2 * j < dim ? work.cos[d / 2 + j] : 0.f;
          s[j] = d + 2 * j < dim ? work.sin[d / 2 + j] : 0.f;
        }
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float a = value[i][2 * j], b = value[i][2 * j + 1];
        value[i][2 * j] = a * c[j] - b * s[j];
        value[i][2 * j + 1] = b * c[j] + a * s[j];
      }
    }
  }
  // The partner of a channel lies half a row away: it is read again, from the L1 cache.
  __device__ __forceinline__ void rotate_halves(const Work& work, const T* from, int dim) {
    const int half = dim / 2;
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i);
      if (d >= dim) continue;
      float partner[chunk<T>], c[chunk<T>], s[chunk<T>];
      if constexpr (vectors) {
        load_chunk<true>(partner, from + (d < half ? d + half : d - half), chunk<T>);
        load_floats<chunk<T>>(c, work.cos + d % half);
        load_floats<chunk<T>>(s, work.sin + d % half);
      }
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) {
        const int e = d + j, other = e < half ? e + half : e - half;
        if (e >= dim) break;
        if constexpr (!vectors) {
          partner[j] = to_float(from[other]);
          c[j] = work.cos[e % half];
          s[j] = work.sin[e % half];
        }
        float b = partner[j] * work.factor;
        if (work.weight) b *= work.weight[other];
        value[i][j] = value[i][j] * c[j] + (e < half ? -b : b) * s[j];
      }
    }
  }
  __device__ __forceinline__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < pieces; ++i)
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) value[i][j] = x;
  }
  __device__ __forceinline__ void store_codes(uint8_t* to, int dim, float inverse, Storage storage) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int d = element(i), count = dim - d;
      if (count <= 0) continue;
      alignas(8) uint8_t raw[chunk<T>];
#pragma unroll
      for (int j = 0; j < chunk<T>; ++j) raw[j] = uint8_t(encode(value[i][j], inverse, storage));
      if constexpr (vectors) {
        using V = std::conditional_t<chunk<T> == 4, uint32_t, uint2>;
        *reinterpret_cast<V*>(to + d) = *reinterpret_cast<const V*>(raw);
      } else {
#pragma unroll
        for (int j = 0; j < chunk<T>; ++j)
          if (j < count) to[d + j] = raw[j];
      }
    }
  }
};

// Which vector a row is.
struct Place {
  int64_t number, batch, token;
  int head, role;  // of the queries, the keys (1) or the values (2)
};

__device__ __forceinline__ Place place_of(const Append& p, int64_t row) {
  const int heads = int(p.q_heads + 2 * p.kv_heads), q_heads = int(p.q_heads), kv_heads = int(p.kv_heads);
  Place at;
  at.number = row / heads;
  at.head = int(row % heads);
  at.batch = at.number / p.tokens;
  at.token = at.number % p.tokens;
  at.role = at.head < q_heads ? 0 : at.head < q_heads + kv_heads ? 1 : 2;
  if (at.role) at.head -= q_heads + (at.role - 1) * kv_heads;
  return at;
}

__device__ __forceinline__ Work work_of(const Append& p, const Place& at, float squares) {
  Work work{1.f, nullptr, nullptr, nullptr, true};
  if (at.role == 2) return work;
  if (p.norm == Norm::l2) {
    const float length = sqrtf(squares), scale = at.role == 0 && p.q_weight ? p.q_weight[at.head] : 1.f;
    work.factor = scale / (length < 1e-12f ? 1e-12f : length);  // a NaN stays
  } else if (p.norm == Norm::rms) {
    work.factor = 1.f / sqrtf(squares / float(p.dim) + p.eps);
    work.weight = at.role == 0 ? p.q_weight : p.k_weight;
  }
  if (p.cos) {
    const int64_t index = append_rope_index(p, at.batch, at.token);
    work.known = index >= 0 && index < p.table_rows;
    work.cos = p.cos + (work.known ? index * (p.dim / 2) : 0);
    work.sin = p.sin + (work.known ? index * (p.dim / 2) : 0);
  }
  return work;
}

template <typename T, int width, int pieces, bool vectors>
__global__ void __launch_bounds__(threads) append_kernel(Append p) {
  const int64_t rows = p.batch * p.tokens * (p.q_heads + 2 * p.kv_heads);
  const int64_t row = (int64_t(blockIdx.x) * threads + threadIdx.x) / width;
  const bool valid = row < rows;  // lanes without a row still take part in the reductions
  const Place at = place_of(p, valid ? row : 0);
  const int dim = int(p.dim);
  const T* from = static_cast<const T*>(p.qkv) + (valid ? row : 0) * dim;

  Row<T, width, pieces, vectors> x;
  x.load(from, dim);
  const float squares = p.norm == Norm::none ? 0.f : x.squares();
  const Work work = work_of(p, at, squares);
  if (p.norm != Norm::none && at.role != 2) x.normalise(work, dim);
  if (work.cos && !work.known) {
    x.fill(NAN);
  } else if (work.cos) {
    if (p.interleaved)
      x.rotate_pairs(work, dim);
    else
      x.rotate_halves(work, from, dim);
  }
  const float amax = p.storage == Storage::same ? 0.f : float_from_bits(x.largest());
  if (!valid) return;
  if (at.role == 0) {
    x.store(static_cast<T*>(p.q) + ((at.batch * p.q_heads + at.head) * p.tokens + at.token) * dim, dim);
    return;
  }
  const Slot slot = find_slot(p.pages, at.batch, append_position(p, at.batch, at.token));
  if (slot.page < 0) return;
  const CachePart& part = at.role == 1 ? p.k : p.v;
  const int64_t to = slot.page * part.page_stride + at.head * part.head_stride + slot.offset * dim;
  if (p.storage == Storage::same) {
    x.store(static_cast<T*>(part.data) + to, dim);
    return;
  }
  const float limit = code_limit(p.storage);
  x.store_codes(static_cast<uint8_t*>(part.data) + to, dim, divide(limit, amax), p.storage);
  if (lane_in_warp() % width == 0)
    part.scale[(slot.page * p.kv_heads + at.head) * p.pages.size + slot.offset] = divide(amax, limit);
}

// Whether the cache can be written a chunk at a time; a chunk is chunk<T> elements in either storage.
template <typename T>
bool part_aligned(const CachePart& part, Storage storage) {
  const size_t bytes = storage == Storage::same ? 16 : chunk<T>;
  return reinterpret_cast<uintptr_t>(part.data) % bytes == 0 && part.page_stride % chunk<T> == 0 &&
         part.head_stride % chunk<T> == 0;
}

template <typename T, int width, int pieces>
Status launch_append(const Append& p, void* stream) {
  const int64_t rows = p.batch * p.tokens * (p.q_heads + 2 * p.kv_heads);
  const int64_t blocks = ceil_div(rows, threads / width);
  const bool tables = !p.cos || (reinterpret_cast<uintptr_t>(p.cos) % 16 == 0 &&
                                 reinterpret_cast<uintptr_t>(p.sin) % 16 == 0 &&
                                 (p.interleaved || p.dim / 2 % chunk<T> == 0));
  const bool vectors = tables && p.dim % chunk<T> == 0 && chunk_aligned<T>(p.qkv, p.dim) &&
                       chunk_aligned<T>(p.q, p.dim) && part_aligned<T>(p.k, p.storage) &&
                       part_aligned<T>(p.v, p.storage);
  if (vectors) return ARIMG_LAUNCH((append_kernel<T, width, pieces, true>), blocks, threads, 0, stream, p);
  return ARIMG_LAUNCH((append_kernel<T, width, pieces, false>), blocks, threads, 0, stream, p);
}

}  // namespace

Status append_cuda(const Append& p, void* stream) {
  return with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t chunks = ceil_div(p.dim, chunk<T>);
    if (chunks <= 8) return launch_append<T, 8, 1>(p, stream);
    if (chunks <= 16) return launch_append<T, 16, 1>(p, stream);
    if (chunks <= 32) return launch_append<T, 32, 1>(p, stream);
    if (chunks <= 64) return launch_append<T, 32, 2>(p, stream);
    return Status::unsupported;
  });
}

}  // namespace arimg
