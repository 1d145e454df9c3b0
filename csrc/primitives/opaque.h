// opaque.h - values of which the compiler does not know how they were made.
//
// Where registers are full it matters whether a value is kept or computed again. nvcc computes what depends on the
// thread alone ahead of all loops, and spills it; and it puts a pointer made of a kernel's parameter together again at
// each use.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fused_sepconv {

// The value; what is computed from it is computed after this line, in each turn of a loop that it is in.
FSC_DEVICE uint32_t opaque(uint32_t value) {
#ifndef FSC_EMULATED
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The pointer to global memory, kept in registers.
template <class T>
FSC_DEVICE T* opaque_global(T* pointer) {
#ifndef FSC_EMULATED
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

}  // namespace fused_sepconv
