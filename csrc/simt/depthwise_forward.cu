// depthwise_forward.cu - instances and grids of the depthwise convolution that serves every problem.

#include "../common/instances_of.h"
#include "depthwise_forward.cuh"

namespace fused_sepconv {
namespace {

template <class Scalar, class Compute, Layout layout>
void run(const Instance& instance, const DepthwiseForwardParams& params, Stream stream) {
  const ConvShape& shape = params.shape;
  const int64_t blocks = tiles(shape.N * shape.K * shape.out_h * shape.out_w, kDepthwiseForwardThreads);
  launch(instance.name.c_str(), simt_depthwise_forward<Scalar, Compute, layout>,
         {blocks, instance.threads, instance.shared_bytes}, stream, params);
}

struct Family {
  template <class Scalar, class Compute, Layout layout>
  static DepthwiseForwardInstance make(const std::string& name) {
    auto made =
        make_instance<DepthwiseForwardInstance, Scalar, Compute, simt_depthwise_forward<Scalar, Compute, layout>>(
            name, kDepthwiseForwardThreads, 0);
    made.run = run<Scalar, Compute, layout>;
    return made;
  }
};

}  // namespace

std::vector<DepthwiseForwardInstance> simt_depthwise_forward_instances() {
  return in_every_dtype_and_layout<Family>("simt_depthwise_forward");
}

}  // namespace fused_sepconv
