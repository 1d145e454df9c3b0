// nchw_forward.cuh - a depthwise convolution by itself, NCHW.
//
//     x (N, C, H, W) --- cp.async, 16 bytes --->  bands of planes in shared memory (pre_act in place)
//                                                    | kRows x 2 outputs a thread, neighbours across
//                                                    v
//                        weights in registers --->  taps, float32  --->  + bias; staged in shared memory, mid_act
//                                                                           |
//     y (N, K, out_h, out_w)  <--- 16 bytes, single elements at the ends ---'
//
// Who owns what. A block owns one channel of the output and a part of its units: a band of rows of a large image, or
// some small images whole (NchwTiling in params.h). While a unit is computed, the next one is on its way.
//
// Why it is legal. Channels do not mix, and a band needs (k - 1) * dilation + 1 - stride rows of its neighbours, which
// it reads again.
//
// Normalised: act(scale * x + shift) takes the pre-activation's place; around the image windows read zeros as ever.
//
// Floor. Device bytes: x + y, each once, and the bands' overlap. Arithmetic: for 3x3 in 16 bits about 35 instructions a
// thread and output, as every element of a window is a load of its own, and some 10 for the pieces that come and go:
// more than the memory takes.
#pragma once

#include <algorithm>

#include "nchw.cuh"

namespace fused_sepconv {

// What a launch adds to the call: computed once on the host, and read from constant memory.
template <class Traits>
struct NchwForwardParams {
  DepthwiseForwardParams call;
  NchwItems<Traits, Traits::kRows> items;
  Divisor x_pieces, y_pieces;  // of a slot: for the rows under a band, or all, and for a band of the output

  explicit NchwForwardParams(const DepthwiseForwardParams& params)
      : call(params),
        items(params.shape, params.planes.rows, params.shape.out_w),
        x_pieces(slot_pieces<Scalar>(std::min(window_rows(params), params.shape.H) * params.shape.W)),
        y_pieces(slot_pieces<Scalar>(std::min(params.planes.rows, params.shape.out_h) * params.shape.out_w)) {}

 private:
  using Scalar = typename Traits::Scalar;
  static int window_rows(const DepthwiseForwardParams& params) {
    const NchwPitch down = vertical_pitch<Traits>(params.shape);
    return (params.planes.rows - 1) * down.stride + (Traits::kKernel - 1) * down.taps + 1;
  }
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_nchw_forward(const FSC_CONST_PARAM NchwForwardParams<Traits> planes) {
  using Scalar = typename Traits::Scalar;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride;  // the latter in x's window, of a thread
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  constexpr int kWindowColumns = (kColumns - 1) * kStride + kKernel;
  FSC_SHARED_BYTES(shared);
  const DepthwiseForwardParams& params = planes.call;
  const ConvShape& shape = params.shape;
  const NchwTiling& tiling = params.planes;
  const NchwPitch down = vertical_pitch<Traits>(shape), across = horizontal_pitch<Traits>(shape);
  const int height = (kKernel - 1) * down.taps + 1;  // of the window of an output

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
  const float2 affine =
      Traits::kNormalised ? make_float2(params.affine.scale[k], params.affine.shift[k]) : make_float2(1.0f, 0.0f);

  const int slots_bytes = tiling.images * planes.x_pieces.divisor() * kPieceBytes;
  unsigned char* staging = shared + 2 * slots_bytes;

  const Scalar* x = static_cast<const Scalar*>(params.x.data);
  const int channel = Traits::kNormalised ? k : k / shape.multiplier;
  // First and last row of the band's outputs, and of the image under them.
  const auto first_output = [&](const NchwUnit& unit) { return unit.band * tiling.rows; };
  const auto end_output = [&](const NchwUnit& unit) {
    return (unit.band + 1) * tiling.rows < shape.out_h ? (unit.band + 1) * tiling.rows : shape.out_h;
  };
  const auto first_input = [&](const NchwUnit& unit) {
    const int row = first_output(unit) * down.stride - shape.pad_top;
    return row < 0 ? 0 : row < shape.H ? row : shape.H;
  };
  const auto input = [&](const NchwUnit& unit, int parity) {
    const int row = first_input(unit);
    const int below = (end_output(unit) - 1) * down.stride - shape.pad_top + height;
    const int row_end = below < row ? row : below < shape.H ? below : shape.H;
    return NchwRows<Traits>{shared + parity * slots_bytes,
                            planes.x_pieces,
                            x + offset(params.x, unit.n, channel, row, 0),
                            params.x.stride_n,
                            row_end - row,
                            (row_end - row) * shape.W};
  };

  const bool mid = !Traits::kNormalised && shape.mid_activation != Activation::none;
  const bool relu = mid && shape.mid_activation == Activation::relu && params.grad_output.data == nullptr;
  int parity = 0;
  NchwUnit unit(shape, tiling, begin);
  input(unit, parity).copy(unit.images);
  async_copy_commit();
  for (int64_t number = begin; number < end; ++number) {
    const NchwRows<Traits> rows = input(unit, parity);
    async_copy_wait<0>();
    if (Traits::kNormalised)
      rows.normalise_own(unit.images, shape.pre_activation, affine, rows.slots);
    else if (shape.pre_activation != Activation::none)
      rows.activate_own(unit.images, shape.pre_activation, rows.slots);
    __syncthreads();  // the unit is there, and the outputs of the one before it are stored

    NchwUnit coming = unit;
    coming.advance(shape, tiling);
    if (number + 1 < end) input(coming, 1 - parity).copy(coming.images);
    async_copy_commit();

    const int first_row = first_output(unit), end_row = end_output(unit), image_row = first_input(unit);
    Scalar* y = static_cast<Scalar*>(params.y.data) + offset(params.y, unit.n, k, first_row, 0);
    const NchwRows<Traits> out{staging,           planes.y_pieces,     y,
                               params.y.stride_n, end_row - first_row, (end_row - first_row) * shape.out_w};
    const int count = planes.items.over(unit.images, end_row - first_row);
    for (int item = threadIdx.x; item < count; item += Traits::kThreads) {
      const auto [image, row, column] = planes.items.at(item, unit.images);
      const Scalar* pixels = rows.slot(image);
      float sums[kRows][kColumns][1];
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c][0] = bias;
      }
      const int window_row = (first_row + row) * down.stride - shape.pad_top - image_row;
      const int window_column = column * across.stride - shape.pad_left;
      add_taps<kKernel, kStride>(sums, weights, [&](int a, float (&window)[kWindowColumns][1]) {
        read_window(pixels, rows.rows, shape.W, window_row + a * down.taps, window_column, across.taps, window);
      });
      Scalar* staged = out.slot(image) + row * shape.out_w + column;
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          if (relu) sums[r][c][0] = activate(Activation::relu, sums[r][c][0]);
          if (first_row + row + r * down.own < end_row && column + c * across.own < shape.out_w)
            staged[r * down.own * shape.out_w + c * across.own] = convert<Scalar>(sums[r][c][0]);
        }
      }
    }
    __syncthreads();
    if (mid && !relu) {
      FSC_ROLLED
      for (int i = threadIdx.x; i < unit.images * out.count; i += Traits::kThreads) {
        const int image = unit.images > 1 ? i / out.count : 0, element = i - image * out.count;
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
