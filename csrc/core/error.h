// Why the last launch on this thread failed, in words. Valid after a status that is not ok.
#pragma once

#include <string>

namespace arimg {

inline std::string& error_text() {
  static thread_local std::string text;
  return text;
}

}  // namespace arimg
