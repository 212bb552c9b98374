// Maps of tensors, and resampling as ops.cpp files of this family run it.
#pragma once

#include "core/ops.h"
#include "core/scratch.h"
#include "pyramid/contract.h"

namespace arimg {

using Sizes = std::vector<int64_t>;

// Any layout whose pixels are evenly spaced, in the order of rows.
inline Map map_of(const Tensor& t) {
  require(t.size(3) == 1 || t.size(2) == 1 || t.stride(2) == t.size(3) * t.stride(3),
          "arimg: expected a map with evenly spaced pixels");
  int64_t pixel = t.size(3) > 1 ? t.stride(3) : t.stride(2);
  return {dtype_of(t), const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), pixel};
}

// [images, pixels, channels], contiguous.
inline Map pixel_rows(const Tensor& t, int64_t pixels, int64_t channels) {
  return {dtype_of(t), const_cast<void*>(t.const_data_ptr()), pixels * channels, 1, channels};
}

// `like` says where to run: a tensor of the call.
inline void run(const Resample& p, const Tensor& like, [[maybe_unused]] void* stream) {
  if (on_gpu(like)) return check(ARIMG_GPU(resample_cuda(p, stream)), "resample");
  int64_t work = p.in_height * p.in_width + p.out_height * p.out_width;
  parallel_for(ARIMG_CPU(resample_items)(p), 1 + 2048 / work, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(resample_scratch)(p));
    ARIMG_CPU(resample)(p, scratch.get(), begin, end);
  });
}

}  // namespace arimg
