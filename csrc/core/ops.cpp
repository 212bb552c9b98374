#include "core/ops.h"

#include <string>

#include "core/error.h"

#if defined(ARIMG_WITH_CUDA) && !defined(ARIMG_EMULATOR)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#define ARIMG_HAS_STREAMS 1
#endif

namespace arimg {

void check(Status status, const char* op) {
  if (status == Status::ok) return;
  std::string text = std::string("arimg.") + op + ": ";
  switch (status) {
    case Status::invalid:
      text += "invalid arguments";
      break;
    case Status::unsupported:
      text += "not supported by this build (see arimg.show_config())";
      break;
    default:
      text += "CUDA error: " + error_text();
  }
  STD_TORCH_CHECK(false, text);
}

#if defined(ARIMG_HAS_STREAMS)

// This library also loads where PyTorch has no CUDA, so the shim is looked up in the libtorch_cuda.so that
// the process already holds, never linked.
using CurrentStream = int32_t (*)(int32_t, void**);
static CurrentStream current_stream_shim() {
  static CurrentStream shim = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda ? (CurrentStream)dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  }();
  return shim;
}

GpuScope::GpuScope(const Tensor& x) {
  if (!x.is_cuda()) return;
  CurrentStream shim = current_stream_shim();
  STD_TORCH_CHECK(shim != nullptr,
                  "arimg: libtorch_cuda.so is not loaded, so there is no current CUDA stream");
  int device = x.get_device_index();
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current != device) {
    check(cudaSetDevice(device) == cudaSuccess ? Status::ok : Status::cuda_error, "set_device");
    previous_device_ = current;
  }
  STD_TORCH_CHECK(shim(device, &stream_) == 0, "arimg: no current CUDA stream");
}

GpuScope::~GpuScope() {
  if (previous_device_ >= 0) cudaSetDevice(previous_device_);
}

#else

GpuScope::GpuScope(const Tensor&) {}
GpuScope::~GpuScope() {}

#endif

}  // namespace arimg

// Build facts for arimg.show_config(), readable before and without PyTorch's dispatcher.
#if !defined(ARIMG_CUDA_ARCHITECTURES)
#define ARIMG_CUDA_ARCHITECTURES ""
#endif
extern "C" __attribute__((visibility("default"))) const char* arimg_cuda_architectures() {
  return ARIMG_CUDA_ARCHITECTURES;
}
extern "C" __attribute__((visibility("default"))) int arimg_simd_level() {
  return int(arimg::simd_level());
}
extern "C" __attribute__((visibility("default"))) int arimg_detected_simd_level() {
  return int(arimg::detected_simd_level());
}
extern "C" __attribute__((visibility("default"))) int arimg_set_simd_level(int level) {
  return arimg::set_simd_level(arimg::SimdLevel(level)) ? 1 : 0;
}
