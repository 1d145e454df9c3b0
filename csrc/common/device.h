// device.h - the stream that a launch goes to, and what the CUDA runtime says of it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../primitives/platform.h"

namespace fused_sepconv {

// A cudaStream_t of the current device, which the caller has made the tensors' own: PyTorch's guard knows how to do
// that without waking other devices. The emulator ignores it.
using Stream = uintptr_t;

#ifndef FSC_EMULATED

inline void check(cudaError_t status, const char* instance, const char* step) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a launch error is not sticky: leave none behind for the caller's next CUDA call
  throw std::runtime_error(std::string("fused_sepconv: ") + instance + ": " + step + ": " + cudaGetErrorName(status) +
                           ": " + cudaGetErrorString(status));
}

#endif

}  // namespace fused_sepconv
