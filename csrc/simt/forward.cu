// forward.cu - instances and grids of the SIMT fused forward.

#include "../common/instances_of.h"
#include "forward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
int64_t blocks(const ForwardParams& params) {
  const ConvShape& shape = params.shape;
  return tiles(shape.N * shape.out_h * shape.out_w, Traits::kRows) * tiles(shape.F, Traits::kColumns);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static ForwardInstance make(const std::string& name) {
    using Traits = SimtTraits<Scalar, Compute, layout>;
    return make_plain_instance<ForwardInstance, Scalar, Compute, simt_forward<Traits>, blocks<Traits>>(
        name, Traits::kThreads, sizeof(SimtForwardShared<Traits>));
  }
};

}  // namespace

std::vector<ForwardInstance> simt_forward_instances() { return in_every_dtype_and_layout<Family>("simt_forward"); }

}  // namespace fused_sepconv
