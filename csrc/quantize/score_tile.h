// Scores of 64 rows against 64 codes in the registers of 128 threads, for the `.cu` files of this family.
//
// A thread has four neighbouring rows and eight codes: four neighbouring ones in each half of the tile. The
// eight threads of a row are neighbours. Scores are those of contract.h, one chain in increasing dimension.
#pragma once

#include "core/cuda.h"
#include "quantize/contract.h"

namespace arimg::cuda {

constexpr int ROWS = GPU_TILE_ROWS, CODES = GPU_TILE_CODES;
constexpr int DEPTH = 32;  // dimensions in shared memory at a time
constexpr int CODE_LANES = 8, THREADS = CODE_LANES * ROWS / 4;
constexpr int THREAD_ROWS = 4, THREAD_CODES = CODES / CODE_LANES;
static_assert(ROWS == CODES && THREADS == 2 * ROWS && THREAD_CODES == 8);

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Whether rows of `dim` elements can be read in fours.
template <typename T>
bool four_fit(const void* base, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(base) % (4 * sizeof(T)) == 0;
}

// Copies dimensions [d0, d0 + DEPTH) of rows [first, first + 64) into tile[dimension][row], zeros beyond the
// end. Neighbouring threads take neighbouring rows, so the transposing stores fall into different banks.
template <typename T, int WIDTH>
__device__ __forceinline__ void load_tile(Shared<float> tile, const T* rows, int64_t first, int64_t end,
                                          int64_t dim, int64_t d0) {
  int row = int(threadIdx.x) % ROWS;
  const T* from = rows + (first + row) * dim;
  for (int d = int(threadIdx.x) / ROWS * WIDTH; d < DEPTH; d += THREADS / ROWS * WIDTH) {
    bool inside = first + row < end && d0 + d < dim;
    if constexpr (WIDTH == 4) {
      Four<T> v{};
      if (inside) v = *reinterpret_cast<const Four<T>*>(from + d0 + d);
      for (int i = 0; i < 4; ++i) tile[(d + i) * ROWS + row] = to_float(v.value[i]);
    } else {
      tile[d * ROWS + row] = inside ? to_float(from[d0 + d]) : 0.f;
    }
  }
}

constexpr size_t SCORE_TILE_BYTES =
    shared_bytes<float>(DEPTH * ROWS) + shared_bytes<float>(DEPTH * CODES) + shared_bytes<float>(CODES);

// Rows [first_row, row_end), at most 64, of x against a codebook. A code whose offset is NaN scores NaN.
// PRODUCTS: leaves the offsets out of the sums, which are then minus the products.
template <typename TX, typename TC, int WIDTH, bool PRODUCTS = false>
class ScoreTile {
 public:
  __device__ __forceinline__ ScoreTile(SharedArena& arena, const void* x, const Codebook& book,
                                       const float* offsets, int64_t first_row, int64_t row_end)
      : x_(arena.take<float>(DEPTH * ROWS)),
        codes_(arena.take<float>(DEPTH * CODES)),
        offsets_(arena.take<float>(CODES)),
        rows_((const TX*)x),
        book_(book),
        all_offsets_(offsets),
        first_row_(first_row),
        row_end_(row_end) {}

  // The same rows of another matrix, in the shared memory of a tile that is no longer used.
  template <typename Other>
  __device__ __forceinline__ ScoreTile(const ScoreTile<Other, TC, WIDTH, PRODUCTS>& from, const TX* x)
      : x_(from.x_),
        codes_(from.codes_),
        offsets_(from.offsets_),
        rows_(x),
        book_(from.book_),
        all_offsets_(from.all_offsets_),
        first_row_(from.first_row_),
        row_end_(from.row_end_) {}

  // After a change of the codebook or of the rows.
  __device__ __forceinline__ void restart(const float* offsets) {
    all_offsets_ = offsets;
    loaded_ = false;
  }

  static __device__ __forceinline__ int code_lane() { return int(threadIdx.x) % CODE_LANES; }
  // The thread's row r, and its code c, counted from those of the tile.
  static __device__ __forceinline__ int row(int r) { return int(threadIdx.x) / CODE_LANES * THREAD_ROWS + r; }
  static __device__ __forceinline__ int code(int c) { return c / 4 * (CODES / 2) + code_lane() * 4 + c % 4; }

  // sum[r][c] of codes [first, first + 64); those from code_end on mean nothing.
  __device__ __forceinline__ void scores(float (&sum)[THREAD_ROWS][THREAD_CODES], int64_t first,
                                         int64_t code_end) {
    const int64_t D = book_.dim;
    const bool cosine = book_.metric == Metric::cosine;
    for (int64_t d0 = 0; d0 < D; d0 += DEPTH) {
      __syncthreads();  // the tiles of the step before are no longer read
      if (!loaded_ || D > DEPTH) load_tile<TX, WIDTH>(x_, rows_, first_row_, row_end_, D, d0);
      loaded_ = true;
      load_tile<TC, WIDTH>(codes_, (const TC*)book_.codes, first, code_end, D, d0);
      if (d0 == 0 && threadIdx.x < CODES) {
        int64_t code = first + threadIdx.x;
        offsets_[threadIdx.x] = code < code_end ? all_offsets_[code] : 1.f;
      }
      __syncthreads();
      if (cosine) {
        for (int i = threadIdx.x; i < DEPTH * CODES; i += THREADS)
          codes_[i] = __fdiv_rn(codes_[i], offsets_[i % CODES]);
        __syncthreads();
      }
      if (d0 == 0)
        for (int r = 0; r < THREAD_ROWS; ++r)
          for (int c = 0; c < THREAD_CODES; ++c) sum[r][c] = cosine || PRODUCTS ? 0.f : offsets_[code(c)];
      multiply(sum, D - d0 < DEPTH ? int(D - d0) : DEPTH);
    }
  }

  __device__ __forceinline__ float offset(int c) const { return offsets_[code(c)]; }

  // Puts dimensions [d0, d0 + 32) of codes [first, first + 64) where code_values reads them, if they are not
  // there already. For all threads, after scores().
  __device__ __forceinline__ void load_columns(int64_t first, int64_t code_end, int64_t d0) {
    if (book_.dim <= DEPTH) return;
    __syncthreads();
    load_tile<TC, WIDTH>(codes_, (const TC*)book_.codes, first, code_end, book_.dim, d0);
    __syncthreads();
  }
  // Dimension d0 + d of the tile's codes [i, i + 4).
  __device__ __forceinline__ float4 code_values(int d, int i) const {
    return codes_.template vec<float4>(d * CODES + i);
  }

 private:
  template <typename, typename, int, bool>
  friend class ScoreTile;

  __device__ __forceinline__ void multiply(float (&sum)[THREAD_ROWS][THREAD_CODES], int depth) const {
#pragma unroll 4
    for (int d = 0; d < depth; ++d) {
      float4 a = x_.template vec<float4>(d * ROWS + row(0));
      float4 b = codes_.template vec<float4>(d * CODES + code_lane() * 4);
      float4 c = codes_.template vec<float4>(d * CODES + CODES / 2 + code_lane() * 4);
      const float rows[4] = {-a.x, -a.y, -a.z, -a.w};
      const float columns[8] = {b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
#pragma unroll
      for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
        for (int j = 0; j < THREAD_CODES; ++j) sum[i][j] = fmaf(rows[i], columns[j], sum[i][j]);
    }
  }

  Shared<float> x_, codes_, offsets_;
  const TX* rows_;
  const Codebook& book_;
  const float* all_offsets_;
  int64_t first_row_, row_end_;
  bool loaded_ = false;
};

// Calls launch(x value, code value, std::integral_constant-like width) for the dtypes and alignment given.
template <int N>
struct Width {
  static constexpr int value = N;
};
template <typename Launch>
Status with_tile_types(DType dtype, const void* x, const Codebook& book, Launch&& launch) {
  return with_dtype(dtype, [&](auto tx) {
    return with_dtype(book.dtype, [&](auto tc) {
      bool fours = four_fit<decltype(tx)>(x, book.dim) && four_fit<decltype(tc)>(book.codes, book.dim);
      return fours ? launch(tx, tc, Width<4>{}) : launch(tx, tc, Width<1>{});
    });
  });
}

}  // namespace arimg::cuda
