// emulator.h - CUDA's execution model on the CPU, for the tests; what platform.h includes under FSC_EMULATED.
//
// A block's threads are fibers on one OS thread; blocks are spread over the OS threads. README.md says what is emulated
// and what is not. Nothing in this folder is part of the installed package.
#pragma once

#include "runtime/control.h"        // launch, schedules, counters, registered buffers: for host code
#include "runtime/cuda_language.h"  // threadIdx, __syncthreads, __shfl_sync, atomicAdd …: CUDA's own words
#include "runtime/device.h"         // what the CPU bodies of csrc/primitives call
