// depthwise_planes_forward.cuh - a depthwise convolution by itself, NCHW.
//
//     x (N, C, H, W) --- cp.async, 16 bytes --->  bands of planes in shared memory (pre_act in place)
//                                                    | kRows x 2 outputs a thread, neighbours across
//                                                    v
//                        weights in registers --->  taps, float32  --->  + bias; staged in shared memory, mid_act
//                                                                           |
//     y (N, K, out_h, out_w)  <--- 16 bytes, single elements at the ends ---'
//
// Who owns what. A block owns one channel of the output and a part of its units: a band of rows of a large image, or
// some small images whole (PlaneTiling in params.h). While a unit is computed, the next one is on its way.
//
// Why it is legal. Channels do not mix, and a band needs (k - 1) * dilation + 1 - stride rows of its neighbours, which
// it reads again.
//
// Floor. Device bytes: x + y, each once, and the bands' overlap. Arithmetic: for 3x3 about 28 instructions a thread and
// output, as every element of a window is a 16-bit load of its own: about 70 % of the bandwidth.
#pragma once

#include "depthwise_planes.cuh"

namespace fused_sepconv {

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_planes_forward(const FSC_CONST_PARAM DepthwiseForwardParams params) {
  using Scalar = typename Traits::Scalar;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride;  // the latter in x's window, of a thread
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  constexpr int kWindowColumns = (kColumns - 1) * kStride + kKernel;
  FSC_SHARED_BYTES(shared);
  const ConvShape& shape = params.shape;
  const PlaneTiling& tiling = params.planes;
  const PlanePitch down = vertical_pitch<Traits>(shape), across = horizontal_pitch<Traits>(shape);
  const int height = (kKernel - 1) * down.taps + 1;  // of a window of one output

  const int k = static_cast<int>(blockIdx.x % shape.K);
  const int64_t begin = static_cast<int64_t>(blockIdx.x / shape.K) * tiling.units_per_part;
  const int64_t units = plane_units(shape, tiling);
  const int64_t end = begin + tiling.units_per_part < units ? begin + tiling.units_per_part : units;

  float weights[Traits::kTaps][1];
  const Scalar* weight = static_cast<const Scalar*>(params.depthwise_weight) + static_cast<int64_t>(k) * Traits::kTaps;
  FSC_UNROLL
  for (int tap = 0; tap < Traits::kTaps; ++tap) weights[tap][0] = convert<float>(weight[tap]);
  const Scalar* biases = static_cast<const Scalar*>(params.depthwise_bias);
  const float bias = biases == nullptr ? 0.0f : convert<float>(biases[k]);

  // Slots hold a run, what it is off a multiple of 16, and what its last piece is longer.
  const int window = (tiling.rows - 1) * down.stride + height;
  const int in_rows = window < shape.H ? window : shape.H;
  const int in_pitch = slot_bytes<Scalar>(in_rows * shape.W);
  const int out_pitch = slot_bytes<Scalar>((tiling.rows < shape.out_h ? tiling.rows : shape.out_h) * shape.out_w);
  unsigned char* staging = shared + 2 * tiling.images * in_pitch;

  const Scalar* x = static_cast<const Scalar*>(params.x.data);
  // First and last row of the band's outputs, and of the image under them.
  const auto first_output = [&](const PlaneUnit& unit) { return unit.band * tiling.rows; };
  const auto end_output = [&](const PlaneUnit& unit) {
    return (unit.band + 1) * tiling.rows < shape.out_h ? (unit.band + 1) * tiling.rows : shape.out_h;
  };
  const auto first_input = [&](const PlaneUnit& unit) {
    const int row = first_output(unit) * down.stride - shape.pad_top;
    return row < 0 ? 0 : row < shape.H ? row : shape.H;
  };
  const auto input = [&](const PlaneUnit& unit, int parity) {
    const int row = first_input(unit);
    const int below = (end_output(unit) - 1) * down.stride - shape.pad_top + height;
    const int row_end = below < row ? row : below < shape.H ? below : shape.H;
    return PlaneRows<Traits>{shared + parity * tiling.images * in_pitch, in_pitch,
                             x + offset(params.x, unit.n, k / shape.multiplier, row, 0), params.x.stride_n,
                             (row_end - row) * shape.W};
  };

  int parity = 0;
  PlaneUnit unit(shape, tiling, begin);
  input(unit, parity).copy(unit.images, x);
  async_copy_commit();
  for (int64_t number = begin; number < end; ++number) {
    const PlaneRows<Traits> rows = input(unit, parity);
    async_copy_wait<0>();
    if (shape.pre_activation != Activation::none) rows.activate_own(unit.images, shape.pre_activation, rows.slots);
    __syncthreads();  // the unit is there, and the outputs of the one before it are stored

    const PlaneUnit coming(shape, tiling, number + 1);
    if (number + 1 < end) input(coming, 1 - parity).copy(coming.images, x);
    async_copy_commit();

    const int first_row = first_output(unit), end_row = end_output(unit), image_row = first_input(unit);
    Scalar* y = static_cast<Scalar*>(params.y.data) + offset(params.y, unit.n, k, first_row, 0);
    const PlaneRows<Traits> out{staging, out_pitch, y, params.y.stride_n, (end_row - first_row) * shape.out_w};
    const int in_image_rows = rows.count / shape.W;
    const int item_columns = items_over<kColumns>(shape.out_w, across.own);
    const int item_rows = items_over<kRows>(end_row - first_row, down.own);
    for (int item = threadIdx.x; item < unit.images * item_rows * item_columns; item += Traits::kThreads) {
      const int column = item_begin<kColumns>(item % item_columns, across.own);
      const int row = item_begin<kRows>(item / item_columns % item_rows, down.own);
      const int image = item / item_columns / item_rows;
      const Scalar* pixels = rows.slot(image);
      float sums[kRows][kColumns][1];
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c][0] = bias;
      }
      add_taps<kKernel, kStride>(sums, weights, [&](int a, float (&window)[kWindowColumns][1]) {
        read_window(pixels, in_image_rows, shape.W,
                    (first_row + row) * down.stride - shape.pad_top + a * down.taps - image_row,
                    column * across.stride - shape.pad_left, across.taps, window);
      });
      Scalar* staged = out.slot(image) + row * shape.out_w + column;
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c)
          if (first_row + row + r * down.own < end_row && column + c * across.own < shape.out_w)
            staged[r * down.own * shape.out_w + c * across.own] = convert<Scalar>(sums[r][c][0]);
      }
    }
    __syncthreads();
    if (shape.mid_activation != Activation::none) {
      FSC_ROLLED
      for (int i = threadIdx.x; i < unit.images * out.count; i += Traits::kThreads) {
        const int image = i / out.count, element = i % out.count;
        Scalar* staged = out.slot(image) + element;
        const float t = convert<float>(*staged);
        if (params.grad_output.data == nullptr) {
          *staged = convert<Scalar>(activate(shape.mid_activation, t));
          continue;
        }
        const Scalar* grad =
            static_cast<const Scalar*>(params.grad_output.data) +
            offset(params.grad_output, unit.n + image, k, first_row + element / shape.out_w, element % shape.out_w);
        *staged = convert<Scalar>(differentiate(shape.mid_activation, convert<float>(*grad), t));
      }
      __syncthreads();
    }
    out.store_all(unit.images, y, 0, out.count);
    unit = coming;
    parity = 1 - parity;
  }
}

}  // namespace fused_sepconv
