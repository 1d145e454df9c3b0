// platform.h - the few words in which a kernel differs between nvcc and the CPU emulator.
//
// Kernels are compiled twice: by nvcc for the device, and by g++ with FSC_EMULATED defined for the tests
// (tests/cuda_on_cpu), where a block's threads are fibers. Whatever the two need to say differently is said here, or
// in the other headers of this folder, each function of which has a device body and a CPU body.
//
//   FSC_DEVICE                  a function of device code, inlined
//   FSC_HOST_DEVICE             the same, and of the code that launches
//   FSC_OUTLINE                 a function of device code that is called, where inlining costs more than the call
//   FSC_KERNEL(threads, blocks) a kernel: the block size that it is launched with, blocks wanted per SM
//   FSC_CONST_PARAM             marks a kernel's parameter struct as read in place from constant memory
//   FSC_SHARED(Type, name)      the block's dynamic shared memory, seen as one struct: `Type& name`
//   FSC_SHARED_BYTES(name)      the same as bytes, where the launch decides how many: `unsigned char* name`
//   FSC_UNROLL                  unroll the loop that follows
//   FSC_ROLLED                  leave it rolled: its body is large, and rarely runs
//
// Primitives take `Site site = Site::here()` last: the line of the call, for the emulator's reports. On the device it
// is empty and costs nothing.
#pragma once

#ifdef FSC_EMULATED

#include "emulator.h"

#define FSC_DEVICE inline
#define FSC_HOST_DEVICE inline
#define FSC_OUTLINE inline
#define FSC_KERNEL(threads, blocks) void
#define FSC_CONST_PARAM
#define FSC_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(::emulator::shared_memory(sizeof(Type)))
#define FSC_SHARED_BYTES(name) unsigned char* name = ::emulator::shared_memory(0)
#define FSC_UNROLL
#define FSC_ROLLED

namespace fused_sepconv {
using Site = ::emulator::Site;
}

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define FSC_DEVICE __device__ __forceinline__
#define FSC_HOST_DEVICE __host__ __device__ __forceinline__
#define FSC_OUTLINE __device__ __noinline__
#define FSC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FSC_CONST_PARAM __grid_constant__
#define FSC_SHARED(Type, name)                                      \
  extern __shared__ __align__(1024) unsigned char fsc_shared_raw[]; \
  Type& name = *reinterpret_cast<Type*>(fsc_shared_raw)
#define FSC_SHARED_BYTES(name) extern __shared__ __align__(1024) unsigned char name[]
#define FSC_UNROLL _Pragma("unroll")
#define FSC_ROLLED _Pragma("unroll 1")

namespace fused_sepconv {
struct Site {
  FSC_DEVICE static constexpr Site here() { return {}; }
};
}  // namespace fused_sepconv

#endif
