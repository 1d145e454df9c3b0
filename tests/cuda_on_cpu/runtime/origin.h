// origin.h - where an access was made: a source line that the caller gave, or the address of an instrumented
// instruction.
#pragma once

#include <cstdint>
#include <string>

#include "site.h"

namespace emulator {

// Four bytes, as shadow memory keeps one for every access that it remembers. Looking up an instruction's line takes a
// process (addr2line), so it waits until there is something to report.
class Origin {
 public:
  Origin() = default;
  Origin(Site site);  // NOLINT: a site is an origin
  static Origin of_instruction(const void* address);

  // "csrc/kernels/forward.h:120", with the lines that it was inlined into where they are known.
  std::string describe() const;

 private:
  uint32_t code_ = 0;
};

}  // namespace emulator
