// instance.h - a compiled kernel with everything that is fixed when it is compiled, under the name that a plan chooses
// it by.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "../params.h"
#include "device.h"

namespace fused_sepconv {

// The devices that a kernel is loaded on, a bit each; a copy of an instance starts with none.
struct LoadedOn {
  std::atomic<uint64_t> devices{0};

  LoadedOn() = default;
  LoadedOn(const LoadedOn&) noexcept {}
  LoadedOn& operator=(const LoadedOn&) noexcept { return *this; }
};

struct Instance {
  std::string name;              // such as "simt_forward_float32_nhwc"
  std::string spelling;          // of the kernel in C++, by which the compiler's resource report knows it
  int scalar_bytes = 0;          // size of a tensor's element
  int compute_bytes = 0;         // size of what is calculated in, and of partial sums
  int threads = 0;               // a block; where the plan chooses, at most
  int shared_bytes = 0;          // dynamic shared memory a block; where the plan chooses, at most
  const void* kernel = nullptr;  // for cudaFuncGetAttributes
  mutable LoadedOn loaded_on;
};

struct ForwardInstance : Instance {
  void (*run)(const Instance&, const ForwardParams&, Stream) = nullptr;
};

enum class BackwardStep { intermediate, input, depthwise_weight, pointwise_weight };

struct BackwardInstance : Instance {
  BackwardStep step = BackwardStep::intermediate;
  void (*run)(const Instance&, const BackwardParams&, Stream) = nullptr;
};

struct DepthwiseForwardInstance : Instance {
  void (*run)(const Instance&, const DepthwiseForwardParams&, Stream) = nullptr;
};

struct DepthwiseBackwardInstance : Instance {
  void (*run)(const Instance&, const DepthwiseBackwardParams&, Stream) = nullptr;
};

struct MmaInputInstance : Instance {
  void (*run)(const Instance&, const MmaInputParams&, Stream) = nullptr;
};

struct NormAddInstance : Instance {
  void (*run)(const Instance&, const NormAddParams&, Stream) = nullptr;
};

struct NormPoolInstance : Instance {
  void (*run)(const Instance&, const NormPoolParams&, Stream) = nullptr;
};

struct NormPoolBackwardInstance : Instance {
  void (*run)(const Instance&, const NormPoolBackwardParams&, Stream) = nullptr;
};

struct ReduceInstance : Instance {
  void (*run)(const Instance&, const ReduceParams&, Stream) = nullptr;
};

#ifndef FSC_EMULATED

// Loads the instance's kernel on the current device when it is first used there.
//
// The launch would do so too, but inside a graph capture, where loading can be refused and end the capture: here it is
// no part of what is captured, as PyTorch's allocator does it with its own memory. Above 48 KiB of shared memory a
// kernel must opt in, for the most that a block may have: the plan may ask for any less in another call.
inline void load(const Instance& instance) {
  const char* name = instance.name.c_str();
  int device = 0;
  check(cudaGetDevice(&device), name, "cudaGetDevice");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;  // the 65th is asked at each call
  if (instance.loaded_on.devices.load(std::memory_order_acquire) & bit) return;

  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), name, "cudaThreadExchangeStreamCaptureMode");
  cudaFuncAttributes of;
  cudaError_t status = cudaFuncGetAttributes(&of, instance.kernel);
  if (status == cudaSuccess && instance.shared_bytes > 48 * 1024) {
    int most = 0;
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  check(status, name, "loading the kernel");
  check(restored, name, "cudaThreadExchangeStreamCaptureMode");
  instance.loaded_on.devices.fetch_or(bit, std::memory_order_release);
}

#endif

// One function a family and step, defined in the .cu of that name.
std::vector<ForwardInstance> simt_forward_instances();
std::vector<BackwardInstance> simt_backward_intermediate_instances();
std::vector<BackwardInstance> simt_backward_input_instances();
std::vector<BackwardInstance> simt_backward_depthwise_weight_instances();
std::vector<BackwardInstance> simt_backward_pointwise_weight_instances();
std::vector<DepthwiseForwardInstance> simt_depthwise_forward_instances();
std::vector<DepthwiseForwardInstance> depthwise_forward_instances();
std::vector<DepthwiseForwardInstance> depthwise_nchw_forward_instances();
std::vector<DepthwiseBackwardInstance> depthwise_backward_instances();
std::vector<DepthwiseBackwardInstance> depthwise_nchw_backward_instances();
std::vector<ForwardInstance> mma_forward_instances();
std::vector<BackwardInstance> mma_backward_pointwise_weight_instances();
std::vector<MmaInputInstance> mma_backward_input_instances();
std::vector<NormAddInstance> norm_add_instances();
std::vector<NormPoolInstance> norm_pool_instances();
std::vector<NormPoolBackwardInstance> norm_pool_backward_instances();
std::vector<ReduceInstance> reduce_splits_instances();

}  // namespace fused_sepconv
