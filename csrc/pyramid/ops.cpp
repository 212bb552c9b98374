#include <optional>
#include <tuple>
#include <vector>

#include "pyramid/run.h"
#include "quantize/search.h"

namespace arimg {
namespace {

using MaybeTensor = std::optional<Tensor>;

Scratch packed_filter(const Accumulate& p, const Tensor& like) {
  if (on_gpu(like) || p.weight == nullptr) return nullptr;
  Scratch filter = make_scratch(ARIMG_CPU(filter_floats)(p.channels));
  ARIMG_CPU(pack_filter)(p, filter.get());
  return filter;
}

void run(const Accumulate& p, const Scratch& filter, const Tensor& like, [[maybe_unused]] void* stream) {
  if (on_gpu(like)) return check(ARIMG_GPU(accumulate_cuda(p, stream)), "accumulate");
  // At least about half a million multiply-adds for a thread.
  int64_t row = p.channels * p.width * (p.weight ? 9 * p.channels : 8);
  int64_t grain = 1 + (int64_t(1) << 19) / row;
  parallel_for(p.images * p.height, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch = make_scratch(ARIMG_CPU(accumulate_scratch)(p, end - begin));
    ARIMG_CPU(accumulate)(p, filter.get(), scratch.get(), begin, end);
  });
}

void check_filters(const Tensor& weight, const Tensor& bias, int64_t channels) {
  require(weight.is_contiguous() && bias.is_contiguous() && weight.scalar_type() == bias.scalar_type() &&
              bias.size(-1) == channels && weight.numel() == bias.numel() * channels * 9,
          "arimg: expected contiguous weights [C, C, 3, 3] and biases [C] of one dtype");
}

Resampling upsampling(int64_t mode) {
  require(mode == int64_t(Resampling::bilinear) || mode == int64_t(Resampling::bicubic),
          "arimg: expected bilinear or bicubic upsampling");
  return Resampling(mode);
}

void accumulate_op(const Tensor& sum, const Tensor& h, const MaybeTensor& weight, const MaybeTensor& bias,
                   double ratio, const MaybeTensor& residual, int64_t up) {
  require(sum.dim() == 4 && h.dim() == 4 && sum.is_contiguous() && sum.size(0) == h.size(0) &&
              sum.size(1) == h.size(1) && h.size(2) > 0 && h.size(3) > 0,
          "arimg: expected contiguous f_hat [B, C, H, W] and h [B, C, h, w]");
  require(!residual || (residual->is_contiguous() && residual->numel() == sum.numel() &&
                        residual->scalar_type() == sum.scalar_type()),
          "arimg: expected contiguous residual like f_hat");
  require(weight.has_value() == bias.has_value(), "arimg: expected weight and bias, or neither");
  if (weight) check_filters(*weight, *bias, sum.size(1));
  if (sum.numel() == 0) return;
  Accumulate p{};
  p.h = map_of(h);
  p.images = sum.size(0);
  p.channels = sum.size(1);
  p.up = upsampling(up);
  p.in_height = h.size(2);
  p.in_width = h.size(3);
  p.height = sum.size(2);
  p.width = sum.size(3);
  p.ratio = float(ratio);
  if (weight) {
    p.filter_dtype = dtype_of(*weight);
    p.weight = weight->const_data_ptr();
    p.bias = bias->const_data_ptr();
  }
  p.sum = map_of(sum);
  if (residual) p.residual = map_of(*residual);
  GpuScope scope(sum);
  run(p, packed_filter(p, sum), sum, scope.stream());
}

// The phi convolutions of a pyramid and the scales that use them; weights may be missing.
struct Scales {
  const MaybeTensor &weights, &biases;
  const std::vector<int64_t>&size, &phi;  // h0, w0, h1, w1, ...; phi is empty without weights

  int64_t count() const { return int64_t(size.size() / 2); }
  int64_t height(int64_t k) const { return size[size_t(2 * k)]; }
  int64_t width(int64_t k) const { return size[size_t(2 * k + 1)]; }

  int64_t pixels(int64_t most_height, int64_t most_width) const {  // of all scales; checks them
    int64_t total = 0;
    for (int64_t k = 0; k < count(); ++k) {
      require(height(k) > 0 && width(k) > 0 && height(k) <= most_height && width(k) <= most_width,
              "arimg: expected scales within the map");
      total += height(k) * width(k);
    }
    return total;
  }

  void check(int64_t channels) const {
    require(size.size() % 2 == 0 && weights.has_value() == biases.has_value() &&
                phi.size() == (weights ? size.size() / 2 : 0),
            "arimg: expected weights [P, C, C, 3, 3], biases [P, C] and a phi for each scale, or none");
    if (!weights) return;
    require(weights->dim() == 5 && biases->dim() == 2, "arimg: expected weights [P, C, C, 3, 3]");
    check_filters(*weights, *biases, channels);
    for (int64_t i : phi) require(i >= 0 && i < biases->size(0), "arimg: expected phi within the weights");
  }
};

// The running sum f_hat as fp32 rows of channels, to which codes are added scale by scale; with a residual,
// from which they are subtracted.
class Pyramid {
 public:
  // `codebook` is missing for codes of +-sign.
  Pyramid(const Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width,
          const MaybeTensor& codebook, double sign, const Scales& scales, double ratio, int64_t up)
      : scope_(like),
        scales_(scales),
        like_(like),
        sum_(torch::stable::new_zeros(like, Sizes{images, height * width, channels}, ScalarType::Float)) {
    p_.images = images;
    p_.channels = channels;
    p_.up = upsampling(up);
    p_.height = height;
    p_.width = width;
    p_.ratio = float(ratio);
    if (codebook)
      p_.h = {dtype_of(*codebook), const_cast<void*>(codebook->const_data_ptr()), 0, 1, channels};
    else
      p_.sign = float(sign);
    p_.sum = pixel_rows(sum_, height * width, channels);
    if (scales.weights) {
      p_.filter_dtype = dtype_of(*scales.weights);
      filters_.resize(size_t(scales.biases->size(0)));
    }
  }

  void subtract_from(const Tensor& residual) {
    p_.residual = pixel_rows(residual, p_.height * p_.width, p_.channels);
  }

  void add(int64_t k, const int64_t* index) {
    p_.index = index;
    p_.in_height = scales_.height(k);
    p_.in_width = scales_.width(k);
    if (!scales_.weights) return run(p_, nullptr, like_, stream());
    int64_t C = p_.channels, bytes = p_.filter_dtype == DType::f32 ? 4 : 2, phi = scales_.phi[size_t(k)];
    p_.weight = (const char*)scales_.weights->const_data_ptr() + phi * C * C * 9 * bytes;
    p_.bias = (const char*)scales_.biases->const_data_ptr() + phi * C * bytes;
    Scratch& filter = filters_[size_t(phi)];
    if (!filter) filter = packed_filter(p_, like_);
    run(p_, filter, like_, stream());
  }

  // Writes f_hat to `out` [B, C, H, W].
  void finish(const Tensor& out) { copy(p_.sum, map_of(out)); }

  void copy(const Map& from, const Map& to) {
    arimg::run(Resample{Resampling::area, false, from, to, p_.images, p_.channels, p_.height, p_.width,
                        p_.height, p_.width},
               like_, stream());
  }

  void* stream() const { return scope_.stream(); }

 private:
  GpuScope scope_;
  Scales scales_;
  Tensor like_, sum_;
  Accumulate p_{};
  std::vector<Scratch> filters_;  // per phi, packed when first used (CPU)
};

// What rows are searched in: a codebook on the CPU or the GPU, or the signs.
class Search {
 public:
  Search(const MaybeTensor& codebook, int64_t metric, int64_t channels, const Tensor& like, void* stream)
      : channels_(channels), stream_(stream) {
    if (!codebook) return;
    Codebook book{dtype_of(*codebook), codebook->const_data_ptr(), codebook->size(0), channels,
                  Metric(metric)};
    if (on_gpu(like))
      gpu_.emplace(book, like, stream);
    else
      cpu_.emplace(book);
  }

  void operator()(const Tensor& rows, int64_t count, int64_t* index) const {
    const float* x = (const float*)rows.const_data_ptr();
    if (on_gpu(rows)) {
      if (gpu_) return gpu_->search(DType::f32, x, count, index);
      return check(ARIMG_GPU(sign_bits_cuda(x, count, channels_, index, stream_)), "sign_bits");
    }
    if (cpu_) return cpu_->search(DType::f32, x, count, index);
    parallel_for(count, 65536 / channels_,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(sign_bits)(x, channels_, index, begin, end); });
  }

 private:
  int64_t channels_;
  [[maybe_unused]] void* stream_;
  std::optional<PackedCodes> cpu_;
  std::optional<GpuCodes> gpu_;
};

void check_codes(const MaybeTensor& codebook, int64_t channels, double sign) {
  if (codebook)
    require(codebook->dim() == 2 && codebook->is_contiguous() && codebook->size(1) == channels &&
                codebook->numel() > 0,
            "arimg: expected a contiguous codebook [K, C]");
  else
    require(channels <= 64 && sign > 0, "arimg: expected a codebook, or at most 64 channels and a sign > 0");
}

// The indices of all scales one after the other, each [B, h * w], and f_hat. `residual` false: each scale
// codes f itself, and f_hat is the upsampled last one.
std::tuple<Tensor, Tensor> encode_op(const Tensor& f, const MaybeTensor& codebook, const MaybeTensor& weights,
                                     const MaybeTensor& biases, const std::vector<int64_t>& size,
                                     const std::vector<int64_t>& phi, double ratio, int64_t up, bool residual,
                                     int64_t metric, double sign) {
  require(f.dim() == 4 && f.is_contiguous() && f.size(1) > 0 && f.size(2) > 0 && f.size(3) > 0,
          "arimg: expected contiguous f [B, C, H, W]");
  int64_t B = f.size(0), C = f.size(1), H = f.size(2), width = f.size(3);
  check_codes(codebook, C, sign);
  Scales scales{weights, biases, size, phi};
  scales.check(C);
  Tensor indices = empty(f, Sizes{B * scales.pixels(H, width)}, ScalarType::Long);
  Tensor f_hat = torch::stable::empty_like(f);
  if (B == 0) return {indices, f_hat};
  Pyramid pyramid(f, B, C, H, width, codebook, sign, scales, ratio, up);
  Search search(codebook, metric, C, f, pyramid.stream());
  Tensor rest = empty(f, Sizes{B, H * width, C}, ScalarType::Float), rows = torch::stable::empty_like(rest);
  Map rest_map = pixel_rows(rest, H * width, C);
  pyramid.copy(map_of(f), rest_map);
  if (residual) pyramid.subtract_from(rest);
  int64_t* index = (int64_t*)indices.mutable_data_ptr();
  for (int64_t k = 0; k < scales.count(); ++k) {
    int64_t h = scales.height(k), w = scales.width(k);
    const bool whole = h == H && w == width;
    if (!whole)
      run(Resample{Resampling::area, false, rest_map, pixel_rows(rows, h * w, C), B, C, H, width, h, w}, f,
          pyramid.stream());
    search(whole ? rest : rows, B * h * w, index);
    if (residual || k + 1 == scales.count()) pyramid.add(k, index);
    index += B * h * w;
  }
  pyramid.finish(f_hat);
  return {indices, f_hat};
}

// f_hat [B, channels, height, width] of the indices of all scales, laid out as encode returns them.
Tensor features_op(const Tensor& indices, const MaybeTensor& codebook, const MaybeTensor& weights,
                   const MaybeTensor& biases, const std::vector<int64_t>& size,
                   const std::vector<int64_t>& phi, double ratio, int64_t up, double sign, int64_t images,
                   int64_t channels, int64_t height, int64_t width) {
  check_codes(codebook, channels, sign);
  Scales scales{weights, biases, size, phi};
  scales.check(channels);
  require(indices.is_contiguous() && indices.numel() == images * scales.pixels(height, width),
          "arimg: expected the indices of all scales");
  Tensor f_hat = empty(indices, Sizes{images, channels, height, width},
                       codebook ? codebook->scalar_type() : ScalarType::Float);
  if (f_hat.numel() == 0) return f_hat;
  Pyramid pyramid(f_hat, images, channels, height, width, codebook, sign, scales, ratio, up);
  const int64_t* index = (const int64_t*)indices.const_data_ptr();
  for (int64_t k = 0; k < scales.count(); ++k) {
    pyramid.add(k, index);
    index += images * scales.height(k) * scales.width(k);
  }
  pyramid.finish(f_hat);
  return f_hat;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "accumulate_(Tensor(a!) f_hat, Tensor h, Tensor? weight, Tensor? bias, float ratio, Tensor(b!)? "
      "residual, int up) -> ()");
  m.def(
      "encode(Tensor f, Tensor? codebook, Tensor? weights, Tensor? biases, int[] scales, int[] phi, "
      "float ratio, int up, bool residual, int metric, float sign) -> (Tensor, Tensor)");
  m.def(
      "features(Tensor indices, Tensor? codebook, Tensor? weights, Tensor? biases, int[] scales, int[] phi, "
      "float ratio, int up, float sign, int images, int channels, int height, int width) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("accumulate_", TORCH_BOX(&accumulate_op));
  m.impl("encode", TORCH_BOX(&encode_op));
  m.impl("features", TORCH_BOX(&features_op));
}

}  // namespace arimg
