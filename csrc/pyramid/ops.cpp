#include "pyramid/contract.h"

#include "core/ops.h"
#include "core/scratch.h"
#include "quantize/search.h"

namespace arimg {
namespace {

using Sizes = std::vector<int64_t>;

// Any layout whose pixels are evenly spaced, in the order of rows.
Map map_of(const Tensor& t) {
  require(t.size(3) == 1 || t.size(2) == 1 || t.stride(2) == t.size(3) * t.stride(3),
          "arimg: expected a map with evenly spaced pixels");
  int64_t pixel = t.size(3) > 1 ? t.stride(3) : t.stride(2);
  return {dtype_of(t), const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), pixel};
}

Map pixel_rows(const Tensor& t, int64_t pixels, int64_t channels) {  // fp32 [B, H * W, C], contiguous
  return {DType::f32, const_cast<void*>(t.const_data_ptr()), pixels * channels, 1, channels};
}

// `like` says where to run: a tensor of the call.
void run(const Resample& p, const Tensor& like, [[maybe_unused]] void* stream) {
  if (on_gpu(like)) return check(ARIMG_GPU(resample_cuda(p, stream)), "resample");
  int64_t work = p.in_height * p.in_width + p.out_height * p.out_width;
  parallel_for(ARIMG_CPU(resample_items)(p), 1 + 2048 / work, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(resample_scratch)(p));
    ARIMG_CPU(resample)(p, scratch.get(), begin, end);
  });
}

Scratch packed_filter(const Accumulate& p, const Tensor& like) {
  if (on_gpu(like)) return nullptr;
  Scratch filter = make_scratch(ARIMG_CPU(filter_floats)(p.channels));
  ARIMG_CPU(pack_filter)(p, filter.get());
  return filter;
}

void run(const Accumulate& p, const Scratch& filter, const Tensor& like, [[maybe_unused]] void* stream) {
  if (on_gpu(like)) return check(ARIMG_GPU(accumulate_cuda(p, stream)), "accumulate");
  // At least about half a million multiply-adds for a thread.
  int64_t grain = 1 + (int64_t(1) << 19) / (9 * p.channels * p.channels * p.width);
  parallel_for(p.images * p.height, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(accumulate_scratch)(p, end - begin));
    ARIMG_CPU(accumulate)(p, filter.get(), scratch.get(), begin, end);
  });
}

Tensor resample_op(const Tensor& x, int64_t height, int64_t width, Resampling mode) {
  require(x.dim() == 4 && x.is_contiguous() && height > 0 && width > 0 && x.size(2) > 0 && x.size(3) > 0,
          "arimg: expected contiguous x [B, C, H, W] and positive sizes");
  Tensor out = empty(x, Sizes{x.size(0), x.size(1), height, width}, x.scalar_type());
  if (out.numel() == 0) return out;
  GpuScope scope(x);
  // Planes are alike, whichever image they belong to: all of them as the channels of one image.
  Resample p{mode, map_of(x), map_of(out), 1, x.size(0) * x.size(1), x.size(2), x.size(3), height, width};
  run(p, x, scope.stream());
  return out;
}

Tensor area_down_op(const Tensor& x, int64_t height, int64_t width) {
  return resample_op(x, height, width, Resampling::area);
}

Tensor bicubic_up_op(const Tensor& x, int64_t height, int64_t width) {
  return resample_op(x, height, width, Resampling::bicubic);
}

void check_filter(const Tensor& weight, const Tensor& bias, int64_t channels) {
  require(weight.is_contiguous() && bias.is_contiguous() && weight.scalar_type() == bias.scalar_type() &&
              bias.size(-1) == channels && weight.numel() == bias.numel() * channels * 9,
          "arimg: expected contiguous weights [C, C, 3, 3] and biases [C] of one dtype");
}

void accumulate_op(const Tensor& sum, const Tensor& h, const Tensor& weight, const Tensor& bias, double ratio,
                   const std::optional<Tensor>& residual) {
  require(sum.dim() == 4 && h.dim() == 4 && sum.is_contiguous() && sum.size(0) == h.size(0) &&
              sum.size(1) == h.size(1) && h.size(2) > 0 && h.size(3) > 0,
          "arimg: expected contiguous f_hat [B, C, H, W] and h [B, C, h, w]");
  require(!residual || (residual->is_contiguous() && residual->numel() == sum.numel() &&
                        residual->scalar_type() == sum.scalar_type()),
          "arimg: expected contiguous residual like f_hat");
  check_filter(weight, bias, sum.size(1));
  if (sum.numel() == 0) return;
  Accumulate p{};
  p.h = map_of(h);
  p.images = sum.size(0);
  p.channels = sum.size(1);
  p.in_height = h.size(2);
  p.in_width = h.size(3);
  p.height = sum.size(2);
  p.width = sum.size(3);
  p.filter_dtype = dtype_of(weight);
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.ratio = float(ratio);
  p.sum = map_of(sum);
  if (residual) p.residual = map_of(*residual);
  GpuScope scope(sum);
  run(p, packed_filter(p, sum), sum, scope.stream());
}

// The state of one encode: residual and f_hat as fp32 rows of channels, so that the residual of the last
// scale is what the search reads and codes are what accumulate reads.
class Encoder {
 public:
  Encoder(const Tensor& f, const Tensor& codebook, const Tensor& weights, const Tensor& biases, double ratio)
      : scope_(f),
        weights_(weights),
        biases_(biases),
        height_(f.size(2)),
        width_(f.size(3)),
        residual_(empty(f, Sizes{f.size(0), f.size(2) * f.size(3), f.size(1)}, ScalarType::Float)),
        f_hat_(torch::stable::new_zeros(residual_, Sizes{f.size(0), f.size(2) * f.size(3), f.size(1)})),
        rows_(torch::stable::empty_like(residual_)) {
    p_.images = f.size(0);
    p_.channels = f.size(1);
    p_.height = height_;
    p_.width = width_;
    p_.h = {dtype_of(codebook), const_cast<void*>(codebook.const_data_ptr()), 0, 1, p_.channels};
    p_.filter_dtype = dtype_of(weights);
    p_.ratio = float(ratio);
    p_.sum = pixel_rows(f_hat_, height_ * width_, p_.channels);
    p_.residual = pixel_rows(residual_, height_ * width_, p_.channels);
    Codebook book{dtype_of(codebook), codebook.const_data_ptr(), codebook.size(0), p_.channels, Metric::l2};
    if (on_gpu(residual_))
      gpu_codes_.emplace(book, residual_, scope_.stream());
    else
      cpu_codes_.emplace(book);
    filters_.resize(size_t(biases.size(0)));
    copy(map_of(f), p_.residual);
  }

  // One scale; writes index [images, h * w].
  void step(int64_t h, int64_t w, int64_t phi, int64_t* index) {
    const Tensor* rows = &residual_;
    if (h != height_ || w != width_) {
      rows = &rows_;
      Map small = pixel_rows(rows_, h * w, p_.channels);
      run(Resample{Resampling::area, p_.residual, small, p_.images, p_.channels, height_, width_, h, w},
          residual_, scope_.stream());
    }
    search(rows->const_data_ptr(), p_.images * h * w, index);
    int64_t C = p_.channels, bytes = p_.filter_dtype == DType::f32 ? 4 : 2;
    p_.index = index;
    p_.in_height = h;
    p_.in_width = w;
    p_.weight = (const char*)weights_.const_data_ptr() + phi * C * C * 9 * bytes;
    p_.bias = (const char*)biases_.const_data_ptr() + phi * C * bytes;
    Scratch& filter = filters_[size_t(phi)];
    if (!filter) filter = packed_filter(p_, residual_);
    run(p_, filter, residual_, scope_.stream());
  }

  void finish(const Tensor& out) { copy(p_.sum, map_of(out)); }

 private:
  void copy(const Map& from, const Map& to) {
    run(Resample{Resampling::area, from, to, p_.images, p_.channels, height_, width_, height_, width_},
        residual_, scope_.stream());
  }

  void search(const void* x, int64_t rows, int64_t* index) {
    if (on_gpu(residual_))
      gpu_codes_->search(DType::f32, x, rows, index);
    else
      cpu_codes_->search(DType::f32, x, rows, index);
  }

  GpuScope scope_;
  const Tensor &weights_, &biases_;
  int64_t height_, width_;
  Tensor residual_, f_hat_, rows_;
  Accumulate p_{};
  std::optional<PackedCodes> cpu_codes_;
  std::optional<GpuCodes> gpu_codes_;
  std::vector<Scratch> filters_;  // per phi, packed when first used (CPU)
};

// scales: h0, w0, h1, w1, ...; the indices of all scales one after the other, each [B, h * w].
std::tuple<Tensor, Tensor> encode_op(const Tensor& f, const Tensor& codebook, const Tensor& weights,
                                     const Tensor& biases, const std::vector<int64_t>& scales,
                                     const std::vector<int64_t>& phi, double ratio) {
  require(f.dim() == 4 && f.is_contiguous() && codebook.dim() == 2 && codebook.is_contiguous() &&
              codebook.size(1) == f.size(1) && codebook.numel() > 0 && f.size(2) > 0 && f.size(3) > 0,
          "arimg: expected contiguous f [B, C, H, W] and codebook [K, C]");
  require(weights.dim() == 5 && biases.dim() == 2 && scales.size() == 2 * phi.size(),
          "arimg: expected weights [P, C, C, 3, 3], biases [P, C] and a phi for each scale");
  check_filter(weights, biases, f.size(1));
  int64_t total = 0;
  for (size_t k = 0; k < phi.size(); ++k) {
    int64_t h = scales[2 * k], w = scales[2 * k + 1];
    require(h > 0 && w > 0 && h <= f.size(2) && w <= f.size(3) && phi[k] >= 0 && phi[k] < biases.size(0),
            "arimg: expected scales within the map and phi within the weights");
    total += h * w;
  }
  Tensor indices = empty(f, Sizes{f.size(0) * total}, ScalarType::Long);
  Tensor f_hat = torch::stable::empty_like(f);
  if (f.size(0) == 0) return {indices, f_hat};
  Encoder encoder(f, codebook, weights, biases, ratio);
  int64_t* index = (int64_t*)indices.mutable_data_ptr();
  for (size_t k = 0; k < phi.size(); ++k) {
    encoder.step(scales[2 * k], scales[2 * k + 1], phi[k], index);
    index += f.size(0) * scales[2 * k] * scales[2 * k + 1];
  }
  encoder.finish(f_hat);
  return {indices, f_hat};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("area_down(Tensor x, int height, int width) -> Tensor");
  m.def("bicubic_up(Tensor x, int height, int width) -> Tensor");
  m.def(
      "accumulate_(Tensor(a!) f_hat, Tensor h, Tensor weight, Tensor bias, float ratio, Tensor(b!)? "
      "residual) "
      "-> ()");
  m.def(
      "encode(Tensor f, Tensor codebook, Tensor weights, Tensor biases, int[] scales, int[] phi, float "
      "ratio) "
      "-> (Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("area_down", TORCH_BOX(&area_down_op));
  m.impl("bicubic_up", TORCH_BOX(&bicubic_up_op));
  m.impl("accumulate_", TORCH_BOX(&accumulate_op));
  m.impl("encode", TORCH_BOX(&encode_op));
}

}  // namespace arimg
