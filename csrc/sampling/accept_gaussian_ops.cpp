#include <optional>
#include <tuple>

#include "sampling/accept_gaussian_contract.h"
#include "sampling/rows.h"

namespace arimg {
namespace {

Field field_of(const Tensor& t, const Tensor& x) {
  require(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) &&
              t.scalar_type() == x.scalar_type() && t.device() == x.device(),
          "arimg: expected x and its means and deviations [R, n, d] of one dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// All [R, n, d], any strides. Gives values [R, n, d], lengths [R], tries [R].
std::tuple<Tensor, Tensor, Tensor> gaussian_accept_op(
    const Tensor& x, const Tensor& p_mean, const Tensor& p_std, const Tensor& q_mean, const Tensor& q_std,
    const std::optional<Tensor>& seeds, int64_t first_seed, const std::optional<Tensor>& positions,
    int64_t position, const std::optional<Tensor>& log_sigmas, double log_sigma, int64_t max_tries) {
  GaussianAccept g{};
  g.x = field_of(x, x);
  g.dtype = dtype_of(x);
  g.p_mean = field_of(p_mean, x);
  g.p_std = field_of(p_std, x);
  g.q_mean = field_of(q_mean, x);
  g.q_std = field_of(q_std, x);
  g.rows = x.size(0);
  g.tokens = x.size(1);
  g.width = x.size(2);
  static_cast<Stream&>(g) = stream_of(x, g.rows, seeds, first_seed, positions, position);
  g.log_sigmas = values<double>(log_sigmas, x, ScalarType::Double, g.rows * g.tokens,
                                "arimg: expected log_sigmas float64 [R, n]");
  g.log_sigma = log_sigma;
  g.max_tries = max_tries;
  require(g.width >= 1 && max_tries >= 1 && max_tries <= 1 << 16,
          "arimg: expected d >= 1, max_tries in [1, 2^16]");
  Tensor out = empty(x, std::initializer_list<int64_t>{g.rows, g.tokens, g.width}, x.scalar_type());
  Tensor length = empty(x, std::initializer_list<int64_t>{g.rows}, ScalarType::Long);
  Tensor tries = empty(x, std::initializer_list<int64_t>{g.rows}, ScalarType::Long);
  if (g.rows == 0) return {out, length, tries};
  g.values = out.mutable_data_ptr();
  g.length = static_cast<int64_t*>(length.mutable_data_ptr());
  g.tries = static_cast<int64_t*>(tries.mutable_data_ptr());
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(gaussian_accept_cuda(g, scope.stream())), "gaussian_accept");
  } else {
    parallel_for(g.rows, 1 + 256 / g.width,
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(gaussian_accept)(g, begin, end); });
  }
  return {out, length, tries};
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "gaussian_accept(Tensor x, Tensor p_mean, Tensor p_std, Tensor q_mean, Tensor q_std, Tensor? seeds, "
      "int "
      "first_seed, Tensor? positions, int position, Tensor? log_sigmas, float log_sigma, int max_tries) -> "
      "(Tensor, Tensor, Tensor)");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("gaussian_accept", TORCH_BOX(&gaussian_accept_op));
}

}  // namespace arimg
