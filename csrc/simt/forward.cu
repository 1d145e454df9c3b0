// forward.cu - instances and grids of the SIMT fused forward.

#include "../common/instances_of.h"
#include "forward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const ForwardParams& params, Stream stream) {
  const ConvShape& shape = params.shape;
  const int64_t blocks = tiles(shape.N * shape.out_h * shape.out_w, Traits::kRows) * tiles(shape.F, Traits::kColumns);
  launch(instance.name.c_str(), simt_forward<Traits>, {blocks, instance.threads, instance.shared_bytes}, stream,
         params);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static ForwardInstance make(const std::string& name) {
    using Traits = SimtTraits<Scalar, Compute, layout>;
    auto made = make_instance<ForwardInstance, Scalar, Compute, simt_forward<Traits>>(
        name, Traits::kThreads, sizeof(SimtForwardShared<Traits>));
    made.run = run<Traits>;
    return made;
  }
};

}  // namespace

std::vector<ForwardInstance> simt_forward_instances() { return in_every_dtype_and_layout<Family>("simt_forward"); }

}  // namespace fused_sepconv
