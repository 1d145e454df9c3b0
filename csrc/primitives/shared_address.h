// shared_address.h - shared memory as the instructions that move it name it.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fused_sepconv {

// A 32-bit address in shared memory; adding bytes to it is address arithmetic. With a cluster the upper bits say whose
// memory it is: a block's own addresses are valid as they come.
using SharedAddress = uint32_t;

// The address of something in this block's shared memory.
FSC_DEVICE SharedAddress shared_address(const void* pointer, Site site = Site::here()) {
#ifdef FSC_EMULATED
  return ::emulator::shared_address(pointer, site);
#else
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace fused_sepconv
