#include <cmath>
#include <vector>

#include "block/conv3x3.h"
#include "core/ops.h"
#include "core/scratch.h"

namespace arimg {

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int "
      "up) "
      "-> Tensor");
  m.def("group_norm_affine(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor)");
}

// CPU kernels alone: the emulated library has none, and its Python callers take the formula.
#if !defined(ARIMG_EMULATOR)
namespace {

constexpr int64_t kMomentsBytes = 1 << 18;  // of pixels whose two passes share the cache

int64_t bytes_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float ? 4 : 2;
}

const float* per_channel(const std::optional<Tensor>& t, const Tensor& x) {
  if (!t) return nullptr;
  require(t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(3) && t->is_contiguous() &&
              t->scalar_type() == ScalarType::Float,
          "arimg: expected contiguous float32 scale and shift [B, C]");
  return (const float*)t->const_data_ptr();
}

// x [B, H, W, C] and the result [B, H, W, N] have their channels last.
Tensor conv3x3_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                  const std::optional<Tensor>& residual, int64_t up) {
  require(!on_gpu(x), "arimg: conv3x3 has a CPU kernel alone");
  require(x.dim() == 4 && x.is_contiguous() && (up == 1 || up == 2),
          "arimg: expected contiguous x [B, H, W, C]");
  require(weight.dim() == 4 && weight.size(1) == x.size(3) && weight.is_contiguous() && weight.size(2) == 3 &&
              weight.size(3) == 3,
          "arimg: expected contiguous weight [N, C, 3, 3]");
  require(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous() &&
                    bias->scalar_type() == weight.scalar_type()),
          "arimg: expected contiguous bias [N] of weight's dtype");
  Conv3x3 p{};
  p.dtype = dtype_of(x);
  p.x = x.const_data_ptr();
  p.scale = per_channel(scale, x);
  p.shift = per_channel(shift, x);
  p.weight_dtype = dtype_of(weight);
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.batch = x.size(0);
  p.height = x.size(1) * up;
  p.width = x.size(2) * up;
  p.channels = x.size(3);
  p.outputs = weight.size(0);
  p.up = up;
  Tensor out = empty(x, std::vector<int64_t>{p.batch, p.height, p.width, p.outputs}, x.scalar_type());
  if (residual) {
    require(residual->is_contiguous() && residual->numel() == out.numel() &&
                residual->scalar_type() == x.scalar_type(),
            "arimg: expected contiguous residual of the result's shape and x's dtype");
    p.residual = residual->const_data_ptr();
  }
  p.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;
  prefer_large_pages(p.out, out.numel() * bytes_of(out));
  // With fewer chunks than threads, the panels are split too; each part transforms the tiles anew.
  const int64_t units = p.batch * ARIMG_CPU(conv3x3_chunks)(p), threads = torch::stable::get_num_threads();
  int64_t splits = (threads + units - 1) / units, panels = ARIMG_CPU(conv3x3_panels)(p);
  if (splits > panels) splits = panels;
  parallel_for(units * splits, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(conv3x3_scratch)(p));
    for (int64_t unit = begin; unit < end; ++unit) ARIMG_CPU(conv3x3)(p, splits, unit, scratch.get());
  });
  return out;
}

// The moments of a group from those of its channels in every part, in double (Chan, Golub & LeVeque 1979).
struct Group {
  double mean = 0, squares = 0;
};

Group merge(const float* means, const float* squares, int64_t parts, int64_t part_pixels, int64_t pixels,
            int64_t channels, int64_t first, int64_t count) {
  auto size = [&](int64_t part) {
    return double(part + 1 < parts ? part_pixels : pixels - part * part_pixels);
  };
  Group g;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = first; c < first + count; ++c) g.mean += size(part) * means[part * channels + c];
  g.mean /= double(pixels) * double(count);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = first; c < first + count; ++c) {
      const double off = means[part * channels + c] - g.mean;
      g.squares += squares[part * channels + c] + size(part) * off * off;
    }
  return g;
}

std::tuple<Tensor, Tensor> group_norm_affine_op(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                int64_t groups, double eps) {
  require(!on_gpu(x), "arimg: group_norm_affine has a CPU kernel alone");
  require(x.dim() == 4 && x.is_contiguous(), "arimg: expected contiguous x [B, H, W, C]");
  const int64_t batch = x.size(0), pixels = x.size(1) * x.size(2), channels = x.size(3);
  auto parameter = [&](const Tensor& t) {
    return t.dim() == 1 && t.size(0) == channels && t.is_contiguous() && t.scalar_type() == ScalarType::Float;
  };
  require(groups > 0 && channels % groups == 0 && parameter(weight) && parameter(bias),
          "arimg: expected contiguous float32 weight and bias [C], and groups that divide C");
  Tensor scale = empty(x, std::vector<int64_t>{batch, channels}, ScalarType::Float);
  Tensor shift = empty(x, std::vector<int64_t>{batch, channels}, ScalarType::Float);
  if (x.numel() == 0) return {scale, shift};
  const int64_t bytes = bytes_of(x);
  int64_t part_pixels = kMomentsBytes / (channels * bytes);
  if (part_pixels < 1) part_pixels = 1;
  const int64_t parts = (pixels + part_pixels - 1) / part_pixels;
  Scratch moments = make_scratch(2 * batch * parts * channels);
  auto means_of = [&](int64_t image) { return moments.get() + 2 * image * parts * channels; };
  parallel_for(batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts, part = i % parts, first = part * part_pixels;
      float* mean = means_of(image) + part * channels;
      ChannelMoments m{dtype_of(x),
                       (const char*)x.const_data_ptr() + (image * pixels + first) * channels * bytes,
                       mean,
                       mean + parts * channels,
                       part + 1 < parts ? part_pixels : pixels - first,
                       channels};
      ARIMG_CPU(channel_moments)(m);
    }
  });
  const float *w = (const float*)weight.const_data_ptr(), *b = (const float*)bias.const_data_ptr();
  float *to_scale = (float*)scale.mutable_data_ptr(), *to_shift = (float*)shift.mutable_data_ptr();
  const int64_t count = channels / groups;
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t group = 0; group < groups; ++group) {
      const float* means = means_of(image);
      Group g =
          merge(means, means + parts * channels, parts, part_pixels, pixels, channels, group * count, count);
      const double inverse = 1 / std::sqrt(g.squares / (double(pixels) * double(count)) + eps);
      for (int64_t c = group * count; c < (group + 1) * count; ++c) {
        to_scale[image * channels + c] = float(w[c] * inverse);
        to_shift[image * channels + c] = float(b[c] - g.mean * inverse * w[c]);
      }
    }
  return {scale, shift};
}

}  // namespace

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_op));
  m.impl("group_norm_affine", TORCH_BOX(&group_norm_affine_op));
}

#endif

}  // namespace arimg
