// tensor_backward_input.cu - instances and grids of the tensor-core backward towards x and the depthwise weight.

#include "../kernels/tensor_backward_input.cuh"
#include "instances_of.h"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const TensorInputParams& params, Stream stream) {
  const TensorInputLaunch<Traits> own(params);
  launch(instance.name.c_str(), tensor_backward_input<Traits>,
         {tiles(params.shape.K, Traits::kChannels) * params.tiling.parts, instance.threads, own.layout.bytes}, stream,
         own);
}

template <class Scalar, int kernel>
TensorInputInstance make(const std::string& dtype, const std::string& kind) {
  using Traits = TensorInputTraits<Scalar, kernel>;
  auto made = make_instance<TensorInputInstance, Scalar, float, tensor_backward_input<Traits>>(
      "tensor_backward_input_" + kind + "_" + dtype, Traits::kThreads, kLargestSharedBytes);
  made.run = run<Traits>;
  return made;
}

template <class Scalar>
void add_kinds(std::vector<TensorInputInstance>& instances, const std::string& dtype) {
  instances.push_back(make<Scalar, 3>(dtype, "3x3"));
}

}  // namespace

std::vector<TensorInputInstance> tensor_backward_input_instances() {
  std::vector<TensorInputInstance> instances;
  add_kinds<__nv_bfloat16>(instances, "bfloat16");
  add_kinds<__half>(instances, "float16");
  return instances;
}

}  // namespace fused_sepconv
