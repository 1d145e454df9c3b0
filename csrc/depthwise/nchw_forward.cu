// nchw_forward.cu - instances and grids of the depthwise forward in NCHW.

#include "../common/instances_of.h"
#include "nchw_forward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, const DepthwiseForwardParams& params, Stream stream) {
  const int64_t blocks = int64_t{params.shape.K} * params.planes.parts;
  launch(instance.name.c_str(), depthwise_nchw_forward<Traits>, {blocks, instance.threads, params.planes.shared_bytes},
         stream, NchwForwardParams<Traits>(params));
}

template <class Scalar, int kernel, int stride, bool dilated, bool normalised = false>
using Traits = NchwTraits<Scalar, kernel, stride, dilated, stride == 1 ? 4 : 2,
                          kernel == 3   ? 6
                          : kernel == 5 ? 4
                                        : 2,
                          normalised>;

template <class Traits>
DepthwiseForwardInstance instance_of(const std::string& name) {
  auto made = make_instance<DepthwiseForwardInstance, typename Traits::Scalar, float, depthwise_nchw_forward<Traits>>(
      name, Traits::kThreads, kLargestSharedBytes);
  made.run = run<Traits>;
  return made;
}

struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseForwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, false>>(name);
  }
};

struct NormalisedFamily {
  template <class Scalar, int kernel, int stride>
  static DepthwiseForwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, false, true>>(name);
  }
};

struct DilatedFamily {
  template <class Scalar, int kernel, int stride>
  static DepthwiseForwardInstance make(const std::string& name) {
    return instance_of<Traits<Scalar, kernel, stride, true>>(name);
  }
};

}  // namespace

std::vector<DepthwiseForwardInstance> depthwise_nchw_forward_instances() {
  const std::string family = "depthwise_forward_nchw";
  return all_of<DepthwiseForwardInstance>(
      {for_every_kernel<DepthwiseForwardInstance, Family>(family),
       for_every_dilated_kernel<DepthwiseForwardInstance, DilatedFamily>(family),
       for_every_normalised_kernel<DepthwiseForwardInstance, NormalisedFamily>("depthwise_normalised_forward_nchw")});
}

}  // namespace fused_sepconv
