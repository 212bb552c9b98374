#include <tuple>
#include <vector>

#include "core/ops.h"
#include "quantize/bits.h"

namespace arimg {
namespace {

using Sizes = std::vector<int64_t>;

// A few microseconds of work per thread at least.
int64_t row_grain(int64_t bits) {
  return 1 + 65536 / bits;
}

bool is_bit_rows(const Tensor& t) {
  return t.dim() == 2 && t.is_contiguous() && t.size(1) >= 1 && t.size(1) <= max_bits;
}

std::tuple<Tensor, Tensor> sign_codes_op(const Tensor& z, double scale, bool msb_first) {
  require(is_bit_rows(z), "arimg: expected contiguous z [N, d] with 1 <= d <= 64");
  Tensor codes = torch::stable::empty_like(z);
  Tensor index = empty(z, Sizes{z.size(0)}, ScalarType::Long);
  SignCodes p{dtype_of(z),
              z.const_data_ptr(),
              z.size(0),
              int(z.size(1)),
              msb_first,
              float(scale),
              codes.mutable_data_ptr(),
              (int64_t*)index.mutable_data_ptr()};
  if (on_gpu(z)) {
    GpuScope scope(z);
    check(ARIMG_GPU(sign_codes_cuda(p, scope.stream())), "sign_codes");
  } else {
    parallel_for(p.rows, row_grain(p.bits),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(sign_codes)(p, begin, end); });
  }
  return {codes, index};
}

Tensor pack_bits_op(const Tensor& bits, bool msb_first) {
  require(
      is_bit_rows(bits) && (bits.scalar_type() == ScalarType::Bool || bits.scalar_type() == ScalarType::Byte),
      "arimg: expected contiguous bits [N, d], bool or uint8, with 1 <= d <= 64");
  Tensor index = empty(bits, Sizes{bits.size(0)}, ScalarType::Long);
  PackBits p{(const uint8_t*)bits.const_data_ptr(), bits.size(0), int(bits.size(1)), msb_first,
             (int64_t*)index.mutable_data_ptr()};
  if (on_gpu(bits)) {
    GpuScope scope(bits);
    check(ARIMG_GPU(pack_bits_cuda(p, scope.stream())), "pack_bits");
  } else {
    parallel_for(p.rows, row_grain(p.bits),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(pack_bits)(p, begin, end); });
  }
  return index;
}

// Low and high are those of a floating dtype; bool gets false and true.
Tensor unpack_bits_op(const Tensor& index, int64_t bits, double low, double high, bool msb_first,
                      ScalarType dtype) {
  require(index.dim() == 1 && index.is_contiguous() && index.scalar_type() == ScalarType::Long && bits >= 1 &&
              bits <= max_bits,
          "arimg: expected contiguous int64 indices [N] of 1 to 64 bits");
  Tensor out = empty(index, Sizes{index.size(0), bits}, dtype);
  const bool bytes = dtype == ScalarType::Bool;
  UnpackBits p{(const int64_t*)index.const_data_ptr(),
               index.size(0),
               int(bits),
               msb_first,
               bytes,
               bytes ? DType::f32 : dtype_of(out),
               float(low),
               float(high),
               out.mutable_data_ptr()};
  if (on_gpu(index)) {
    GpuScope scope(index);
    check(ARIMG_GPU(unpack_bits_cuda(p, scope.stream())), "unpack_bits");
  } else {
    parallel_for(p.rows, row_grain(bits),
                 [&](int64_t begin, int64_t end) { ARIMG_CPU(unpack_bits)(p, begin, end); });
  }
  return out;
}

}  // namespace

ARIMG_OPS_SCHEMAS(m) {
  m.def("sign_codes(Tensor z, float scale, bool msb_first) -> (Tensor, Tensor)");
  m.def("pack_bits(Tensor bits, bool msb_first) -> Tensor");
  m.def(
      "unpack_bits(Tensor index, int bits, float low, float high, bool msb_first, ScalarType dtype) -> "
      "Tensor");
}

ARIMG_OPS_IMPLEMENTATIONS(m) {
  m.impl("sign_codes", TORCH_BOX(&sign_codes_op));
  m.impl("pack_bits", TORCH_BOX(&pack_bits_op));
  m.impl("unpack_bits", TORCH_BOX(&unpack_bits_op));
}

}  // namespace arimg
