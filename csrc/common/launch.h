// launch.h - from a kernel and its params to a running grid; the only place that launches.
#pragma once

#include <cstdint>

#include "../primitives/platform.h"
#include "device.h"

namespace fused_sepconv {

// Where and how a grid runs. Grids are linear: y and z stop at 65,535.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes;  // dynamic shared memory a block: sizeof its struct
};

constexpr int kLargestSharedBytes = 227 * 1024;  // of any device that the kernels are built for

#ifdef FSC_NULL  // a build for the tests that measures the host's time: launches are counted, and nothing runs

template <class Params>
void launch(const char* instance, void (*)(Params), const Grid& grid, Stream, const Params&) {
  ::emulator::count_launch(instance, grid.shared_bytes);
}

#elif defined(FSC_EMULATED)

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, Stream, const Params& params) {
  ::emulator::launch(instance, grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(params); });
}

#else

// The dynamic shared memory that a block may have on the current device.
inline int most_shared_bytes(const char* instance) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), instance, "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), instance,
        "cudaDeviceGetAttribute");
  return bytes;
}

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  // Above 48 KiB a kernel must opt in, once a device; the calls are cheap. It is always for the most: the limit belongs
  // to the kernel, and another thread may set it between this call and the launch.
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes(instance)),
          instance, "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           reinterpret_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), instance, "launch");
}

#endif

}  // namespace fused_sepconv
