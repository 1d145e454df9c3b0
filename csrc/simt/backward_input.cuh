// backward_input.cuh - the gradient of x: the transposed depthwise convolution of grad_t.
//
//     grad_t (N, K, out_h, out_w)  --- taps, depthwise_weight --->  * pre_act'(x)  --->  grad_x (N, C, H, W)
//
// A gather: a thread owns one element of grad_x and adds up the outputs that x's element went into, so no two threads
// write the same address and the order of the sum is fixed. An output row oh has x's row h under tap kh where
// oh * stride_h - pad_top + kh * dilation_h = h; with a stride, most taps have none.
//
// Floor. Device bytes: grad_t + grad_x (+ x); taps re-read grad_t through L1 and L2.
#pragma once

#include "../common/depthwise.cuh"

namespace fused_sepconv {

constexpr int kBackwardInputThreads = 256;

// The output coordinate whose tap at `reach` = tap * dilation lies on `at`, or -1.
FSC_DEVICE int output_under(int at, int pad, int reach, int stride, int outputs) {
  const int scaled = at + pad - reach;
  if (scaled < 0 || scaled % stride != 0) return -1;
  return scaled / stride < outputs ? scaled / stride : -1;
}

template <class Scalar, class Compute, Layout layout>
FSC_KERNEL(kBackwardInputThreads, 4)
simt_backward_input(const FSC_CONST_PARAM BackwardParams params) {
  const ConvShape& shape = params.shape;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kBackwardInputThreads + threadIdx.x;
  if (element >= shape.N * shape.C * shape.H * shape.W) return;

  // Neighbouring threads differ in what is contiguous: the channel in NHWC, the column in NCHW.
  int c, h, w;
  int64_t rest = element;
  if constexpr (layout == Layout::nhwc) {
    c = static_cast<int>(rest % shape.C), rest /= shape.C;
    w = static_cast<int>(rest % shape.W), rest /= shape.W;
    h = static_cast<int>(rest % shape.H), rest /= shape.H;
  } else {
    w = static_cast<int>(rest % shape.W), rest /= shape.W;
    h = static_cast<int>(rest % shape.H), rest /= shape.H;
    c = static_cast<int>(rest % shape.C), rest /= shape.C;
  }
  const int64_t n = rest;

  const Scalar* grad_t = static_cast<const Scalar*>(params.grad_t.data);
  const Scalar* weight = static_cast<const Scalar*>(params.depthwise_weight);
  Compute sum = 0;
  for (int kh = 0; kh < shape.kernel_h; ++kh) {
    const int oh = output_under(h, shape.pad_top, kh * shape.dilation_h, shape.stride_h, shape.out_h);
    if (oh < 0) continue;
    for (int kw = 0; kw < shape.kernel_w; ++kw) {
      const int ow = output_under(w, shape.pad_left, kw * shape.dilation_w, shape.stride_w, shape.out_w);
      if (ow < 0) continue;
      for (int m = 0; m < shape.multiplier; ++m) {
        const int64_t k = static_cast<int64_t>(c) * shape.multiplier + m;
        sum += static_cast<Compute>(grad_t[offset(params.grad_t, n, k, oh, ow)]) *
               static_cast<Compute>(weight[(k * shape.kernel_h + kh) * shape.kernel_w + kw]);
      }
    }
  }
  if (shape.pre_activation != Activation::none) {
    const Scalar* x = static_cast<const Scalar*>(params.x.data);
    sum = differentiate(shape.pre_activation, sum, static_cast<Compute>(x[offset(params.x, n, c, h, w)]));
  }
  static_cast<Scalar*>(params.grad_x.data)[offset(params.grad_x, n, c, h, w)] = static_cast<Scalar>(sum);
}

}  // namespace fused_sepconv
