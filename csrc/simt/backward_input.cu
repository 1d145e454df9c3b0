// backward_input.cu - instances and grids of the gradient of x.

#include "../common/instances_of.h"
#include "backward_input.cuh"

namespace fused_sepconv {
namespace {

int64_t blocks(const BackwardParams& params) {
  const ConvShape& shape = params.shape;
  return tiles(shape.N * shape.C * shape.H * shape.W, kBackwardInputThreads);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    auto made =
        make_plain_instance<BackwardInstance, Scalar, Compute, simt_backward_input<Scalar, Compute, layout>, blocks>(
            name, kBackwardInputThreads, 0);
    made.step = BackwardStep::input;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_input_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_input");
}

}  // namespace fused_sepconv
