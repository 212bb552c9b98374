#include <cmath>
#include <tuple>
#include <vector>

#include "core/ops.h"
#include "core/scratch.h"
#include "quantize/fsq.h"

namespace arimg {
namespace {

using Sizes = std::vector<int64_t>;

// Constants in double precision, rounded once.
FsqLevels describe(const Sizes& levels) {
  require(!levels.empty() && levels.size() <= size_t(fsq_max_dims), "arimg: expected 1 to 62 levels");
  FsqLevels l{};
  l.dims = int(levels.size());
  l.count = 1;
  for (int c = 0; c < l.dims; ++c) {
    const int64_t level = levels[size_t(c)];
    require(level >= 2 && level <= fsq_max_level && l.count <= (int64_t(1) << 62) / level,
            "arimg: expected levels of 2 to 1000 with a product of at most 2^62");
    const double half = double(level - 1) * (1 + 1e-3) / 2, offset = level % 2 == 0 ? 0.5 : 0.0;
    const double width = double(level / 2);
    l.shift[c] = float(std::atanh(offset / half));
    l.half[c] = float(half);
    l.lower[c] = float(-offset);
    l.width[c] = float(width);
    l.inverse[c] = float(1 / width);
    l.slope[c] = float(half / width);
    l.basis[c] = l.count;
    l.level[c] = int32_t(level);
    l.reciprocal[c] = ~uint64_t(0) / uint64_t(level);
    l.count *= level;
  }
  return l;
}

// A few microseconds of work per thread at least.
int64_t row_grain(int dims) {
  return 1 + 8192 / dims;
}

bool is_rows(const Tensor& t, size_t dims) {
  return t.dim() == 2 && t.is_contiguous() && t.size(1) == int64_t(dims);
}

std::tuple<Tensor, Tensor> fsq_op(const Tensor& z, Sizes levels) {
  require(is_rows(z, levels.size()), "arimg: expected contiguous z [N, number of levels]");
  Tensor codes = torch::stable::empty_like(z);
  Tensor index = empty(z, Sizes{z.size(0)}, ScalarType::Long);
  Fsq p{dtype_of(z), z.const_data_ptr(),       describe(levels),
        z.size(0),   codes.mutable_data_ptr(), (int64_t*)index.mutable_data_ptr()};
  if (on_gpu(z)) {
    GpuScope scope(z);
    check(ARIMG_GPU(fsq_cuda(p, scope.stream())), "fsq");
  } else {
    parallel_for(p.rows, row_grain(p.levels.dims), [&](int64_t begin, int64_t end) {
      Scratch scratch = make_scratch(ARIMG_CPU(fsq_scratch)(p.levels.dims));
      ARIMG_CPU(fsq)(p, scratch.get(), begin, end);
    });
  }
  return {codes, index};
}

Tensor fsq_backward_op(const Tensor& grad, const Tensor& z, Sizes levels) {
  require(is_rows(z, levels.size()) && is_rows(grad, levels.size()) && grad.size(0) == z.size(0) &&
              grad.scalar_type() == z.scalar_type(),
          "arimg: expected contiguous grad and z [N, number of levels] of one dtype");
  Tensor out = torch::stable::empty_like(z);
  FsqBackward p{dtype_of(z), grad.const_data_ptr(), z.const_data_ptr(), describe(levels),
                z.size(0),   out.mutable_data_ptr()};
  if (on_gpu(z)) {
    GpuScope scope(z);
    check(ARIMG_GPU(fsq_backward_cuda(p, scope.stream())), "fsq_backward");
  } else {
    parallel_for(p.rows, row_grain(p.levels.dims), [&](int64_t begin, int64_t end) {
      Scratch scratch = make_scratch(ARIMG_CPU(fsq_scratch)(p.levels.dims));
      ARIMG_CPU(fsq_backward)(p, scratch.get(), begin, end);
    });
  }
  return out;
}

Tensor fsq_codes_op(const Tensor& index, Sizes levels, ScalarType dtype) {
  require(index.dim() == 1 && index.is_contiguous() && index.scalar_type() == ScalarType::Long,
          "arimg: expected contiguous int64 indices [N]");
  Tensor codes = empty(index, Sizes{index.size(0), int64_t(levels.size())}, dtype);
  FsqCodes p{dtype_of(codes), (const int64_t*)index.const_data_ptr(), describe(levels), index.size(0),
             codes.mutable_data_ptr()};
  if (on_gpu(index)) {
    GpuScope scope(index);
    check(ARIMG_GPU(fsq_codes_cuda(p, scope.stream())), "fsq_codes");
  } else {
    parallel_for(p.rows, row_grain(p.levels.dims),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(fsq_codes)(p, begin, end); });
  }
  return codes;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("fsq(Tensor z, int[] levels) -> (Tensor, Tensor)");
  m.def("fsq_backward(Tensor grad, Tensor z, int[] levels) -> Tensor");
  m.def("fsq_codes(Tensor index, int[] levels, ScalarType dtype) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("fsq", TORCH_BOX(&fsq_op));
  m.impl("fsq_backward", TORCH_BOX(&fsq_backward_op));
  m.impl("fsq_codes", TORCH_BOX(&fsq_codes_op));
}

}  // namespace arimg
