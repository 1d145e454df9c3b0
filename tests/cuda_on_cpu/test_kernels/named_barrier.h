// named_barrier.h - barriers of a part of the block, as a kernel of specialised warps would have them. None of csrc
// has.
#pragma once

#include "primitives/platform.h"

namespace fused_sepconv {

// Waits at barrier `id` (1 to 15) until `threads` threads (a multiple of 32) have come, waiting or arriving; orders
// their memory accesses. All lanes of a warp must come together.
FSC_DEVICE void barrier_sync(int id, int threads, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::barrier_sync(id, threads, site);
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts as having come to barrier `id` and goes on; what this thread did before is visible to those who wait there.
FSC_DEVICE void barrier_arrive(int id, int threads, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::barrier_arrive(id, threads, site);
#else
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace fused_sepconv
