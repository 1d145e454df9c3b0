// params.h - what a call is.
//
// `ConvShape` holds everything that the shapes and arguments of a call decide; it is the same for the forward and the
// backward, and is built once a plan. `ForwardParams` and `BackwardParams` add the tensors of one call. Kernels take
// these structs by value, so that every field is in constant memory.
#pragma once

#include <cstdint>

namespace fused_sepconv {

// The activations of a call, chosen at run time inside the kernel (templates would make 7^3 instances of each kernel).
// All of them map 0 to 0, so that zero padding is the same before and after the pre-activation.
enum class Activation : int32_t { none = 0, relu, relu6, elu, silu, hardswish, gelu };

// Sizes and arguments of a separable convolution. The intermediate (depthwise) image has K = C * multiplier channels;
// channel k reads input channel k / multiplier.
struct ConvShape {
  int64_t N;                   // images; unfolded vmap dimensions may push it past 65,535
  int32_t C, H, W;             // input channels, height, width
  int32_t K;                   // depthwise channels: C * multiplier
  int32_t F;                   // output channels (features)
  int32_t out_h, out_w;        // output height and width
  int32_t multiplier;          // depthwise channels per input channel
  int32_t kernel_h, kernel_w;  // depthwise taps
  int32_t stride_h, stride_w;  // pixels of the input per pixel of the output
  int32_t pad_top, pad_left;   // zeros before the first row and column (those after it follow from out_h, out_w)
  int32_t dilation_h, dilation_w;
  Activation pre_activation;  // on the input as it is read
  Activation mid_activation;  // between depthwise and pointwise
  Activation activation;      // on the output, after bias and residual
};

// A (N, channels, height, width) tensor of any layout: base address and strides in elements. Null where absent.
struct Image {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// How the plan cuts the output for a tensor-core kernel; zeros for the kernels that cut it by themselves.
struct MmaTiling {
  int32_t rows, columns;  // output pixels of a tile, in its phase of the image (common/phases.cuh)
  int32_t blocks;         // that run side by side, each tile after tile
  int32_t stages;         // of a block's ring in shared memory
};

// How the plan cuts a problem for the tensor-core gradient of the pointwise weight (mma/weight_tiles.cuh).
struct MmaWeightTiling {
  int32_t columns;                       // output columns of a strip, in its phase of the image; whole cells of 4
  int32_t cells;                         // of a tile; a power of two
  int32_t feature_warps, channel_warps;  // of a block, side by side, 64 of each a warp; the others share the pixels
  int32_t stages;                        // tiles in shared memory
};

// One forward call: z = pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual, y = act(z). With
// grad_output it is the backward's look at the same z: y = grad_output * act'(z), where act' can't be read from the
// output that the forward gave.
struct ForwardParams {
  ConvShape shape;
  Image x;                       // (N, C, H, W)
  const void* depthwise_weight;  // (K, kernel_h, kernel_w), contiguous
  const void* pointwise_weight;  // (F, K), contiguous
  const void* depthwise_bias;    // (K) or null
  const void* bias;              // (F) or null
  Image residual;                // (N, F, out_h, out_w), or data == null
  Image grad_output;             // (N, F, out_h, out_w), or data == null
  Image y;                       // (N, F, out_h, out_w)
  MmaTiling tiling;              // of the tensor-core kernels
};

// One backward call. grad_z is the gradient of the last activation's argument: of y itself where there is none.
// The steps run one after the other on a stream; each reads what it needs and writes what is its own:
//
//   intermediate      grad_z, pointwise_weight (x, depthwise_weight: mid_act')  ->  grad_t
//   input             grad_t, depthwise_weight (x: pre_act')                    ->  grad_x
//   depthwise_weight  grad_t, x                                                 ->  partial_weight, partial_bias
//   pointwise_weight  grad_z, x, depthwise_weight                               ->  partial_weight, partial_bias
//
// The last two split their sum over the pixels; ReduceParams adds the parts, always in the same order.
struct BackwardParams {
  ConvShape shape;
  Image x;                       // (N, C, H, W)
  const void* depthwise_weight;  // (K, kernel_h, kernel_w), contiguous
  const void* pointwise_weight;  // (F, K), contiguous
  const void* depthwise_bias;    // (K) or null
  Image grad_z;                  // (N, F, out_h, out_w)
  Image grad_t;                  // (N, K, out_h, out_w): of depthwise(pre_act(x)) + depthwise_bias
  Image grad_x;                  // (N, C, H, W)
  void* partial_weight;          // (splits, K, kernel_h, kernel_w) or (splits, F, K), in the kernel's arithmetic type
  void* partial_bias;            // (splits, K) or (splits, F), or null
  int64_t pixels_per_split;      // output pixels that one part sums over; the last has what is left
  int32_t splits;                // parts
  MmaWeightTiling mma_weight;    // of the tensor-core step, which cuts its sum into parts of about as many tiles
};

// How the depthwise kernels cut a problem (fused_sepconv/families/depthwise.py decides; the kernels only follow).
//
// A dilated convolution is `phases` convolutions without dilation side by side, each on every dilation-th row or
// column. The images of all phases are cut into strips, a tile of columns over the whole height; a strip into groups of
// rows; and all groups, numbered strip after strip, into parts, one a block (for each chunk of channels).
struct NhwcTiling {
  int32_t phases_h, phases_w;  // dilation / gcd(stride, dilation)
  int32_t column_tiles;        // strips side by side
  int32_t tile_columns;        // columns of a strip
  int32_t first_row;           // of a phase: 0, or in the backward where x and the pixels that own a gradient begin
  int32_t first_column;
  int32_t groups;           // of a strip
  int32_t groups_per_part;  // the last part has what is left
  int32_t parts;
  int32_t warps;         // of a block: 4 columns each
  int32_t shared_bytes;  // of a block
};

// What an image's address moves by, in bytes, as a kernel for NHWC goes through a phase of it: to the next row, and to
// the next column that a thread copies. The launch finds them, and the kernel only adds.
struct StripSteps {
  int64_t row, column;
};

// The same for the kernels of NCHW. A block has one channel. A unit is a band of rows of some images, and units, the
// bands of the first images first, are numbered through into parts, one a block.
struct NchwTiling {
  int32_t images;          // of a unit; the last unit may have fewer. Where there are several, a band is all rows
  int32_t rows;            // of a band: of the output, or in the backward of x (whole items of a thread)
  int32_t bands;           // of an image
  int32_t first_row;       // 0, or in the backward where x and the pixels that own a gradient begin, padding included
  int32_t first_column;    // the same
  int32_t columns;         // of the output, or in the backward from first_column to where both end
  int32_t units_per_part;  // the last part has what is left
  int32_t parts;
  int32_t shared_bytes;  // of a block
};

// The step before a normalised depthwise convolution: pre_act(scale[c] * x + shift[c]) in float32. Around the image
// there are zeros after it.
struct Affine {
  const float* scale;  // (C)
  const float* shift;  // (C)
};

// One forward call of a depthwise convolution by itself: t = depthwise(pre_act(x)) + depthwise_bias, y = mid_act(t).
// With grad_output it is a backward's first step, where the kernel that follows does not take it: y = grad_output *
// mid_act'(t).
struct DepthwiseForwardParams {
  ConvShape shape;               // F and the last activation are not used
  NhwcTiling tiling;             // of the kernels for NHWC
  NchwTiling planes;             // of those for NCHW
  Image x;                       // (N, C, H, W)
  const void* depthwise_weight;  // (K, kernel_h, kernel_w), contiguous
  const void* depthwise_bias;    // (K) or null
  Image grad_output;             // (N, K, out_h, out_w), or data == null
  Image y;                       // (N, K, out_h, out_w)
  StripSteps x_steps, y_steps;   // of the kernels for NHWC
  Affine affine;                 // of the normalised kernels, which have neither mid-activation nor grad_output
};

// One backward call of it: all gradients in one pass over x and grad_output, the gradient of y. Where x is normalised
// first, grad_x is dz, the gradient of z = scale * x + shift, and its two sums over the pixels come beside it.
struct DepthwiseBackwardParams {
  ConvShape shape;
  NhwcTiling tiling;                                    // of the kernels for NHWC
  NchwTiling planes;                                    // of those for NCHW
  Image x;                                              // (N, C, H, W)
  const void* depthwise_weight;                         // (K, kernel_h, kernel_w), contiguous
  const void* depthwise_bias;                           // (K) or null; read where there is a mid-activation
  Image grad_output;                                    // (N, K, out_h, out_w)
  Image grad_x;                                         // (N, C, H, W), or data == null
  float* partial_weight;                                // (parts, K, kernel_h, kernel_w), or null
  float* partial_bias;                                  // (parts, K), or null
  StripSteps x_steps, grad_output_steps, grad_x_steps;  // of the kernels for NHWC
  Affine affine;                                        // of the normalised kernels, which have no mid-activation
  const float* mean;                                    // (C): what x's values lie around
  float* partial_affine;                                // (parts, 2, C): of dz, and of dz * (x - mean)
};

// A BatchNorm joined to an addition: y = u + v, with u = scale * x + shift, and v likewise of `other` where that has a
// scale, each rounded as BatchNorm's own result would be. All images are NHWC without gaps.
struct NormAddParams {
  int64_t pixels;  // of all images
  int32_t C;       // channels, whole pieces of 16 bytes
  const void* x;
  Affine affine;
  const void* other;    // or null
  Affine other_affine;  // or nulls
  void* y;
};

// Sizes of a 3 x 3 max-pooling of stride 2. Where a window reaches over the edge, it is smaller.
struct PoolShape {
  int64_t N;
  int32_t C, H, W;            // of x
  int32_t out_h, out_w;       // pixels of the result
  int32_t pad_top, pad_left;  // rows and columns of the first window that lie outside
};

// A BatchNorm joined to a max-pooling: of each window, where scale * x + shift, rounded, is largest.
struct NormPoolParams {
  PoolShape shape;
  const void* x;   // (N, H, W, C)
  Affine affine;   // (C)
  void* picked;    // (N, out_h, out_w, C): x there
  uint8_t* index;  // the same: its place in the window, 3 * row + column
};

// Its backward: grad_x = factor * (g - mean_g - (x - mean) * slope), where g is the sum of `grad` over the windows that
// picked the pixel. Without `slope` it is factor * g.
struct NormPoolBackwardParams {
  PoolShape shape;
  const void* grad;      // (N, out_h, out_w, C)
  const uint8_t* index;  // the same
  const void* x;         // (N, H, W, C)
  const float* factor;   // (C)
  const float* mean;     // (C) or null, like the next two
  const float* mean_g;
  const float* slope;
  void* grad_x;  // (N, H, W, C)
};

// How the tensor-core backward cuts the stream of positions that all images make (mma/stream.cuh).
struct MmaInputTiling {
  int32_t strips;  // that an image's columns are cut into
  int32_t part;    // positions of x of a part, one a block for each chunk of channels; the last part has what is left
  int32_t parts;
  int32_t stages;  // slabs of features in shared memory
};

// One backward call from the gradient of the pointwise convolution's result to those of x and of the depthwise weight
// and bias; the gradient between the two convolutions stays in shared memory.
struct MmaInputParams {
  ConvShape shape;  // no mid-activation
  MmaInputTiling tiling;
  Image x;                       // (N, C, H, W)
  const void* depthwise_weight;  // (K, kernel_h, kernel_w), contiguous
  const void* pointwise_weight;  // (F, K), contiguous
  Image grad_z;                  // (N, F, out_h, out_w)
  void* grad_x;                  // (N, C, H, W) with x's strides, or null
  float* partial_weight;         // (parts, K, kernel_h, kernel_w), or null
  float* partial_bias;           // (parts, K), or null
};

// out[i] = sum over s of partials[s][i], s ascending: the same bits in every run.
struct ReduceParams {
  const void* partials;  // (splits, count), in the kernels' arithmetic type
  void* out;             // (count)
  int64_t count;
  int32_t splits;
};

}  // namespace fused_sepconv
