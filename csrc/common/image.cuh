// image.cuh - addresses in a tensor of any layout, and where an output pixel lies.
#pragma once

#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

// The dimension of the images that is contiguous: channels or columns. Kernels take any strides; the layout decides
// which index neighbouring threads differ in.
enum class Layout { nhwc, nchw };

// Offset of (n, c, h, w), in elements; 64 bits, as N * C * H * W may pass 2^31.
FSC_DEVICE int64_t offset(const Image& image, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * image.stride_n + c * image.stride_c + h * image.stride_h + w * image.stride_w;
}

// An output pixel. 16 bytes, so that a thread reads one from shared memory in one access.
struct alignas(16) Place {
  int64_t n;  // image; negative: no such pixel
  int32_t oh, ow;
};

FSC_DEVICE int64_t offset(const Image& image, const Place& place, int64_t c) {
  return offset(image, place.n, c, place.oh, place.ow);
}

// Output pixels are numbered through all images: p = (n * out_h + oh) * out_w + ow.
FSC_DEVICE int64_t pixel_count(const ConvShape& shape) { return shape.N * shape.out_h * shape.out_w; }

FSC_DEVICE Place place_of(const ConvShape& shape, int64_t p) {
  const int64_t row = p / shape.out_w;
  const int64_t n = row / shape.out_h;
  return {n, static_cast<int32_t>(row - n * shape.out_h), static_cast<int32_t>(p - row * shape.out_w)};
}

}  // namespace fused_sepconv
