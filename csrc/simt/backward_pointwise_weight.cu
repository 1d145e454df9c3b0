// backward_pointwise_weight.cu - instances and grids of the gradients of the pointwise weight and the last bias.

#include "../common/instances_of.h"
#include "backward_pointwise_weight.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
int64_t blocks(const BackwardParams& params) {
  const ConvShape& shape = params.shape;
  return tiles(shape.K, Traits::kColumns) * tiles(shape.F, Traits::kRows) * params.splits;
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    using Traits = SimtTraits<Scalar, Compute, layout>;
    auto made =
        make_plain_instance<BackwardInstance, Scalar, Compute, simt_backward_pointwise_weight<Traits>, blocks<Traits>>(
            name, Traits::kThreads, sizeof(SimtBackwardPointwiseWeightShared<Traits>));
    made.step = BackwardStep::pointwise_weight;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_pointwise_weight_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_pointwise_weight");
}

}  // namespace fused_sepconv
