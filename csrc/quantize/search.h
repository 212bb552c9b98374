// The search as ops.cpp files use it: on the CPU a codebook packed once and searched by PyTorch's threads, on
// the GPU a launch with its working memory.
#pragma once

#include "core/ops.h"
#include "core/scratch.h"
#include "quantize/contract.h"

namespace arimg {

class PackedCodes {
 public:
  explicit PackedCodes(const Codebook& book)
      : count_(book.count),
        dim_(book.dim),
        packed_(make_scratch(ARIMG_CPU(code_panels)(book.count) * ARIMG_CPU(panel_floats)(book.dim))) {
    int64_t panel = ARIMG_CPU(panel_floats)(dim_);
    parallel_for(ARIMG_CPU(code_panels)(count_), 1 + 65536 / panel,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(pack_codes)(book, packed_.get(), begin, end); });
  }

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

// A codebook on the GPU, with the offsets that every search of it needs.
class GpuCodes {
 public:
  GpuCodes(const Codebook& book, const Tensor& like, void* stream)
      : book_(book),
        stream_(stream),
        offsets_(empty(like, std::vector<int64_t>{book.count}, ScalarType::Float)) {
    check(ARIMG_GPU(code_offsets_cuda(book_, (float*)offsets_.mutable_data_ptr(), stream_)), "code_offsets");
  }

  void search(DType dtype, const void* x, int64_t rows, int64_t* index) const {
    int splits = nearest_code_splits(rows, book_.count);
    Tensor parts = empty(offsets_, std::vector<int64_t>{splits > 1 ? splits * rows : 0}, ScalarType::Long);
    [[maybe_unused]] NearestCodeGpu p{dtype, x,     book_,   (const float*)offsets_.const_data_ptr(),
                                      rows,  index, nullptr, splits};
    p.parts = (uint64_t*)parts.mutable_data_ptr();
    check(ARIMG_GPU(nearest_code_cuda(p, stream_)), "nearest_code");
  }

 private:
  Codebook book_;
  [[maybe_unused]] void* stream_;
  Tensor offsets_;
};

}  // namespace arimg
