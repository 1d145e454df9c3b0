// backward_input.cu - instances and grids of the gradient of x.

#include "../common/instances_of.h"
#include "backward_input.cuh"

namespace fused_sepconv {
namespace {

template <class Scalar, class Compute, Layout layout>
void run(const Instance& instance, const BackwardParams& params, Stream stream) {
  const ConvShape& shape = params.shape;
  const int64_t blocks = tiles(shape.N * shape.C * shape.H * shape.W, kBackwardInputThreads);
  launch(instance.name.c_str(), simt_backward_input<Scalar, Compute, layout>,
         {blocks, instance.threads, instance.shared_bytes}, stream, params);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static BackwardInstance make(const std::string& name) {
    auto made = make_instance<BackwardInstance, Scalar, Compute, simt_backward_input<Scalar, Compute, layout>>(
        name, kBackwardInputThreads, 0);
    made.step = BackwardStep::input;
    made.run = run<Scalar, Compute, layout>;
    return made;
  }
};

}  // namespace

std::vector<BackwardInstance> simt_backward_input_instances() {
  return in_every_dtype_and_layout<Family>("simt_backward_input");
}

}  // namespace fused_sepconv
