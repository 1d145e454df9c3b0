// depthwise_forward.cu - instances and grids of the depthwise convolution that runs every problem.

#include "../common/instances_of.h"
#include "depthwise_forward.cuh"

namespace fused_sepconv {
namespace {

int64_t blocks(const DepthwiseForwardParams& params) {
  const ConvShape& shape = params.shape;
  return tiles(shape.N * shape.K * shape.out_h * shape.out_w, kDepthwiseForwardThreads);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static DepthwiseForwardInstance make(const std::string& name) {
    return make_plain_instance<DepthwiseForwardInstance, Scalar, Compute,
                               simt_depthwise_forward<Scalar, Compute, layout>, blocks>(name, kDepthwiseForwardThreads,
                                                                                        0);
  }
};

}  // namespace

std::vector<DepthwiseForwardInstance> simt_depthwise_forward_instances() {
  return in_every_dtype_and_layout<Family>("simt_depthwise_forward");
}

}  // namespace fused_sepconv
