// The host module: facts about this build and plans computed on the host. NumPy in and out; tensors never
// cross it (operators are registered with PyTorch's dispatcher instead, csrc/*/ops.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/simd_level.h"

namespace py = pybind11;

#if !defined(ARIMG_CUDA_ARCHITECTURES)
#define ARIMG_CUDA_ARCHITECTURES ""
#endif

static py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_architectures"] = ARIMG_CUDA_ARCHITECTURES;
  info["simd_detected"] = arimg::simd_level_name(arimg::detected_simd_level());
  return info;
}

// Key interval of each query row for segments of the given lengths under a visibility rule
// ("token-causal", "level-causal", "level-diagonal", "full"): two int32 arrays of the total length.
static py::tuple row_intervals(const std::vector<int64_t>& lengths, const std::string& rule) {
  int64_t total = 0;
  for (int64_t n : lengths) {
    if (n < 0) throw py::value_error("expected segment lengths >= 0, got " + std::to_string(n));
    total += n;
  }
  if (total > INT32_MAX)
    throw py::value_error("expected at most 2^31-1 tokens, got " + std::to_string(total));
  py::array_t<int32_t> start(total), end(total);
  auto s = start.mutable_unchecked<1>();
  auto e = end.mutable_unchecked<1>();
  int64_t begin = 0;
  for (int64_t n : lengths) {
    for (int64_t i = begin; i < begin + n; ++i) {
      if (rule == "level-causal") {
        s(i) = 0, e(i) = int32_t(begin + n);
      } else if (rule == "level-diagonal") {
        s(i) = int32_t(begin), e(i) = int32_t(begin + n);
      } else if (rule == "token-causal") {
        s(i) = 0, e(i) = int32_t(i + 1);
      } else if (rule == "full") {
        s(i) = 0, e(i) = int32_t(total);
      } else {
        throw py::value_error("expected rule token-causal, level-causal, level-diagonal or full, got " +
                              rule);
      }
    }
    begin += n;
  }
  return py::make_tuple(start, end);
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and host-side plans of arimg.";
  m.def("build_info", &build_info, "Compiler, CUDA architectures and SIMD level of this build.");
  m.def("row_intervals", &row_intervals, py::arg("lengths"), py::arg("rule"),
        "Row intervals (row_start, row_end), int32, for segment lengths under a visibility rule.");
}
