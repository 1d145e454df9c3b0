// backward_depthwise_weight.cu - instances and grids of the gradients of the depthwise weight and bias.

#include "../common/instances_of.h"
#include "backward_depthwise_weight.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const BackwardParams& params, Stream stream) {
  const int64_t blocks = tiles(params.shape.K, Traits::kChannels) * params.splits;
  launch(instance.name.c_str(), simt_backward_depthwise_weight<Traits>,
         {blocks, instance.threads, instance.shared_bytes}, stream, params);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    using Traits = SimtDepthwiseWeightTraits<Scalar, Compute, layout>;
    auto made = make_instance<BackwardInstance, Scalar, Compute, simt_backward_depthwise_weight<Traits>>(
        name, Traits::kThreads, sizeof(typename Traits::Shared));
    made.step = BackwardStep::depthwise_weight;
    made.run = run<Traits>;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_depthwise_weight_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_depthwise_weight");
}

}  // namespace fused_sepconv
