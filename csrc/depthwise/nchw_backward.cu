// nchw_backward.cu - instances and grids of the depthwise backward in one pass in NCHW.

#include "../common/instances_of.h"
#include "nchw_backward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const DepthwiseBackwardParams& params, Stream stream) {
  const int64_t blocks = int64_t{params.shape.K} * params.planes.parts;
  launch(instance.name.c_str(), depthwise_nchw_backward<Traits>, {blocks, instance.threads, params.planes.shared_bytes},
         stream, NchwBackwardParams<Traits>(params));
}

template <class Scalar, int kernel, int stride, bool dilated, bool normalised = false>
using Traits = NchwTraits<Scalar, kernel, stride, dilated, stride == 1 && kernel == 3 ? 4 : 2,
                          kernel == 3   ? 4
                          : kernel == 5 ? 3
                                        : 2,
                          normalised>;

template <class Traits>
DepthwiseBackwardInstance instance_of(const std::string& name) {
  auto made = make_instance<DepthwiseBackwardInstance, typename Traits::Scalar, float, depthwise_nchw_backward<Traits>>(
      name, Traits::kThreads, kLargestSharedBytes);
  made.run = run<Traits>;
  return made;
}

struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseBackwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, false>>(name);
  }
};

struct NormalisedFamily {
  template <class Scalar, int kernel, int stride>
  static DepthwiseBackwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, false, true>>(name);
  }
};

struct DilatedFamily {
  template <class Scalar, int kernel, int stride>
  static DepthwiseBackwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, true>>(name);
  }
};

}  // namespace

std::vector<DepthwiseBackwardInstance> depthwise_nchw_backward_instances() {
  const std::string family = "depthwise_backward_nchw";
  return all_of<DepthwiseBackwardInstance>(
      {for_every_kernel<DepthwiseBackwardInstance, Family>(family),
       for_every_dilated_kernel<DepthwiseBackwardInstance, DilatedFamily>(family),
       for_every_normalised_kernel<DepthwiseBackwardInstance, NormalisedFamily>("depthwise_normalised_backward_nchw")});
}

}  // namespace fused_sepconv
