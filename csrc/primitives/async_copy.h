// async_copy.h - cp.async: copies from global to shared memory that run while the thread goes on (sm_80 and newer).
//
// A thread issues copies, commits them as a group, and waits until at most so many of its newest groups are pending.
// Waiting makes the bytes visible to the waiting thread alone: for the others a barrier must follow.
#pragma once

#include "shared_address.h"

namespace fused_sepconv {

// Copies Bytes (4, 8 or 16) from `source` to `destination`, both aligned to Bytes. Where `inside` is false it writes
// zeros and reads nothing; `source` must then still be a valid pointer, as the hardware may translate it.
template <int Bytes>
FSC_DEVICE void async_copy(SharedAddress destination, const void* source, bool inside, Site site = Site::here()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int source_bytes = inside ? Bytes : 0;
#ifdef FSC_EMULATED
  ::emulator::async_copy(destination, source, Bytes, source_bytes, site);
#else
  // 16 bytes bypass L1 (.cg), as staged tiles are read once; the narrower ones only exist through it (.ca).
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(destination), "l"(source), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// Copies the first `bytes` (0 to 16) of 16 and writes zeros for the rest; both addresses are aligned to 16.
FSC_DEVICE void async_copy_some(SharedAddress destination, const void* source, int bytes, Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::async_copy(destination, source, 16, bytes, site);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source), "r"(bytes)
               : "memory");
#endif
}

// Closes a group of all copies that this thread issued since the last one; an empty group is complete.
FSC_DEVICE void async_copy_commit(Site site = Site::here()) {
#ifdef FSC_EMULATED
  ::emulator::async_copy_commit(site);
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's newest groups are not complete.
template <int Pending>
FSC_DEVICE void async_copy_wait(Site site = Site::here()) {
  static_assert(Pending >= 0, "a number of groups");
#ifdef FSC_EMULATED
  ::emulator::async_copy_wait(Pending, site);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

}  // namespace fused_sepconv
