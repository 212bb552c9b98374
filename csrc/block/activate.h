// An activation over many elements, and its product with a second tensor (the gated pair of SwiGLU):
// out = activation(x) [* factor]. Arithmetic is fp32. out may be x or factor.
#pragma once

#include "block/linear_rows.h"

namespace arimg {

struct Activate {
  DType dtype;
  Activation activation;
  const void* x;       // [count]
  const void* factor;  // [count], or nullptr
  void* out;           // [count]
  int64_t count;
};

// Elements [begin, end).
ARIMG_CPU_KERNEL(void, activate, (const Activate& p, int64_t begin, int64_t end))

Status activate_cuda(const Activate& p, void* stream);

}  // namespace arimg
