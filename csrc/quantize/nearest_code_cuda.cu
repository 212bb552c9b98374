// See contract.h. A product of 64 x 64 tiles in registers whose scores are compared instead of stored.
#include "quantize/contract.h"

#include "core/cuda.h"

namespace arimg {
namespace {

using cuda::Shared;
using cuda::SharedArena;

constexpr int ROWS = GPU_TILE_ROWS, CODES = GPU_TILE_CODES;
constexpr int DEPTH = 32;  // dimensions in shared memory at a time
constexpr int CODE_LANES = 8, THREADS = CODE_LANES * ROWS / 4;
constexpr int THREAD_ROWS = 4, THREAD_CODES = CODES / CODE_LANES;
static_assert(ROWS == CODES && THREADS == 2 * ROWS && THREAD_CODES == 8);

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Orders like (score, index), with -0 equal to 0. Scores are never NaN here.
__device__ __forceinline__ uint64_t sort_key(float score, int index) {
  uint32_t bits = float_bits(score + 0.f);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | uint32_t(index);
}

// Copies dimensions [d0, d0 + DEPTH) of rows [first, first + 64) into tile[dimension][row], zeros beyond the
// end. Neighbouring threads take neighbouring rows, so the transposing stores fall into different banks.
template <typename T, int WIDTH>
__device__ __forceinline__ void load_tile(Shared<float> tile, const T* rows, int64_t first, int64_t count,
                                          int64_t dim, int64_t d0) {
  int row = int(threadIdx.x) % ROWS;
  const T* from = rows + (first + row) * dim;
  for (int d = int(threadIdx.x) / ROWS * WIDTH; d < DEPTH; d += THREADS / ROWS * WIDTH) {
    bool inside = first + row < count && d0 + d < dim;
    if constexpr (WIDTH == 4) {
      Four<T> v{};
      if (inside) v = *reinterpret_cast<const Four<T>*>(from + d0 + d);
      for (int i = 0; i < 4; ++i) tile[(d + i) * ROWS + row] = to_float(v.value[i]);
    } else {
      tile[d * ROWS + row] = inside ? to_float(from[d0 + d]) : 0.f;
    }
  }
}

template <typename TX, typename TC, int WIDTH>
__global__ void __launch_bounds__(THREADS, 4) nearest_code_kernel(NearestCodeGpu p, int64_t codes_per_part) {
  SharedArena arena;
  Shared<float> x = arena.take<float>(DEPTH * ROWS);
  Shared<float> codes = arena.take<float>(DEPTH * CODES);
  Shared<float> offsets = arena.take<float>(CODES);
  const int64_t D = p.book.dim, K = p.book.count;
  const bool cosine = p.book.metric == Metric::cosine;
  const int64_t first_row = int64_t(blockIdx.x) * ROWS;
  const int64_t code_begin = blockIdx.y * codes_per_part;
  const int64_t code_end = code_begin + codes_per_part < K ? code_begin + codes_per_part : K;
  const int code_lane = threadIdx.x % CODE_LANES, row_lane = threadIdx.x / CODE_LANES;

  float best[THREAD_ROWS];
  int best_index[THREAD_ROWS];
  for (int r = 0; r < THREAD_ROWS; ++r) {
    best[r] = INFINITY;
    best_index[r] = 0;
  }
  for (int64_t first = code_begin; first < code_end; first += CODES) {
    float sum[THREAD_ROWS][THREAD_CODES];
    for (int64_t d0 = 0; d0 < D; d0 += DEPTH) {
      __syncthreads();  // the tiles of the step before are no longer read
      if (first == code_begin || D > DEPTH) load_tile<TX, WIDTH>(x, (const TX*)p.x, first_row, p.rows, D, d0);
      load_tile<TC, WIDTH>(codes, (const TC*)p.book.codes, first, code_end, D, d0);
      if (d0 == 0 && threadIdx.x < CODES) {
        int64_t code = first + threadIdx.x;
        offsets[threadIdx.x] = code < code_end ? p.offsets[code] : cosine ? 1.f : INFINITY;
      }
      __syncthreads();
      if (cosine) {
        for (int i = threadIdx.x; i < DEPTH * CODES; i += THREADS)
          codes[i] = __fdiv_rn(codes[i], offsets[i % CODES]);
        __syncthreads();
      }
      if (d0 == 0)
        for (int r = 0; r < THREAD_ROWS; ++r)
          for (int c = 0; c < THREAD_CODES; ++c)
            sum[r][c] = cosine ? 0.f : offsets[c / 4 * (CODES / 2) + code_lane * 4 + c % 4];
      const int depth = D - d0 < DEPTH ? int(D - d0) : DEPTH;
#pragma unroll 4
      for (int d = 0; d < depth; ++d) {
        float4 a = x.template vec<float4>(d * ROWS + row_lane * 4);
        float4 b = codes.template vec<float4>(d * CODES + code_lane * 4);
        float4 c = codes.template vec<float4>(d * CODES + CODES / 2 + code_lane * 4);
        const float rows[4] = {-a.x, -a.y, -a.z, -a.w};
        const float columns[8] = {b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
          for (int j = 0; j < THREAD_CODES; ++j) sum[i][j] = fmaf(rows[i], columns[j], sum[i][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < THREAD_ROWS; ++r)
#pragma unroll
      for (int c = 0; c < THREAD_CODES; ++c) {
        int64_t code = first + c / 4 * (CODES / 2) + code_lane * 4 + c % 4;
        if (sum[r][c] < best[r] && code < code_end) {
          best[r] = sum[r][c];
          best_index[r] = int(code);
        }
      }
  }
  for (int r = 0; r < THREAD_ROWS; ++r) {
    uint64_t key = cuda::warp_reduce_min<CODE_LANES>(sort_key(best[r], best_index[r]));
    int64_t row = first_row + row_lane * 4 + r;
    if (code_lane != 0 || row >= p.rows) continue;
    if (p.splits == 1)
      p.index[row] = int64_t(key & 0xffffffffu);
    else
      p.parts[blockIdx.y * p.rows + row] = key;
  }
}

__global__ void combine_parts_kernel(NearestCodeGpu p) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  uint64_t key = p.parts[row];
  for (int part = 1; part < p.splits; ++part) {
    uint64_t other = p.parts[part * p.rows + row];
    key = other < key ? other : key;
  }
  p.index[row] = int64_t(key & 0xffffffffu);
}

template <typename T>
__global__ void code_offsets_kernel(Codebook book, float* offsets) {
  int64_t code = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (code >= book.count) return;
  const T* from = (const T*)book.codes + code * book.dim;
  float squares = 0.f;
  for (int64_t d = 0; d < book.dim; ++d) squares = fmaf(to_float(from[d]), to_float(from[d]), squares);
  if (book.metric == Metric::cosine) {
    float length = __fsqrt_rn(squares);
    offsets[code] = length < 1e-12f ? 1e-12f : length;
  } else {
    offsets[code] = book.metric == Metric::l2 ? 0.5f * squares : 0.f;
  }
}

// One warp per 16 codes and 32 columns: it passes over all indices, 32 at a time, and adds the rows that are
// its own, in order.
constexpr int OWN_CODES = 16, BACKWARD_WARPS = 4;

template <typename T>
__global__ void __launch_bounds__(32 * BACKWARD_WARPS) lookup_backward_kernel(LookupBackward p) {
  SharedArena arena;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Shared<float> all = arena.take<float>(BACKWARD_WARPS * OWN_CODES * 32);
  Shared<float> sums = all.part(warp * OWN_CODES * 32, OWN_CODES * 32);
  const int64_t begin = (int64_t(blockIdx.x) * BACKWARD_WARPS + warp) * OWN_CODES;
  const int64_t column = int64_t(blockIdx.y) * 32 + lane;
  for (int i = 0; i < OWN_CODES; ++i) sums[i * 32 + lane] = 0.f;
  for (int64_t first = 0; first < p.rows; first += 32) {
    int64_t code = first + lane < p.rows ? p.index[first + lane] - begin : -1;
    bool own = code >= 0 && code < OWN_CODES;
    unsigned pending = __ballot_sync(cuda::full_warp, own);
    while (pending != 0) {
      int source = __ffs(int(pending)) - 1;
      pending &= pending - 1;
      int place = __shfl_sync(cuda::full_warp, own ? int(code) : 0, source);
      if (column < p.dim)
        sums[place * 32 + lane] += to_float(((const T*)p.grad)[(first + source) * p.dim + column]);
    }
  }
  if (column < p.dim)
    for (int i = 0; i < OWN_CODES && begin + i < p.count; ++i)
      ((T*)p.out)[(begin + i) * p.dim + column] = from_float<T>(sums[i * 32 + lane]);
}

template <typename T>
bool four_fit(const void* base, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(base) % (4 * sizeof(T)) == 0;
}

template <typename TX, typename TC>
Status launch_search(const NearestCodeGpu& p, void* stream) {
  int64_t tiles = cuda::ceil_div(p.book.count, CODES);
  int64_t per_part = cuda::ceil_div(tiles, p.splits) * CODES;
  cuda::Grid grid(cuda::ceil_div(p.rows, ROWS), p.splits);
  size_t shared = cuda::shared_bytes<float>(DEPTH * ROWS) + cuda::shared_bytes<float>(DEPTH * CODES) +
                  cuda::shared_bytes<float>(CODES);
  if (four_fit<TX>(p.x, p.book.dim) && four_fit<TC>(p.book.codes, p.book.dim))
    return ARIMG_LAUNCH((nearest_code_kernel<TX, TC, 4>), grid, THREADS, shared, stream, p, per_part);
  return ARIMG_LAUNCH((nearest_code_kernel<TX, TC, 1>), grid, THREADS, shared, stream, p, per_part);
}

}  // namespace

Status code_offsets_cuda(const Codebook& book, float* offsets, void* stream) {
  return with_dtype(book.dtype, [&](auto t) {
    return ARIMG_LAUNCH((code_offsets_kernel<decltype(t)>), cuda::ceil_div(book.count, 128), 128, 0, stream,
                        book, offsets);
  });
}

Status nearest_code_cuda(const NearestCodeGpu& p, void* stream) {
  Status status = with_dtype(p.dtype, [&](auto x) {
    return with_dtype(p.book.dtype,
                      [&](auto code) { return launch_search<decltype(x), decltype(code)>(p, stream); });
  });
  if (status != Status::ok || p.splits == 1) return status;
  return ARIMG_LAUNCH(combine_parts_kernel, cuda::ceil_div(p.rows, 128), 128, 0, stream, p);
}

Status lookup_backward_cuda(const LookupBackward& p, void* stream) {
  cuda::Grid grid(cuda::ceil_div(p.count, OWN_CODES * BACKWARD_WARPS), cuda::ceil_div(p.dim, 32));
  size_t shared = cuda::shared_bytes<float>(BACKWARD_WARPS * OWN_CODES * 32);
  return with_dtype(p.dtype, [&](auto t) {
    return ARIMG_LAUNCH((lookup_backward_kernel<decltype(t)>), grid, 32 * BACKWARD_WARPS, shared, stream, p);
  });
}

}  // namespace arimg
