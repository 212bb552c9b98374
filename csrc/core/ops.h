// What every ops.cpp shares: checks, allocation, the current stream, threads, registration.
//
// An ops.cpp is compiled twice: into the real library (namespace `arimg`; CPU tensors go to the SIMD kernels,
// CUDA tensors to the launchers) and, with ARIMG_EMULATOR, into the emulated one (namespace `arimg_emulated`;
// CPU tensors go to the CUDA launchers compiled for the emulator).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "core/dtype.h"
#include "core/simd_level.h"
#include "core/status.h"

#if defined(ARIMG_EMULATOR)
#define ARIMG_OPS_NAMESPACE arimg_emulated
#else
#define ARIMG_OPS_NAMESPACE arimg
#endif

// ARIMG_OPS_SCHEMAS(m) { m.def("name(Tensor x) -> Tensor"); }
// ARIMG_OPS_IMPLEMENTATIONS(m) { m.impl("name", TORCH_BOX(&name)); }   one function serves CPU and CUDA
#define ARIMG_OPS_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(ARIMG_OPS_NAMESPACE, m)
#if defined(ARIMG_WITH_CUDA) && !defined(ARIMG_EMULATOR)
#define ARIMG_OPS_IMPLEMENTATIONS(m)                                        \
  static void arimg_implementations(torch::stable::detail::StableLibrary&); \
  STABLE_TORCH_LIBRARY_IMPL(ARIMG_OPS_NAMESPACE, CPU, lib) {                \
    arimg_implementations(lib);                                             \
  }                                                                         \
  STABLE_TORCH_LIBRARY_IMPL(ARIMG_OPS_NAMESPACE, CUDA, lib) {               \
    arimg_implementations(lib);                                             \
  }                                                                         \
  static void arimg_implementations(torch::stable::detail::StableLibrary& m)
#else
#define ARIMG_OPS_IMPLEMENTATIONS(m)                                        \
  static void arimg_implementations(torch::stable::detail::StableLibrary&); \
  STABLE_TORCH_LIBRARY_IMPL(ARIMG_OPS_NAMESPACE, CPU, lib) {                \
    arimg_implementations(lib);                                             \
  }                                                                         \
  static void arimg_implementations(torch::stable::detail::StableLibrary& m)
#endif

// The launcher of the GPU kernel, or, in a build without CUDA, an error.
#if defined(ARIMG_WITH_CUDA) || defined(ARIMG_EMULATOR)
#define ARIMG_GPU(call) (call)
#else
#define ARIMG_GPU(call) (::arimg::no_cuda_in_this_build())
#endif

namespace arimg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Status no_cuda_in_this_build() {
  return Status::unsupported;
}

// Turns a status that is not ok into an exception. Defined in core/ops.cpp.
void check(Status status, const char* op);

inline void require(bool condition, const char* message) {
  STD_TORCH_CHECK(condition, message);
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "arimg: expected float32, bfloat16 or float16");
  }
}

// True when the op should run the GPU launcher: CUDA tensors, and every tensor of the emulated library.
inline bool on_gpu(const Tensor& x) {
#if defined(ARIMG_EMULATOR)
  (void)x;
  return true;
#else
  return x.is_cuda();
#endif
}

// PyTorch's current CUDA stream of the tensor's device; makes that device current for the guard's lifetime.
// Does nothing for CPU tensors. Defined in core/ops.cpp.
class GpuScope {
 public:
  explicit GpuScope(const Tensor& x);
  ~GpuScope();
  GpuScope(const GpuScope&) = delete;
  void* stream() const { return stream_; }

 private:
  void* stream_ = nullptr;
  int previous_device_ = -1;
};

// Splits [0, n) over PyTorch's threads; each piece holds at least `grain` items. f(begin, end).
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t(0), n);
    return;
  }
  torch::stable::parallel_for(0, n, grain < 1 ? 1 : grain, f);
}

template <typename Sizes>
inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace arimg
