// warp.h - exchange between the 32 threads of a warp. All lanes call together; none of it orders memory.
#pragma once

#include "platform.h"

namespace fused_sepconv {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The value of lane `lane`.
template <class T>
FSC_DEVICE T warp_shuffle(T value, int lane, Site site = Site::here()) {
#ifdef FSC_EMULATED
  return __shfl_sync(kFullWarp, value, lane, kWarpSize, site);
#else
  return __shfl_sync(kFullWarp, value, lane);
#endif
}

// The value itself, but kept in a register: the compiler can't see that it is the same, and so won't calculate it again
// wherever it is used, as ptxas does with addresses that depend on the thread alone.
template <class T>
FSC_DEVICE T kept(T value, Site site = Site::here()) {
  return warp_shuffle(value, static_cast<int>(threadIdx.x % kWarpSize), site);
}

// The value of the lane whose number differs in `bits`.
template <class T>
FSC_DEVICE T warp_shuffle_xor(T value, int bits, Site site = Site::here()) {
#ifdef FSC_EMULATED
  return __shfl_xor_sync(kFullWarp, value, bits, kWarpSize, site);
#else
  return __shfl_xor_sync(kFullWarp, value, bits);
#endif
}

// The sum over each group of `Width` neighbouring lanes (a power of two), the same bits in all of them.
template <int Width = kWarpSize, class T>
FSC_DEVICE T warp_sum(T value, Site site = Site::here()) {
  static_assert(Width >= 1 && Width <= kWarpSize && (Width & (Width - 1)) == 0, "a power of two up to 32");
  FSC_UNROLL
  for (int bits = Width / 2; bits > 0; bits /= 2) value += warp_shuffle_xor(value, bits, site);
  return value;
}

}  // namespace fused_sepconv
