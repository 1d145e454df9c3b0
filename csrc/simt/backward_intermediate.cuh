// backward_intermediate.cuh - from the output's gradient back to the depthwise result's, on the CUDA cores.
//
//     grad_z (N, F, out_h, out_w)  --->  a[feature][pixel]    pointwise weight  --->  b[feature][channel]
//                                               \                                     /
//                                                '--- sync --- outer products --- sync      slabs of 16 features
//                                                                   |  registers: acc[pixel][channel]
//     grad_t (N, K, out_h, out_w)  <---  * mid_act'(t)  <-----------'
//                                              ^
//     x, depthwise_weight  --- taps -----------'  t computed again, only where there is a mid-activation
//
// The forward's twin: a block owns 64 output pixels x 64 depthwise channels, a thread a 4 x 4 corner of them.
// grad_t is written in the tensors' own dtype, as PyTorch's two convolutions would write it.
//
// Floor. Device bytes: grad_z + grad_t + weights (+ x). Arithmetic: 2 * P * K * F flop, P pixels.
#pragma once

#include "../common/depthwise.cuh"
#include "product.cuh"

namespace fused_sepconv {

template <class Traits>
struct SimtBackwardIntermediateShared {
  typename Traits::Slab slab;  // a: grad_z, rows are pixels; b: pointwise weights, columns are channels
  Place places[Traits::kRows];
};

// grad * mid_act'(t), t computed again. A call: inlined, the taps' loops would stand in the epilogue 16 times over.
template <class Scalar, class Compute>
FSC_OUTLINE Compute through_mid_activation(const BackwardParams& params, Place place, int k, Compute grad) {
  return differentiate(params.shape.mid_activation, grad, depthwise_at<Scalar, Compute>(params, place, k));
}

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
simt_backward_intermediate(const FSC_CONST_PARAM BackwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Compute = typename Traits::Compute;
  FSC_SHARED(SimtBackwardIntermediateShared<Traits>, shared);
  const ConvShape& shape = params.shape;
  const Scalar* grad_z = static_cast<const Scalar*>(params.grad_z.data);
  const Scalar* pointwise_weight = static_cast<const Scalar*>(params.pointwise_weight);

  const int64_t channel_tiles = (shape.K + Traits::kColumns - 1) / Traits::kColumns;
  const int64_t first_pixel = blockIdx.x / channel_tiles * Traits::kRows;
  const int first_channel = static_cast<int>(blockIdx.x % channel_tiles) * Traits::kColumns;

  locate_pixels<Traits>(shape, first_pixel, pixel_count(shape), shared.places);
  __syncthreads();

  Corner<Traits> corner(Traits::kLayout == Layout::nhwc);
  for (int slab = 0; slab < shape.F; slab += Traits::kDepth) {
    for_each_channel_and_pixel<Traits, Traits::kDepth, Traits::kRows>([&](int feature, int pixel) {
      const Place place = shared.places[pixel];
      const int f = slab + feature;
      shared.slab.a[feature][pixel] =
          f < shape.F && place.n >= 0 ? static_cast<Compute>(grad_z[offset(params.grad_z, place, f)]) : Compute(0);
    });
    for_each<Traits, Traits::kColumns, Traits::kDepth>([&](int channel, int feature) {
      const int k = first_channel + channel;
      const int f = slab + feature;
      shared.slab.b[feature][channel] =
          k < shape.K && f < shape.F ? static_cast<Compute>(pointwise_weight[static_cast<int64_t>(f) * shape.K + k])
                                     : Compute(0);
    });
    __syncthreads();
    corner.multiply(shared.slab);
    __syncthreads();  // the slab's last reader is through before the next slab is written
  }

  Scalar* grad_t = static_cast<Scalar*>(params.grad_t.data);
  FSC_UNROLL
  for (int i = 0; i < Traits::kCorner; ++i) {
    const Place place = shared.places[corner.row + i];
    if (place.n < 0) continue;
    FSC_UNROLL
    for (int j = 0; j < Traits::kCorner; ++j) {
      const int k = first_channel + corner.column + j;
      if (k >= shape.K) continue;
      Compute grad = corner.acc[i][j];
      if (shape.mid_activation != Activation::none) grad = through_mid_activation<Scalar>(params, place, k, grad);
      grad_t[offset(params.grad_t, place, k)] = static_cast<Scalar>(grad);
    }
  }
}

}  // namespace fused_sepconv
