// The search as ops.cpp files use it: on the CPU a codebook packed once and searched by PyTorch's threads, on
// the GPU a launch with its working memory.
#pragma once

#include <vector>

#include "core/ops.h"
#include "core/scratch.h"
#include "quantize/contract.h"
#include "quantize/sort_key.h"

namespace arimg {

inline bool is_matrix(const Tensor& t) {
  return t.dim() == 2 && t.is_contiguous();
}

inline Codebook codebook_of(const Tensor& x, const Tensor& codebook, int64_t metric) {
  require(is_matrix(x) && is_matrix(codebook) && x.size(1) == codebook.size(1) && codebook.numel() > 0,
          "arimg: expected contiguous x [N, D] and codebook [K, D] with K, D > 0");
  require(metric >= 0 && metric <= 2, "arimg: expected metric 0 (l2), 1 (cosine) or 2 (dot)");
  require(codebook.size(0) < (int64_t(1) << 31), "arimg: expected fewer than 2^31 codes");
  return {dtype_of(codebook), codebook.const_data_ptr(), codebook.size(0), codebook.size(1), Metric(metric)};
}

class PackedCodes {
 public:
  // With `chosen` (increasing) only these codes, of which book.count is the number; results count them.
  explicit PackedCodes(const Codebook& book, const int32_t* chosen = nullptr)
      : count_(book.count),
        dim_(book.dim),
        packed_(make_scratch(ARIMG_CPU(code_panels)(book.count) * ARIMG_CPU(panel_floats)(book.dim))) {
    const int64_t panel = ARIMG_CPU(panel_floats)(dim_);
    parallel_for(ARIMG_CPU(code_panels)(count_), 1 + 65536 / panel, [&](int64_t begin, int64_t end) {
      ARIMG_CPU(pack_codes)(book, chosen, packed_.get() + begin * panel, begin, end);
    });
  }

  const float* data() const { return packed_.get(); }

  void search(DType dtype, const void* x, int64_t rows, int64_t* index) const {
    NearestCode p{dtype, x, packed_.get(), count_, dim_, index};
    // Threads are worth their start from about a million multiply-adds each.
    parallel_for(rows, 1 + (int64_t(1) << 20) / (count_ * dim_), [&](int64_t begin, int64_t end) {
      Scratch scratch = make_scratch(ARIMG_CPU(nearest_code_scratch)(dim_));
      ARIMG_CPU(nearest_code)(p, scratch.get(), begin, end);
    });
  }

 private:
  int64_t count_, dim_;
  Scratch packed_;
};

// One search of a codebook on the CPU; with `chosen`, of these codes alone.
class StreamedCodes {
 public:
  explicit StreamedCodes(const Codebook& book, const int32_t* chosen = nullptr)
      : book_(book), chosen_(chosen), panels_(ARIMG_CPU(code_panels)(book.count)) {
    // Threads are worth their start from about a million multiply-adds each, for some ten rows.
    parts_ = at_most_threads(book.count * book.dim / 100000);
  }

  void search(DType dtype, const void* x, int64_t rows, int64_t* index) const {
    const int64_t chunk = ARIMG_CPU(stream_chunk_rows)(book_.dim);
    Scratch copy = make_scratch(chunk * ARIMG_CPU(stream_row_floats)(book_.dim));
    std::vector<uint64_t> keys(size_t(parts_ * chunk));
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t n = rows - first < chunk ? rows - first : chunk;
      ARIMG_CPU(stream_rows)(dtype, x, book_.dim, first, n, copy.get());
      search_chunk({book_, chosen_, copy.get(), n}, keys.data());
      for (int64_t row = 0; row < n; ++row) {
        uint64_t key = keys[size_t(row)];
        for (int64_t part = 1; part < parts_; ++part) {
          const uint64_t other = keys[size_t(part * n + row)];
          key = other < key ? other : key;
        }
        index[first + row] = key_index(key);
      }
    }
  }

 private:
  static int64_t at_most_threads(int64_t n) {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    return n < 1 ? 1 : n < threads ? n : threads;
  }

  void search_chunk(const StreamCodes& p, uint64_t* keys) const {
    parallel_for(parts_, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch = make_scratch(ARIMG_CPU(stream_scratch)(book_.dim));
      for (int64_t part = begin; part < end; ++part)
        ARIMG_CPU(stream_codes)(p, scratch.get(), panels_ * part / parts_, panels_ * (part + 1) / parts_,
                                keys + part * p.rows);
    });
  }

  Codebook book_;
  const int32_t* chosen_;
  int64_t panels_, parts_;
};

// One search on the CPU in the way that is faster. With `chosen` book.count is the number of these.
inline void search_codes(const Codebook& book, const int32_t* chosen, DType dtype, const void* x,
                         int64_t rows, int64_t* index) {
  if (book.dim >= 64)
    StreamedCodes(book, chosen).search(dtype, x, rows, index);
  else
    PackedCodes(book, chosen).search(dtype, x, rows, index);
}

// A codebook on the GPU, with the offsets that every search of it needs.
class GpuCodes {
 public:
  GpuCodes(const Codebook& book, const Tensor& like, void* stream, const Allowed& allowed = {})
      : book_(book),
        allowed_(allowed),
        stream_(stream),
        offsets_(empty(like, std::vector<int64_t>{allowed.groups * book.count}, ScalarType::Float)) {
    check(ARIMG_GPU(code_offsets_cuda(book_, allowed_.codes, allowed_.groups,
                                      (float*)offsets_.mutable_data_ptr(), stream_)),
          "code_offsets");
  }

  const float* offsets() const { return (const float*)offsets_.const_data_ptr(); }

  void search(DType dtype, const void* x, int64_t rows, int64_t* index) const {
    int splits = nearest_code_splits(rows, book_.count);
    Tensor parts = empty(offsets_, std::vector<int64_t>{splits > 1 ? splits * rows : 0}, ScalarType::Long);
    [[maybe_unused]] NearestCodeGpu p{dtype,           x,    book_, offsets(), allowed_.codes,
                                      allowed_.groups, rows, index, nullptr,   splits};
    p.parts = (uint64_t*)parts.mutable_data_ptr();
    check(ARIMG_GPU(nearest_code_cuda(p, stream_)), "nearest_code");
  }

 private:
  Codebook book_;
  Allowed allowed_;
  [[maybe_unused]] void* stream_;
  Tensor offsets_;
};

}  // namespace arimg
