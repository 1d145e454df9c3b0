// backward_pointwise_weight.cuh - the gradients of the pointwise weight and of the last bias, on the CUDA cores.
//
//     grad_z (N, F, out_h, out_w)  --->  a[pixel][feature]    x --- depthwise, mid_act --->  b[pixel][channel]
//                                               \                                           /
//                                                '------ sync --- outer products --- sync --'    slabs of 16 pixels
//                                                                    |  registers: acc[feature][channel]
//     partial_weight (splits, F, K)  <-------------------------------'
//     partial_bias (splits, F)  <--- column sums of a, by the blocks of the first channels
//
// The depthwise result is computed again as an operand, slab by slab: nothing of it was saved by the forward, and none
// of it is written here. A block owns 64 features x 64 channels and one split of the output pixels; reduce_splits adds
// the parts in a fixed order.
//
// Floor. Device bytes: grad_z + x + weights + partials. Arithmetic: 2 * P * K * (F + taps * ceil(F / 64)) flop.
#pragma once

#include "../common/depthwise.cuh"
#include "product.cuh"

namespace fused_sepconv {

template <class Traits>
struct SimtBackwardPointwiseWeightShared {
  typename Traits::Slab slab;  // a: grad_z, rows are features; b: depthwise results, columns are channels
  Place places[Traits::kDepth];
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
simt_backward_pointwise_weight(const FSC_CONST_PARAM BackwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Compute = typename Traits::Compute;
  FSC_SHARED(SimtBackwardPointwiseWeightShared<Traits>, shared);
  const ConvShape& shape = params.shape;
  const Scalar* grad_z = static_cast<const Scalar*>(params.grad_z.data);

  const int channel_tiles = (shape.K + Traits::kColumns - 1) / Traits::kColumns;
  const int feature_tiles = (shape.F + Traits::kRows - 1) / Traits::kRows;
  const int first_channel = static_cast<int>(blockIdx.x % channel_tiles) * Traits::kColumns;
  const int first_feature = static_cast<int>(blockIdx.x / channel_tiles % feature_tiles) * Traits::kRows;
  const int split = static_cast<int>(blockIdx.x / channel_tiles / feature_tiles);
  const int64_t begin = split * params.pixels_per_split;
  const int64_t pixels = pixel_count(shape);
  const int64_t end = begin + params.pixels_per_split < pixels ? begin + params.pixels_per_split : pixels;

  Corner<Traits> corner(/*columns_are_fast=*/true);
  const bool sums_bias = params.partial_bias != nullptr && first_channel == 0 && threadIdx.x < Traits::kRows;
  Compute bias_sum = 0;
  for (int64_t first = begin; first < end; first += Traits::kDepth) {
    locate_pixels<Traits>(shape, first, end, shared.places);
    __syncthreads();
    for_each_channel_and_pixel<Traits, Traits::kRows, Traits::kDepth>([&](int feature, int pixel) {
      const Place place = shared.places[pixel];
      const int f = first_feature + feature;
      shared.slab.a[pixel][feature] =
          f < shape.F && place.n >= 0 ? static_cast<Compute>(grad_z[offset(params.grad_z, place, f)]) : Compute(0);
    });
    for_each_channel_and_pixel<Traits, Traits::kColumns, Traits::kDepth>([&](int channel, int pixel) {
      const Place place = shared.places[pixel];
      const int k = first_channel + channel;
      const bool inside = k < shape.K && place.n >= 0;
      shared.slab.b[pixel][channel] =
          inside ? activate(shape.mid_activation, depthwise_at<Scalar, Compute>(params, place, k)) : Compute(0);
    });
    __syncthreads();
    corner.multiply(shared.slab);
    if (sums_bias) {
      Compute sum = 0;
      FSC_UNROLL
      for (int pixel = 0; pixel < Traits::kDepth; ++pixel) sum += shared.slab.a[pixel][threadIdx.x];
      bias_sum += sum;
    }
    __syncthreads();  // the slab and its places are read before the next ones are written
  }

  Compute* partial = static_cast<Compute*>(params.partial_weight);
  FSC_UNROLL
  for (int i = 0; i < Traits::kCorner; ++i) {
    const int f = first_feature + corner.row + i;
    FSC_UNROLL
    for (int j = 0; j < Traits::kCorner; ++j) {
      const int k = first_channel + corner.column + j;
      if (f < shape.F && k < shape.K)
        partial[(static_cast<int64_t>(split) * shape.F + f) * shape.K + k] = corner.acc[i][j];
    }
  }
  const int f = first_feature + static_cast<int>(threadIdx.x);
  if (sums_bias && f < shape.F)
    static_cast<Compute*>(params.partial_bias)[static_cast<int64_t>(split) * shape.F + f] = bias_sum;
}

}  // namespace fused_sepconv
