#include "pyramid/run.h"

namespace arimg {
namespace {

Resampling resampling(int64_t mode) {
  require(mode >= 0 && mode <= int64_t(Resampling::bicubic), "arimg: expected a known mode of resampling");
  return Resampling(mode);
}

// Planes [B, C, H, W] to [B, C, height, width], or what the gradient of that makes of one of the result.
Tensor resize_planes(const Tensor& x, int64_t height, int64_t width, int64_t mode, bool transposed) {
  require(x.dim() == 4 && x.is_contiguous() && height > 0 && width > 0 && x.size(2) > 0 && x.size(3) > 0,
          "arimg: expected contiguous x [B, C, H, W] and positive sizes");
  Tensor out = empty(x, Sizes{x.size(0), x.size(1), height, width}, x.scalar_type());
  if (out.numel() == 0) return out;
  GpuScope scope(x);
  // Planes are alike, whichever image they belong to: all of them as the channels of one image. Distances
  // come from the sizes, since the stride of an axis of size 1 may be anything.
  int64_t H = x.size(2), W = x.size(3), planes = x.size(0) * x.size(1);
  Map from{dtype_of(x), const_cast<void*>(x.const_data_ptr()), planes * H * W, H * W, 1};
  Map to{dtype_of(out), out.mutable_data_ptr(), planes * height * width, height * width, 1};
  Resample p{resampling(mode), transposed, from, to, 1, planes, H, W, height, width};
  run(p, x, scope.stream());
  return out;
}

// The same for rows of channels: x [A, B, h * w, D], rows of channels at any distances, to a contiguous
// [A, B, height * width, D].
Tensor resize_rows(const Tensor& x, int64_t h, int64_t w, int64_t height, int64_t width, int64_t mode,
                   bool transposed) {
  require(x.dim() == 4 && (x.size(3) == 1 || x.stride(3) == 1) && h > 0 && w > 0 && x.size(2) == h * w &&
              height > 0 && width > 0,
          "arimg: expected x [A, B, h * w, D] with contiguous channels and positive sizes");
  Tensor out = empty(x, Sizes{x.size(0), x.size(1), height * width, x.size(3)}, x.scalar_type());
  if (out.numel() == 0) return out;
  GpuScope scope(x);
  int64_t D = x.size(3), bytes = dtype_of(x) == DType::f32 ? 4 : 2;
  Map from{dtype_of(x), const_cast<void*>(x.const_data_ptr()), x.stride(1), 1, x.stride(2)};
  Map to = pixel_rows(out, height * width, D);
  const bool even = x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
  int64_t images = even ? x.size(0) * x.size(1) : x.size(1);
  if (even && x.size(1) == 1) from.batch = x.stride(0);
  for (int64_t a = 0; a < x.size(0) * x.size(1); a += images) {
    run(Resample{resampling(mode), transposed, from, to, images, D, h, w, height, width}, x, scope.stream());
    from.data = (char*)from.data + x.stride(0) * bytes;
    to.data = (char*)to.data + images * to.batch * bytes;
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("resize_planes(Tensor x, int height, int width, int mode, bool transposed) -> Tensor");
  m.def("resize_rows(Tensor x, int h, int w, int height, int width, int mode, bool transposed) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("resize_planes", TORCH_BOX(&resize_planes));
  m.impl("resize_rows", TORCH_BOX(&resize_rows));
}

}  // namespace arimg
