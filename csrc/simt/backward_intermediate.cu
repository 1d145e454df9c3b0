// backward_intermediate.cu - instances and grids of the backward's first step.

#include "../common/instances_of.h"
#include "backward_intermediate.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const BackwardParams& params, Stream stream) {
  const ConvShape& shape = params.shape;
  const int64_t blocks = tiles(shape.N * shape.out_h * shape.out_w, Traits::kRows) * tiles(shape.K, Traits::kColumns);
  launch(instance.name.c_str(), simt_backward_intermediate<Traits>, {blocks, instance.threads, instance.shared_bytes},
         stream, params);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    using Traits = SimtTraits<Scalar, Compute, layout>;
    auto made = make_instance<BackwardInstance, Scalar, Compute, simt_backward_intermediate<Traits>>(
        name, Traits::kThreads, sizeof(SimtBackwardIntermediateShared<Traits>));
    made.step = BackwardStep::intermediate;
    made.run = run<Traits>;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_intermediate_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_intermediate");
}

}  // namespace fused_sepconv
