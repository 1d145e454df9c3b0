// nhwc_backward.cu - instances and grids of the depthwise backward in one pass.

#include <algorithm>

#include "../common/instances_of.h"
#include "nhwc_backward.cuh"

namespace fused_sepconv {
namespace {

template <class Traits>
void run(const Instance& instance, DepthwiseBackwardParams params, Stream stream) {
  const ConvShape& shape = params.shape;
  const NhwcTiling& tiling = params.tiling;
  params.x_steps = strip_steps<Traits>(params.x, shape.dilation_h, shape.dilation_w, tiling.warps);
  params.grad_x_steps = strip_steps<Traits>(params.grad_x, shape.dilation_h, shape.dilation_w, tiling.warps);
  params.grad_output_steps = strip_steps<Traits>(params.grad_output, tiling.phases_h, tiling.phases_w, tiling.warps);
  const int64_t blocks = tiles(params.shape.K, Traits::kChunk) * params.tiling.parts;
  launch(instance.name.c_str(), depthwise_nhwc_backward<Traits>,
         {blocks, params.tiling.warps * kWarpSize, params.tiling.shared_bytes}, stream, params);
}

template <class Traits>
int largest_shared_bytes() {
  using Window = DepthwiseBackwardWindow<Traits>;
  const bool mid = !Traits::kNormalised;
  const int pixels = Window::kCapacity * Window::columns_of(Traits::kMaxWarps) +
                     4 * Window::x_rows(mid) * Window::x_columns(Traits::kMaxWarps, mid);
  return std::min(pixels * Traits::kPixelBytes + prologue_bytes<Traits>(), kLargestSharedBytes);
}

// A lane has as many sums as weights in registers: for 7x7 in 16 bits one channel a lane, in chunks of 64 bytes.
template <bool normalised>
struct Family {
  template <class Scalar, int kernel, int stride>
  static DepthwiseBackwardInstance make(const std::string& name) {
    constexpr int kChannels = kernel == 7 ? 1 : 4 / sizeof(Scalar);
    using Traits = NhwcTraits<Scalar, kernel, stride, stride == 1 ? 4 : 2, kChannels, 8, 1, normalised>;
    auto made = make_instance<DepthwiseBackwardInstance, Scalar, float, depthwise_nhwc_backward<Traits>>(
        name, Traits::kThreads, largest_shared_bytes<Traits>());
    made.run = [](const Instance& instance, const DepthwiseBackwardParams& params, Stream stream) {
      run<Traits>(instance, params, stream);
    };
    return made;
  }
};

}  // namespace

std::vector<DepthwiseBackwardInstance> depthwise_backward_instances() {
  return all_of<DepthwiseBackwardInstance>(
      {for_every_kernel<DepthwiseBackwardInstance, Family<false>>("depthwise_backward_nhwc"),
       for_every_normalised_kernel<DepthwiseBackwardInstance, Family<true>>("depthwise_normalised_backward_nhwc")});
}

}  // namespace fused_sepconv
