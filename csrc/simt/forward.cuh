// forward.cuh - fused depthwise + pointwise convolution, forward, on the CUDA cores.
//
// The kernel that runs every valid problem: any kernel size, stride, dilation, depth multiplier, padding and strides
// of x, in every dtype. Where the tensor cores may be used, or 3x3 alone matters, other families are faster.
//
//     x (N, C, H, W)                                      one block: 64 output pixels x 64 features,
//        | taps                                           for each slab of 16 depthwise channels:
//        v
//     depthwise + bias + mid_act  --->  a[channel][pixel]     pointwise weight  --->  b[channel][feature]
//                                              \                                     /
//                                               '--- sync --- outer products --- sync
//                                                                  |  registers: acc[pixel][feature]
//     y (N, F, out_h, out_w)  <---  + bias + residual, act  <------'   (or * act', for the backward)
//
// Who owns what. A block takes 64 output pixels in a row, through all images. A thread computes the depthwise results
// of one channel of the slab (NHWC) or of one pixel (NCHW), whichever makes neighbouring threads read neighbouring
// addresses, and owns a 4 x 4 corner of the product. The blocks of one pixel tile are neighbours in the grid, so that
// its x is still in L2 for the next slab of F.
//
// Why it is right. The pointwise convolution has no halo: an output pixel needs the depthwise result of that pixel
// alone, so the intermediate image never leaves the block.
//
// Floor. Device bytes: x + y + weights (+ residual), each once; taps and slabs of F re-read x through L1 and L2.
// Arithmetic: 2 * P * K * (F + taps * ceil(F / 64)) flop, P pixels: the depthwise part is done again for every slab of
// F, which for a 3x3 kernel costs 9 / 64 of the pointwise work.
#pragma once

#include "../common/depthwise.cuh"
#include "product.cuh"

namespace fused_sepconv {

template <class Traits>
struct SimtForwardShared {
  typename Traits::Slab slab;  // a: depthwise results, rows are pixels; b: pointwise weights, columns are features
  Place places[Traits::kRows];
};

// grad * act'(z). A call: inlined, its exponentials would stand in the epilogue 16 times over.
template <class Compute>
FSC_OUTLINE Compute through_activation(Activation activation, Compute grad, Compute z) {
  return differentiate(activation, grad, z);
}

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
simt_forward(const FSC_CONST_PARAM ForwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Compute = typename Traits::Compute;
  FSC_SHARED(SimtForwardShared<Traits>, shared);
  const ConvShape& shape = params.shape;
  const Scalar* pointwise_weight = static_cast<const Scalar*>(params.pointwise_weight);

  const int64_t feature_tiles = (shape.F + Traits::kColumns - 1) / Traits::kColumns;
  const int64_t first_pixel = blockIdx.x / feature_tiles * Traits::kRows;
  const int first_feature = static_cast<int>(blockIdx.x % feature_tiles) * Traits::kColumns;

  locate_pixels<Traits>(shape, first_pixel, pixel_count(shape), shared.places);
  __syncthreads();

  Corner<Traits> corner(Traits::kLayout == Layout::nhwc);
  for (int slab = 0; slab < shape.K; slab += Traits::kDepth) {
    // Channels past K and pixels past the last are 0, so that they add nothing to the product.
    for_each_channel_and_pixel<Traits, Traits::kDepth, Traits::kRows>([&](int channel, int pixel) {
      const Place place = shared.places[pixel];
      const int k = slab + channel;
      const bool inside = k < shape.K && place.n >= 0;
      shared.slab.a[channel][pixel] =
          inside ? activate(shape.mid_activation, depthwise_at<Scalar, Compute>(params, place, k)) : Compute(0);
    });
    // Neighbouring threads read along K, as the weight lies in memory.
    for_each<Traits, Traits::kDepth, Traits::kColumns>([&](int channel, int feature) {
      const int k = slab + channel;
      const int f = first_feature + feature;
      shared.slab.b[channel][feature] =
          k < shape.K && f < shape.F ? static_cast<Compute>(pointwise_weight[static_cast<int64_t>(f) * shape.K + k])
                                     : Compute(0);
    });
    __syncthreads();
    corner.multiply(shared.slab);
    __syncthreads();  // the slab's last reader is through before the next slab is written
  }

  Scalar* y = static_cast<Scalar*>(params.y.data);
  const Scalar* bias = static_cast<const Scalar*>(params.bias);
  const Scalar* residual = static_cast<const Scalar*>(params.residual.data);
  const Scalar* grad_output = static_cast<const Scalar*>(params.grad_output.data);
  FSC_UNROLL
  for (int i = 0; i < Traits::kCorner; ++i) {
    const Place place = shared.places[corner.row + i];
    if (place.n < 0) continue;
    FSC_UNROLL
    for (int j = 0; j < Traits::kCorner; ++j) {
      const int f = first_feature + corner.column + j;
      if (f >= shape.F) continue;
      Compute z = corner.acc[i][j];
      if (bias != nullptr) z += static_cast<Compute>(bias[f]);
      if (residual != nullptr) z += static_cast<Compute>(residual[offset(params.residual, place, f)]);
      const Compute result =
          grad_output == nullptr
              ? activate(shape.activation, z)
              : through_activation(shape.activation,
                                   static_cast<Compute>(grad_output[offset(params.grad_output, place, f)]), z);
      y[offset(params.y, place, f)] = static_cast<Scalar>(result);
    }
  }
}

}  // namespace fused_sepconv
