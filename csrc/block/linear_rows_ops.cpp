#include "block/linear_rows.h"
#include "core/ops.h"
#include "core/scratch.h"

namespace arimg {
namespace {

WeightType weight_type_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return WeightType::f32;
    case ScalarType::BFloat16:
      return WeightType::bf16;
    case ScalarType::Half:
      return WeightType::f16;
    case ScalarType::Char:
      return WeightType::int8;
    case ScalarType::Byte:
      return WeightType::int4;
    default:
      STD_TORCH_CHECK(false, "arimg: expected floating, int8 or packed int4 weights");
  }
}

bool quantized(WeightType type) {
  return type == WeightType::int8 || type == WeightType::int4;
}

// Elements of a row as the tensor holds them.
int64_t row_elements(WeightType type, int64_t in) {
  return type == WeightType::int4 ? whole_blocks(in) / 2 : quantized(type) ? whole_blocks(in) : in;
}

int64_t element_bytes(WeightType type) {
  return type == WeightType::f32 ? 4 : quantized(type) ? 1 : 2;
}

LinearRows::Weight describe(const LinearRows& p, const Tensor& weight, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& bias, const Tensor& x) {
  require(weight.dim() == 2 && weight_type_of(weight) == p.weight_type && weight.size(0) == p.outs &&
              weight.size(1) == row_elements(p.weight_type, p.in) &&
              (weight.stride(1) == 1 || weight.size(1) <= 1),
          "arimg: expected weights [O, I] of one type with contiguous rows");
  LinearRows::Weight w{weight.const_data_ptr(), weight.stride(0) * element_bytes(p.weight_type), nullptr,
                       nullptr};
  require(scale.has_value() == quantized(p.weight_type), "arimg: expected scales with codes alone");
  if (scale) {
    require(scale->dim() == 2 && scale->size(0) == p.outs && scale->size(1) == linear_groups(p) &&
                scale->is_contiguous() && scale->scalar_type() == ScalarType::Float,
            "arimg: expected contiguous float32 scales [O, groups]");
    // Rows of codes are whole blocks of 16 or 32 bytes, which the kernels read as vectors.
    require(reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.row_bytes % 16 == 0,
            "arimg: expected codes that begin at a multiple of 16 bytes");
    w.scale = (const float*)scale->const_data_ptr();
  }
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == p.outs && bias->is_contiguous() &&
                bias->scalar_type() == x.scalar_type(),
            "arimg: expected a contiguous bias [O] of x's dtype");
    w.bias = bias->const_data_ptr();
  }
  return w;
}

bool has_bf16_dot() {
#if defined(__x86_64__)
  static const bool has = [] {
    __builtin_cpu_init();
    return bool(__builtin_cpu_supports("avx512bf16"));
  }();
  return has && simd_level() == SimdLevel::avx512;
#else
  return false;
#endif
}

void run_cpu(LinearRows& p) {
  p.bf16_dot = p.dtype == DType::bf16 && p.weight_type != WeightType::f32 &&
               p.weight_type != WeightType::f16 && has_bf16_dot();
  Scratch x = make_scratch(ARIMG_CPU(linear_rows_floats)(p));
  ARIMG_CPU(linear_rows_copy)(p, x.get());
  int64_t grain = 1 + (int64_t(1) << 16) / (p.in * p.rows);
  parallel_for(p.outs, grain,
               [&](int64_t begin, int64_t end) { ARIMG_CPU(linear_rows)(p, x.get(), begin, end); });
}

Tensor linear_rows_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& factor,
                      const std::optional<Tensor>& factor_scale, const std::optional<Tensor>& factor_bias,
                      const std::optional<Tensor>& residual, int64_t activation, int64_t group) {
  require(x.dim() == 2 && x.is_contiguous() && x.size(0) <= LINEAR_ROWS && x.size(1) > 0,
          "arimg: expected contiguous x [M <= 16, I > 0]");
  require(activation >= 0 && activation <= int64_t(Activation::relu), "arimg: unknown activation");
  LinearRows p{};
  p.dtype = dtype_of(x);
  p.weight_type = weight_type_of(weight);
  p.activation = Activation(activation);
  p.x = x.const_data_ptr();
  p.rows = x.size(0);
  p.in = x.size(1);
  p.outs = weight.size(0);
  p.group = group;
  require(group >= p.in || (group > 0 && group % LINEAR_BLOCK == 0),
          "arimg: expected a group of 32 n inputs");
  p.weight = describe(p, weight, scale, bias, x);
  if (factor) p.factor = describe(p, *factor, factor_scale, factor_bias, x);
  if (residual) {
    require(residual->dim() == 2 && residual->size(0) == p.rows && residual->size(1) == p.outs &&
                residual->is_contiguous() && residual->scalar_type() == x.scalar_type(),
            "arimg: expected a contiguous residual [M, O] of x's dtype");
    p.residual = residual->const_data_ptr();
  }
  Tensor out = empty(x, std::vector<int64_t>{p.rows, p.outs}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  if (p.rows == 0 || p.outs == 0) return out;
  if (on_gpu(x)) {
    GpuScope scope(x);
    check(ARIMG_GPU(linear_rows_cuda(p, scope.stream())), "linear_rows");
  } else {
    run_cpu(p);
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def(
      "linear_rows(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? factor, Tensor? "
      "factor_scale, Tensor? factor_bias, Tensor? residual, int activation, int group) -> Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("linear_rows", TORCH_BOX(&linear_rows_op));
}

}  // namespace arimg
