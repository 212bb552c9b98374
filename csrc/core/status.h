// The result of every framework-free kernel. Kernels never throw and never print; the op layer turns a
// status that is not ok into an exception.
#pragma once

namespace arimg {

enum class Status : int { ok = 0, invalid = 1, unsupported = 2, cuda_error = 3 };

}  // namespace arimg
