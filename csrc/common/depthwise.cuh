// depthwise.cuh - one value of the depthwise convolution, for the kernels of every kernel size.
#pragma once

#include "../params.h"
#include "../primitives/platform.h"
#include "activation.cuh"
#include "image.cuh"

namespace fused_sepconv {

// Row and column of x under tap (kh, kw) of an output pixel.
FSC_DEVICE int32_t tap_row(const ConvShape& shape, const Place& place, int kh) {
  return place.oh * shape.stride_h - shape.pad_top + kh * shape.dilation_h;
}
FSC_DEVICE int32_t tap_column(const ConvShape& shape, const Place& place, int kw) {
  return place.ow * shape.stride_w - shape.pad_left + kw * shape.dilation_w;
}

// depthwise(pre_act(x)) + depthwise_bias at channel k of an output pixel; the zeros round x are skipped, not read.
template <class Scalar, class Compute, class Params>
FSC_DEVICE Compute depthwise_at(const Params& params, const Place& place, int k) {
  const ConvShape& shape = params.shape;
  const Scalar* bias = static_cast<const Scalar*>(params.depthwise_bias);
  const Scalar* weight =
      static_cast<const Scalar*>(params.depthwise_weight) + static_cast<int64_t>(k) * shape.kernel_h * shape.kernel_w;
  const Scalar* plane =
      static_cast<const Scalar*>(params.x.data) + offset(params.x, place.n, k / shape.multiplier, 0, 0);
  Compute sum = bias == nullptr ? Compute(0) : static_cast<Compute>(bias[k]);
  for (int kh = 0; kh < shape.kernel_h; ++kh) {
    const int32_t h = tap_row(shape, place, kh);
    if (h < 0 || h >= shape.H) continue;
    for (int kw = 0; kw < shape.kernel_w; ++kw) {
      const int32_t w = tap_column(shape, place, kw);
      if (w < 0 || w >= shape.W) continue;
      const Compute value = static_cast<Compute>(plane[h * params.x.stride_h + w * params.x.stride_w]);
      sum += activate(shape.pre_activation, value) * static_cast<Compute>(weight[kh * shape.kernel_w + kw]);
    }
  }
  return sum;
}

}  // namespace fused_sepconv
