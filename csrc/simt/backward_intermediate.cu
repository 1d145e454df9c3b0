// backward_intermediate.cu - instances and grids of the backward's first step.

#include "../common/instances_of.h"
#include "backward_intermediate.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
int64_t blocks(const BackwardParams& params) {
  const ConvShape& shape = params.shape;
  return tiles(shape.N * shape.out_h * shape.out_w, Traits::kRows) * tiles(shape.K, Traits::kColumns);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    using Traits = SimtTraits<Scalar, Compute, layout>;
    auto made =
        make_plain_instance<BackwardInstance, Scalar, Compute, simt_backward_intermediate<Traits>, blocks<Traits>>(
            name, Traits::kThreads, sizeof(SimtBackwardIntermediateShared<Traits>));
    made.step = BackwardStep::intermediate;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_intermediate_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_intermediate");
}

}  // namespace fused_sepconv
