// nhwc_forward.cu - instances and grids of the depthwise convolution at the speed of memory.

#include <algorithm>

#include "../common/instances_of.h"
#include "nhwc_forward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, DepthwiseForwardParams params, Stream stream) {
  const ConvShape& shape = params.shape;
  const NhwcTiling& tiling = params.tiling;
  params.x_steps = strip_steps<Traits>(params.x, shape.dilation_h, shape.dilation_w, tiling.warps);
  params.y_steps = strip_steps<Traits>(params.y, tiling.phases_h, tiling.phases_w, tiling.warps);
  const int64_t blocks = tiles(params.shape.K, Traits::kChunk) * params.tiling.parts;
  launch(instance.name.c_str(), depthwise_nhwc_forward<Traits>,
         {blocks, params.tiling.warps * kWarpSize, params.tiling.shared_bytes}, stream, params);
}

template <class Traits>
int largest_shared_bytes() {
  using Window = DepthwiseForwardWindow<Traits>;
  const int pixels =
      Window::kCapacity * Window::columns_of(Traits::kMaxWarps) + Traits::kMaxWarps * Traits::kRows * Traits::kColumns;
  return std::min(pixels * Traits::kPixelBytes + prologue_bytes<Traits>(), kLargestSharedBytes);
}

// Two blocks of ten warps on an SM for 3x3; larger kernels have more weights in registers, of which 10 warps leave a
// thread 168 and 8 leave it 255. Stride 2 has larger windows: half the rows at a time keep them in shared memory.
template <bool normalised>
struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseForwardInstance make(const std::string& name) {
    using Traits = NhwcTraits<Scalar, kernel, stride, stride == 1 ? 4 : 2, 4 / sizeof(Scalar), kernel == 7 ? 8 : 10,
                              kernel == 3 ? 2 : 1, normalised>;
    auto made = make_instance<DepthwiseForwardInstance, Scalar, float, depthwise_nhwc_forward<Traits>>(
        name, Traits::kThreads, largest_shared_bytes<Traits>());
    made.run = [](const Instance& instance, const DepthwiseForwardParams& params, Stream stream) {
      run<Traits>(instance, params, stream);
    };
    return made;
  }
};

}  // namespace

std::vector<DepthwiseForwardInstance> depthwise_forward_instances() {
  return all_of<DepthwiseForwardInstance>(
      {for_every_kernel<DepthwiseForwardInstance, Family<false>>("depthwise_forward_nhwc"),
       for_every_normalised_kernel<DepthwiseForwardInstance, Family<true>>("depthwise_normalised_forward_nhwc")});
}

}  // namespace fused_sepconv
