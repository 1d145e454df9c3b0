// depthwise_forward.cuh - a depthwise convolution by itself, for every problem that the fast kernels don't take.
//
//     x (N, C, H, W) --- taps, depthwise_weight ---> + bias, mid_act (or grad_output * mid_act') ---> y (N, K, out_h,
//     out_w)
//
// A thread owns one element of y. Any kernel size, stride, dilation, multiplier, alignment and strides, every dtype.
//
// Floor. Device bytes: x + y; taps re-read x through L1 and L2.
#pragma once

#include "../common/depthwise.cuh"

namespace fused_sepconv {

constexpr int kDepthwiseForwardThreads = 256;

template <class Scalar, class Compute, Layout layout>
FSC_KERNEL(kDepthwiseForwardThreads, 4)
simt_depthwise_forward(const FSC_CONST_PARAM DepthwiseForwardParams params) {
  const ConvShape& shape = params.shape;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kDepthwiseForwardThreads + threadIdx.x;
  const int64_t pixels = pixel_count(shape);
  if (element >= pixels * shape.K) return;

  // Neighbouring threads differ in what is contiguous: the channel in NHWC, the column in NCHW.
  int k;
  Place place;
  if constexpr (layout == Layout::nhwc) {
    const int64_t p = element / shape.K;
    k = static_cast<int>(element - p * shape.K);
    place = place_of(shape, p);
  } else {
    const int64_t image_pixels = static_cast<int64_t>(shape.out_h) * shape.out_w;
    const int64_t plane = element / image_pixels;
    place = place_of(shape, element - plane * image_pixels);
    place.n = plane / shape.K;
    k = static_cast<int>(plane - place.n * shape.K);
  }

  const Compute t = depthwise_at<Scalar, Compute>(params, place, k);
  Compute result;
  if (params.grad_output.data == nullptr) {
    result = activate(shape.mid_activation, t);
  } else {
    const Scalar* grad_output = static_cast<const Scalar*>(params.grad_output.data);
    result =
        differentiate(shape.mid_activation, static_cast<Compute>(grad_output[offset(params.grad_output, place, k)]), t);
  }
  static_cast<Scalar*>(params.y.data)[offset(params.y, place, k)] = static_cast<Scalar>(result);
}

}  // namespace fused_sepconv
