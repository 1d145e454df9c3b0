// instance.h - a compiled kernel with everything that is fixed when it is compiled, under the name that a plan chooses
// it by.
#pragma once

#include <string>
#include <vector>

#include "../params.h"
#include "device.h"

namespace fused_sepconv {

struct Instance {
  std::string name;              // such as "simt_forward_float32_nhwc"
  std::string spelling;          // of the kernel in C++, by which the compiler's resource report knows it
  int scalar_bytes = 0;          // size of a tensor's element
  int compute_bytes = 0;         // size of what is calculated in, and of partial sums
  int threads = 0;               // a block; where the plan chooses, at most
  int shared_bytes = 0;          // dynamic shared memory a block; where the plan chooses, at most
  const void* kernel = nullptr;  // for cudaFuncGetAttributes
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

struct ReduceInstance : Instance {
  void (*run)(const Instance&, const ReduceParams&, Stream) = nullptr;
};

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
std::vector<ReduceInstance> reduce_splits_instances();

}  // namespace fused_sepconv
