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

#ifdef FSC_EMULATED

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, Stream, const Params& params) {
  ::emulator::launch(instance, grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(params); });
}

#else

template <class Params>
void launch(const char* instance, void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  // `load` has opted in to more than 48 KiB of shared memory.
  kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared_bytes,
           reinterpret_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), instance, "launch");
}

#endif

}  // namespace fused_sepconv
