// depthwise_planes_forward.cu - instances and grids of the depthwise forward in NCHW.

#include "../kernels/depthwise_planes_forward.cuh"
#include "instances_of.h"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const DepthwiseForwardParams& params, Stream stream) {
  const int64_t blocks = int64_t{params.shape.K} * params.planes.parts;
  launch(instance.name.c_str(), depthwise_planes_forward<Traits>,
         {blocks, instance.threads, params.planes.shared_bytes}, stream, params);
}

struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseForwardInstance make(const std::string& name) {
    using Traits = PlaneTraits<Scalar, kernel, stride, stride == 1 ? 4 : 2, kernel == 3 ? 6 : kernel == 5 ? 4 : 2>;
    auto made = make_instance<DepthwiseForwardInstance, Scalar, float, depthwise_planes_forward<Traits>>(
        name, Traits::kThreads, kLargestSharedBytes);
    made.run = run<Traits>;
    return made;
  }
};

}  // namespace

std::vector<DepthwiseForwardInstance> depthwise_planes_forward_instances() {
  return for_every_kernel<DepthwiseForwardInstance, Family>("depthwise_forward_nchw");
}

}  // namespace fused_sepconv
