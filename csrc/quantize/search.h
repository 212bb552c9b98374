// The search as ops.cpp files use it: on the CPU a codebook packed once and searched by PyTorch's threads, on
// the GPU a launch with its working memory.
#pragma once

#include <vector>

#include "core/ops.h"
#include "core/scratch.h"
#include "quantize/contract.h"

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
  explicit PackedCodes(const Codebook& book) : PackedCodes(book, nullptr) {}

  // Only the chosen codes, in increasing order; results count these.
  PackedCodes(Codebook book, const std::vector<int32_t>& chosen)
      : PackedCodes((book.count = int64_t(chosen.size()), book), chosen.data()) {}

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
  PackedCodes(const Codebook& book, const int32_t* chosen)
      : count_(book.count),
        dim_(book.dim),
        packed_(make_scratch(ARIMG_CPU(code_panels)(book.count) * ARIMG_CPU(panel_floats)(book.dim))) {
    int64_t panel = ARIMG_CPU(panel_floats)(dim_);
    parallel_for(ARIMG_CPU(code_panels)(count_), 1 + 65536 / panel, [&](int64_t begin, int64_t end) {
      ARIMG_CPU(pack_codes)(book, chosen, packed_.get(), begin, end);
    });
  }

  int64_t count_, dim_;
  Scratch packed_;
};

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
