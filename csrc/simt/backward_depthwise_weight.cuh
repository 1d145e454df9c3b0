// backward_depthwise_weight.cuh - the gradients of the depthwise weight and bias.
//
//     x  --- pre_act, one tap --->  *  <---  grad_t          for each tap, and once more without x for the bias:
//                                   |
//              registers: a sum over the pixels of one split, every kLanes-th
//                                   |
//              shared memory: kLanes sums a channel, added in order
//                                   v
//     partial_weight (splits, K, taps), partial_bias (splits, K)  --- reduce_splits --->  gradients
//
// A block owns kChannels depthwise channels and one split of the output pixels. The number of taps is not known when
// this is compiled, so there is one pass over the split for each, out of L1 and L2 where they hold it.
#pragma once

#include "../common/depthwise.cuh"

namespace fused_sepconv {

template <class Scalar_, class Compute_, Layout layout>
struct SimtDepthwiseWeightTraits {
  using Scalar = Scalar_;
  using Compute = Compute_;
  static constexpr Layout kLayout = layout;
  static constexpr int kThreads = 256;
  // NHWC: a warp reads 32 channels of a pixel; NCHW: 32 pixels of a channel.
  static constexpr int kChannels = layout == Layout::nhwc ? 32 : 4;
  static constexpr int kLanes = kThreads / kChannels;
  struct Shared {
    Compute sums[kLanes][kChannels];
  };
};

// The sum over pixels [first, end), every kLanes-th, of grad_t times what lies under a tap; tap < 0: of grad_t alone.
template <class Traits>
FSC_DEVICE typename Traits::Compute sum_over_pixels(const BackwardParams& params, int k, int64_t first, int64_t end,
                                                    int kh, int kw) {
  using Scalar = typename Traits::Scalar;
  using Compute = typename Traits::Compute;
  const ConvShape& shape = params.shape;
  const Scalar* x = static_cast<const Scalar*>(params.x.data);
  const Scalar* grad_t = static_cast<const Scalar*>(params.grad_t.data);
  Compute sum = 0;
  for (int64_t p = first; p < end; p += Traits::kLanes) {
    const Place place = place_of(shape, p);
    Compute value = 1;
    if (kh >= 0) {
      const int32_t h = tap_row(shape, place, kh);
      const int32_t w = tap_column(shape, place, kw);
      if (h < 0 || h >= shape.H || w < 0 || w >= shape.W) continue;
      value = activate(shape.pre_activation,
                       static_cast<Compute>(x[offset(params.x, place.n, k / shape.multiplier, h, w)]));
    }
    sum += value * static_cast<Compute>(grad_t[offset(params.grad_t, place, k)]);
  }
  return sum;
}

template <class Traits>
FSC_KERNEL(Traits::kThreads, 4)
simt_backward_depthwise_weight(const FSC_CONST_PARAM BackwardParams params) {
  using Compute = typename Traits::Compute;
  constexpr int kChannels = Traits::kChannels, kLanes = Traits::kLanes;
  FSC_SHARED(typename Traits::Shared, shared);
  const ConvShape& shape = params.shape;

  const int channel_tiles = (shape.K + kChannels - 1) / kChannels;
  const int split = static_cast<int>(blockIdx.x / channel_tiles);
  const int tid = threadIdx.x;
  const int channel = Traits::kLayout == Layout::nhwc ? tid % kChannels : tid / kLanes;
  const int lane = Traits::kLayout == Layout::nhwc ? tid / kChannels : tid % kLanes;
  const int k = static_cast<int>(blockIdx.x % channel_tiles) * kChannels + channel;
  const int64_t begin = split * params.pixels_per_split;
  const int64_t pixels = pixel_count(shape);
  const int64_t end = begin + params.pixels_per_split < pixels ? begin + params.pixels_per_split : pixels;

  Compute* partial_weight = static_cast<Compute*>(params.partial_weight);
  Compute* partial_bias = static_cast<Compute*>(params.partial_bias);
  const int taps = shape.kernel_h * shape.kernel_w;
  for (int tap = partial_weight == nullptr ? taps : 0; tap < taps + (partial_bias == nullptr ? 0 : 1); ++tap) {
    const bool is_bias = tap == taps;
    const int kh = is_bias ? -1 : tap / shape.kernel_w;
    const int kw = is_bias ? -1 : tap % shape.kernel_w;
    shared.sums[lane][channel] =
        k < shape.K ? sum_over_pixels<Traits>(params, k, begin + lane, end, kh, kw) : Compute(0);
    __syncthreads();
    if (lane == 0 && k < shape.K) {
      double sum = 0;  // a chain of 64 in float32 strayed up to 4 times as far as PyTorch's tree
      for (int i = 0; i < kLanes; ++i) sum += shared.sums[i][channel];
      const int64_t row = static_cast<int64_t>(split) * shape.K + k;
      if (is_bias)
        partial_bias[row] = static_cast<Compute>(sum);
      else
        partial_weight[row * taps + tap] = static_cast<Compute>(sum);
    }
    __syncthreads();  // the sums are read before the next tap's are written
  }
}

}  // namespace fused_sepconv
