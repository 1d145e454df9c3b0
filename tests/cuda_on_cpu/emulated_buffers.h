// emulated_buffers.h - the tensors of a call, as the buffers that the emulator lets its kernels touch.
#pragma once

#include <cstdint>

#include "../../csrc/common/instance.h"
#include "../../csrc/params.h"
#include "emulator.h"

namespace fused_sepconv {

// Lives as long as the call. Names are those of params.h; the checked build's reports and byte counters use them.
class EmulatedBuffers {
 public:
  EmulatedBuffers(const Instance& instance, const ForwardParams& params) : instance_(instance) {
    const ConvShape& shape = params.shape;
    read_operands(params);
    read("bias", params.bias, shape.F);
    read("residual", params.residual.data, output_extent(params.residual, shape, shape.F));
    read("grad_output", params.grad_output.data, output_extent(params.grad_output, shape, shape.F));
    write("y", params.y.data, output_extent(params.y, shape, shape.F) * instance.scalar_bytes);
  }

  EmulatedBuffers(const BackwardInstance& instance, const BackwardParams& params) : instance_(instance) {
    const ConvShape& shape = params.shape;
    read_operands(params);
    read("grad_z", params.grad_z.data, output_extent(params.grad_z, shape, shape.F));
    const int64_t grad_t = output_extent(params.grad_t, shape, shape.K);
    if (instance.step == BackwardStep::intermediate)
      write("grad_t", params.grad_t.data, grad_t * instance.scalar_bytes);
    else
      read("grad_t", params.grad_t.data, grad_t);
    write("grad_x", params.grad_x.data, input_extent(params.grad_x, shape) * instance.scalar_bytes);
    const bool depthwise = instance.step == BackwardStep::depthwise_weight;
    const int64_t rows = int64_t{params.splits} * (depthwise ? shape.K : shape.F);
    const int64_t columns = depthwise ? shape.kernel_h * shape.kernel_w : shape.K;
    write("partial_weight", params.partial_weight, rows * columns * instance.compute_bytes);
    write("partial_bias", params.partial_bias, rows * instance.compute_bytes);
  }

  EmulatedBuffers(const Instance& instance, const DepthwiseForwardParams& params) : instance_(instance) {
    const ConvShape& shape = params.shape;
    read_depthwise_operands(params);
    read("depthwise_bias", params.depthwise_bias, shape.K);
    read("grad_output", params.grad_output.data, output_extent(params.grad_output, shape, shape.K));
    read_affine("scale", "shift", params.affine, shape.C);
    write("y", params.y.data, output_extent(params.y, shape, shape.K) * instance.scalar_bytes);
  }

  EmulatedBuffers(const Instance& instance, const DepthwiseBackwardParams& params) : instance_(instance) {
    const ConvShape& shape = params.shape;
    read_depthwise_operands(params);
    read("depthwise_bias", params.depthwise_bias, shape.K);
    read("grad_output", params.grad_output.data, output_extent(params.grad_output, shape, shape.K));
    write("grad_x", params.grad_x.data, input_extent(params.grad_x, shape) * instance.scalar_bytes);
    read_affine("scale", "shift", params.affine, shape.C);
    read_floats("mean", params.mean, shape.C);
    const int64_t parts = params.tiling.parts + params.planes.parts;  // one of the two is 0
    write("partial_affine", params.partial_affine, parts * 2 * shape.C * instance.compute_bytes);
    const int64_t rows = parts * shape.K;
    write("partial_weight", params.partial_weight, rows * shape.kernel_h * shape.kernel_w * instance.compute_bytes);
    write("partial_bias", params.partial_bias, rows * instance.compute_bytes);
  }

  EmulatedBuffers(const Instance& instance, const MmaInputParams& params) : instance_(instance) {
    const ConvShape& shape = params.shape;
    read_depthwise_operands(params);
    read("pointwise_weight", params.pointwise_weight, int64_t{shape.F} * shape.K);
    read("grad_z", params.grad_z.data, output_extent(params.grad_z, shape, shape.F));
    write("grad_x", params.grad_x, input_extent(params.x, shape) * instance.scalar_bytes);
    const int64_t rows = int64_t{params.tiling.parts} * shape.K;
    write("partial_weight", params.partial_weight, rows * shape.kernel_h * shape.kernel_w * instance.compute_bytes);
    write("partial_bias", params.partial_bias, rows * instance.compute_bytes);
  }

  EmulatedBuffers(const Instance& instance, const NormAddParams& params) : instance_(instance) {
    const int64_t elements = params.pixels * params.C;
    read("x", params.x, elements);
    read_affine("scale", "shift", params.affine, params.C);
    read("other", params.other, elements);
    read_affine("other_scale", "other_shift", params.other_affine, params.C);
    write("y", params.y, elements * instance.scalar_bytes);
  }

  EmulatedBuffers(const Instance& instance, const NormPoolParams& params) : instance_(instance) {
    read("x", params.x, pixels(params.shape) * params.shape.C);
    read_affine("scale", "shift", params.affine, params.shape.C);
    write("picked", params.picked, pooled(params.shape) * instance.scalar_bytes);
    write("index", params.index, pooled(params.shape));
  }

  EmulatedBuffers(const Instance& instance, const NormPoolBackwardParams& params) : instance_(instance) {
    const PoolShape& shape = params.shape;
    read("grad", params.grad, pooled(shape));
    scope_.input("index", params.index, pooled(shape));
    read("x", params.x, pixels(shape) * shape.C);
    read_floats("factor", params.factor, shape.C);
    read_floats("mean", params.mean, shape.C);
    read_floats("mean_g", params.mean_g, shape.C);
    read_floats("slope", params.slope, shape.C);
    write("grad_x", params.grad_x, pixels(shape) * shape.C * instance.scalar_bytes);
  }

  EmulatedBuffers(const Instance& instance, const ReduceParams& params) : instance_(instance) {
    scope_.input("partials", params.partials, params.splits * params.count * instance.compute_bytes);
    write("out", params.out, params.count * instance.scalar_bytes);
  }

 private:
  template <class Params>
  void read_depthwise_operands(const Params& params) {
    const ConvShape& shape = params.shape;
    read("x", params.x.data, input_extent(params.x, shape));
    read("depthwise_weight", params.depthwise_weight, int64_t{shape.K} * shape.kernel_h * shape.kernel_w);
  }

  void read_affine(const char* scale, const char* shift, const Affine& affine, int64_t channels) {
    read_floats(scale, affine.scale, channels);
    read_floats(shift, affine.shift, channels);
  }

  static int64_t pixels(const PoolShape& shape) { return shape.N * shape.H * shape.W; }
  // Elements of the result.
  static int64_t pooled(const PoolShape& shape) { return shape.N * shape.out_h * shape.out_w * shape.C; }

  template <class Params>
  void read_operands(const Params& params) {
    const ConvShape& shape = params.shape;
    read_depthwise_operands(params);
    read("pointwise_weight", params.pointwise_weight, int64_t{shape.F} * shape.K);
    read("depthwise_bias", params.depthwise_bias, shape.K);
  }

  // Elements from an image's first to its last, whatever its strides.
  static int64_t extent(const Image& image, int64_t n, int64_t c, int64_t h, int64_t w) {
    return (n - 1) * image.stride_n + (c - 1) * image.stride_c + (h - 1) * image.stride_h + (w - 1) * image.stride_w +
           1;
  }
  static int64_t input_extent(const Image& image, const ConvShape& shape) {
    return extent(image, shape.N, shape.C, shape.H, shape.W);
  }
  static int64_t output_extent(const Image& image, const ConvShape& shape, int64_t channels) {
    return extent(image, shape.N, channels, shape.out_h, shape.out_w);
  }

  void read(const char* name, const void* data, int64_t elements) {
    if (data != nullptr) scope_.input(name, data, elements * instance_.scalar_bytes);
  }
  void read_floats(const char* name, const float* data, int64_t count) {
    if (data != nullptr) scope_.input(name, data, count * sizeof(float));
  }
  void write(const char* name, void* data, int64_t bytes) {
    if (data != nullptr) scope_.output(name, data, bytes);
  }

  const Instance& instance_;
  emulator::BufferScope scope_;
};

}  // namespace fused_sepconv
