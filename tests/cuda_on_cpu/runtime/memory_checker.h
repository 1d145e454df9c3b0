// memory_checker.h - decides what an address is and checks an access to it. Internal.
#pragma once

#include <cstddef>
#include <cstdint>

#include "origin.h"
#include "shadow.h"

namespace emulator {

// Whether kernels of this module are compiled with instrumentation; set when its first instrumented object is loaded.
extern bool checked_build;

// Checks one access of a running thread; does nothing in the plain build. `alignment` is what the access needs.
void check_access(const Thread& thread, const void* address, size_t bytes, size_t alignment, Access access,
                  Origin origin);

// Range of addresses.
struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};

// The stack of the calling OS thread.
Range own_stack();

}  // namespace emulator
