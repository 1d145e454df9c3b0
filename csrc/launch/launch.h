// launch.h - from a kernel and its params to a running grid; the only place that launches.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../primitives/platform.h"

namespace fused_sepconv {

// Where and how a grid runs. Grids are linear: y and z stop at 65,535.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;  // dynamic shared memory a block: sizeof its struct
};

// A CUDA stream of a device; the emulator ignores both.
struct Queue {
  int device;
  uintptr_t stream;  // cudaStream_t
};

#ifdef FSC_EMULATED

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, const Queue&, const Params& params) {
  ::emulator::launch(instance, grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(params); });
}

#else

inline void check(cudaError_t status, const char* instance, const char* step) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a launch error is not sticky: leave none behind for the caller's next CUDA call
  throw std::runtime_error(std::string("fused_sepconv: ") + instance + ": " + step + ": " + cudaGetErrorName(status) +
                           ": " + cudaGetErrorString(status));
}

// Makes a device current for a scope, as the caller's own current device is not ours to change.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* instance) : instance_(instance) {
    check(cudaGetDevice(&previous_), instance, "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), instance, "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const char* instance_;
  int previous_ = 0;
  bool changed_ = false;
};

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, const Queue& queue, const Params& params) {
  DeviceGuard guard(queue.device, instance);
  if (grid.shared_bytes > 48 * 1024)  // above 48 KiB a kernel must opt in, once a device; the call is cheap
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes), instance,
          "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           reinterpret_cast<cudaStream_t>(queue.stream)>>>(params);
  check(cudaGetLastError(), instance, "launch");
}

#endif

}  // namespace fused_sepconv
