// site.h - where in the kernel's source something happened, and the error that says so.
#pragma once

#include <stdexcept>

namespace emulator {

// A source line. As the default argument `Site site = Site::here()` it is the line of the call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// A rule of CUDA that a kernel broke. The text names the kernel's instance, block, thread, what happened and where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace emulator
