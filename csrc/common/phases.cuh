// phases.cuh - a dilated or strided depthwise convolution along one axis, as several plain ones.
//
// Output o reads padded input stride * o + dilation * i under tap i. With g = gcd(stride, dilation), the outputs
// o = r + (dilation / g) * q of one phase r read
//
//     stride * r + dilation * ((stride / g) * q + i):
//
// inputs that lie `dilation` apart, as a convolution of stride `stride / g` and no dilation reads them. So every pair
// of stride and dilation is dilation / g undilated convolutions, each on its own pixels.
#pragma once

#include "../primitives/platform.h"

namespace fused_sepconv {

struct Phases {
  int count;         // dilation / g
  int inner_stride;  // stride / g
  int stride, pitch, padding;

  Phases(int stride_, int dilation, int padding_) : stride(stride_), pitch(dilation), padding(padding_) {
    int a = stride_, b = dilation;
    while (b != 0) {
      const int rest = a % b;
      a = b, b = rest;
    }
    count = dilation / a;
    inner_stride = stride_ / a;
  }

  // Outputs of the phase that has most of them: phase 0.
  int longest(int outputs) const { return (outputs + count - 1) / count; }
  // The output with index q in phase r.
  FSC_DEVICE int output(int r, int q) const { return r + count * q; }
  // The input under tap 0 of that output; taps lie `pitch` apart.
  FSC_DEVICE int input(int r, int q) const { return stride * r + pitch * inner_stride * q - padding; }
};

}  // namespace fused_sepconv
