// backward_input.cu - instances and grids of the tensor-core backward towards x and the depthwise weight.

#include "../common/instances_of.h"
#include "backward_input.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const MmaInputParams& params, Stream stream) {
  const MmaInputLaunch<Traits> own(params);
  launch(instance.name.c_str(), mma_backward_input<Traits>,
         {tiles(params.shape.K, Traits::kChannels) * params.tiling.parts, instance.threads, own.layout.bytes}, stream,
         own);
}

template <class Scalar, int kernel>
MmaInputInstance make(const std::string& dtype, const std::string& kind) {
  using Traits = MmaInputTraits<Scalar, kernel>;
  auto made = make_instance<MmaInputInstance, Scalar, float, mma_backward_input<Traits>>(
      "mma_backward_input_" + kind + "_" + dtype, Traits::kThreads, kLargestSharedBytes);
  made.run = run<Traits>;
  return made;
}

template <class Scalar>
void add_kinds(std::vector<MmaInputInstance>& instances, const std::string& dtype) {
  instances.push_back(make<Scalar, 3>(dtype, "3x3"));
}

}  // namespace

std::vector<MmaInputInstance> mma_backward_input_instances() {
  std::vector<MmaInputInstance> instances;
  add_kinds<__nv_bfloat16>(instances, "bfloat16");
  add_kinds<__half>(instances, "float16");
  return instances;
}

}  // namespace fused_sepconv
