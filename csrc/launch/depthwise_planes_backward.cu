// depthwise_planes_backward.cu - instances and grids of the depthwise backward in one pass in NCHW.

#include "../kernels/depthwise_planes_backward.cuh"
#include "instances_of.h"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const DepthwiseBackwardParams& params, Stream stream) {
  const int64_t blocks = int64_t{params.shape.K} * params.planes.parts;
  launch(instance.name.c_str(), depthwise_planes_backward<Traits>,
         {blocks, instance.threads, params.planes.shared_bytes}, stream, params);
}

struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseBackwardInstance make(const std::string& name) {
    using Traits = PlaneTraits<Scalar, kernel, stride, stride == 1 && kernel == 3 ? 4 : 2,
                               kernel == 3   ? 4
                               : kernel == 5 ? 3
                                             : 2>;
    auto made = make_instance<DepthwiseBackwardInstance, Scalar, float, depthwise_planes_backward<Traits>>(
        name, Traits::kThreads, kLargestSharedBytes);
    made.run = run<Traits>;
    return made;
  }
};

}  // namespace

std::vector<DepthwiseBackwardInstance> depthwise_planes_backward_instances() {
  return for_every_kernel<DepthwiseBackwardInstance, Family>("depthwise_backward_nchw");
}

}  // namespace fused_sepconv
