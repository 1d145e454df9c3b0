// nchw_backward.cuh - all gradients of a depthwise convolution in one pass over x and grad_output, NCHW.
//
//     grad_output --- cp.async --->  bands of planes        x --- cp.async --->  bands of planes (pre_act beside)
//                                       | * mid_act', in place                     |
//                                       | windows                                  | own rows and columns
//                                       '-------------------.----------------------'
//                                                           v  registers, float32
//          weights * window  --->  kRows x 2 of grad_x      |      x * window  --->  taps of grad_weight
//                                     | staged, * pre_act'  '      window      --->  grad_bias
//     grad_x  <--- 16 bytes ----------'                            | at the end, lanes, then warp after warp
//     partial_weight (parts, K, taps), partial_bias (parts, K)  <--'  then reduce_splits
//
// nhwc_backward.cuh in the layout of nchw_forward.cuh: who owns what, and why each pair of x and
// grad_t is counted once, stands there. A band is of rows of x, counted from the first row of padding on.
//
// Normalised: as in nhwc_backward.cuh.
//
// Floor. Device bytes: x + grad_output + grad_x, each once, and the bands' overlap in grad_output; with a
// mid-activation, of whose argument the rows around a band's own are made, in x too.
#pragma once

#include <algorithm>

#include "nchw.cuh"

namespace fused_sepconv {

// What a launch adds to the call: computed once on the host, and read from constant memory.
template <class Traits>
struct NchwBackwardParams {
  DepthwiseBackwardParams call;
  NchwItems<Traits, Traits::kRows> items;  // of x
  NchwItems<Traits, 1> mid_items;          // of the output, for the mid-activation
  int32_t grad_rows, x_rows;               // that come for a band: of grad_output, and of x
  Divisor grad_pieces, x_pieces;           // of a slot for them, or for all there are

  explicit NchwBackwardParams(const DepthwiseBackwardParams& params)
      : call(params),
        items(params.shape, params.planes.rows, params.planes.columns),
        mid_items(params.shape, params.shape.out_h, params.shape.out_w),
        grad_rows((params.planes.rows - 1 + reach(params.shape)) / Traits::kStride + 1),
        x_rows(params.shape.mid_activation == Activation::none
                   ? params.planes.rows  // the band's own, or all under the rows of grad_output
                   : (grad_rows - 1) * Traits::kStride + reach(params.shape) + 1),
        grad_pieces(slot_pieces<Scalar>(std::min(grad_rows, params.shape.out_h) * params.shape.out_w)),
        x_pieces(slot_pieces<Scalar>(std::min(x_rows, params.shape.H) * params.shape.W)) {}

 private:
  using Scalar = typename Traits::Scalar;
  static int reach(const ConvShape& shape) { return (Traits::kKernel - 1) * vertical_pitch<Traits>(shape).taps; }
};

// Adds a block's sums over its lanes and warps, in their order: out(index, total).
template <int count, class Out>
FSC_DEVICE void sum_over_block(float* shared, const float (&sums)[count], const Out& out) {
  const int warp = threadIdx.x / kWarpSize;
  FSC_UNROLL
  for (int i = 0; i < count; ++i) {
    const float sum = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0) shared[warp * count + i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kNchwThreads) {
    float total = 0;
    for (int w = 0; w < kNchwThreads / kWarpSize; ++w) total += shared[w * count + i];
    out(i, total);
  }
  __syncthreads();
}

// Makes grad_t of a unit's rows of grad_output: grad_output * mid_act'(t), in place, with t from the rows of x under
// them, rounded as the forward rounds it. The runs begin at rows grad_row and x_row of the images.
template <class Traits>
FSC_DEVICE void through_mid_activation(const NchwRows<Traits>& grads, const NchwRows<Traits>& x,
                                       const NchwBackwardParams<Traits>& planes,
                                       const float (&weights)[Traits::kTaps][1], float bias, int images, int grad_row,
                                       int x_row) {
  using Scalar = typename Traits::Scalar;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kColumns = Traits::kColumns;
  constexpr int kWindowColumns = (kColumns - 1) * kStride + kKernel;
  const ConvShape& shape = planes.call.shape;
  const NchwPitch down = vertical_pitch<Traits>(shape), across = horizontal_pitch<Traits>(shape);
  const int count = planes.mid_items.over(images, grads.rows);
  FSC_ROLLED
  for (int item = threadIdx.x; item < count; item += Traits::kThreads) {
    const auto [image, row, column] = planes.mid_items.at(item, images);
    const int window_row = (grad_row + row) * kStride - shape.pad_top - x_row;
    const int window_column = column * kStride - shape.pad_left;
    const Scalar* pixels = x.slot(image);
    float t[1][kColumns][1];
    FSC_UNROLL
    for (int c = 0; c < kColumns; ++c) t[0][c][0] = bias;
    add_taps<kKernel, kStride>(t, weights, [&](int a, float (&window)[kWindowColumns][1]) {
      read_window(pixels, x.rows, shape.W, window_row + a * down.taps, window_column, across.taps, window);
    });
    Scalar* gradients = grads.slot(image) + row * shape.out_w + column;
    Values<kColumns> grad, at;
    FSC_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      grad[c] = column + c * across.own < shape.out_w ? convert<float>(gradients[c * across.own]) : 0.0f;
      at[c] = convert<float>(convert<Scalar>(t[0][c][0]));
    }
    differentiate_all(shape.mid_activation, grad, at);
    FSC_UNROLL
    for (int c = 0; c < kColumns; ++c)
      if (column + c * across.own < shape.out_w) gradients[c * across.own] = convert<Scalar>(grad[c]);
  }
}

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_nchw_backward(const FSC_CONST_PARAM NchwBackwardParams<Traits> planes) {
  using Scalar = typename Traits::Scalar;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kReach = Traits::kKernel - 1;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  constexpr int kWindowRows = (kRows - 1 + kReach) / kStride + 1;
  constexpr int kWindowColumns = (kColumns - 1 + kReach) / kStride + 1;
  FSC_SHARED_BYTES(shared);
  const DepthwiseBackwardParams& params = planes.call;
  const ConvShape& shape = params.shape;
  const NchwTiling& tiling = params.planes;
  const NchwPitch down = vertical_pitch<Traits>(shape), across = horizontal_pitch<Traits>(shape);
  const int reach_h = kReach * down.taps, reach_w = kReach * across.taps;  // from the first tap to the last

  const int k = static_cast<int>(blockIdx.x % shape.K);
  const int64_t part = blockIdx.x / shape.K;
  const int64_t begin = part * tiling.units_per_part;
  const int64_t units = plane_units(shape, tiling);
  const int64_t end = begin + tiling.units_per_part < units ? begin + tiling.units_per_part : units;

  float weights[Traits::kTaps][1], weight_sums[Traits::kTaps], bias_sum[1] = {0.0f};
  float affine_sums[2] = {0.0f, 0.0f};  // of dz, and of dz * (x - mean)
  const Scalar* weight = static_cast<const Scalar*>(params.depthwise_weight) + static_cast<int64_t>(k) * Traits::kTaps;
  FSC_UNROLL
  for (int tap = 0; tap < Traits::kTaps; ++tap) {
    weights[tap][0] = convert<float>(weight[tap]);
    weight_sums[tap] = 0;
  }

  const Scalar* biases = static_cast<const Scalar*>(params.depthwise_bias);
  const float bias = biases == nullptr ? 0.0f : convert<float>(biases[k]);
  const float2 affine =
      Traits::kNormalised ? make_float2(params.affine.scale[k], params.affine.shift[k]) : make_float2(1.0f, 0.0f);
  const float mean = Traits::kNormalised ? params.mean[k] : 0.0f;
  const auto add_affine_sums = [&](float dz, float x) {
    affine_sums[0] += dz;
    affine_sums[1] += dz * (x - mean);
  };

  const bool relu = shape.pre_activation == Activation::relu;  // whose result shows its derivative
  const bool beside = Traits::kNormalised || (shape.pre_activation != Activation::none && !relu);
  const bool mid = !Traits::kNormalised && shape.mid_activation != Activation::none;
  const int before = mid ? reach_h : 0;                                               // rows of x before the band's own
  const int grad_bytes = tiling.images * planes.grad_pieces.divisor() * kPieceBytes;  // of the slots of a unit
  const int x_bytes = tiling.images * planes.x_pieces.divisor() * kPieceBytes;
  unsigned char* x_slots = shared + 2 * grad_bytes;
  unsigned char* active_slots = beside ? x_slots + 2 * x_bytes : nullptr;

  const Scalar* x = static_cast<const Scalar*>(params.x.data);
  const Scalar* grad_output = static_cast<const Scalar*>(params.grad_output.data);
  const auto clipped = [](int row, int rows) { return row < 0 ? 0 : row < rows ? row : rows; };
  const auto first_padded = [&](const NchwUnit& unit) { return tiling.first_row + unit.band * tiling.rows; };
  const auto first_of_x = [&](const NchwUnit& unit) {
    return clipped(first_padded(unit) - before - shape.pad_top, shape.H);
  };
  const auto rows_of_x = [&](const NchwUnit& unit, int parity) {
    const int row = first_of_x(unit);
    const int row_end = clipped(first_padded(unit) - before - shape.pad_top + planes.x_rows, shape.H);
    return NchwRows<Traits>{x_slots + parity * x_bytes, planes.x_pieces, x + offset(params.x, unit.n, k, row, 0),
                            params.x.stride_n,          row_end - row,   (row_end - row) * shape.W};
  };
  const auto first_of_grad = [&](const NchwUnit& unit) {
    return clipped((first_padded(unit) - reach_h) / kStride, shape.out_h);
  };
  const auto rows_of_grad = [&](const NchwUnit& unit, int parity) {
    const int row = first_of_grad(unit);
    const int row_end = clipped((first_padded(unit) - reach_h) / kStride + planes.grad_rows, shape.out_h);
    return NchwRows<Traits>{
        shared + parity * grad_bytes, planes.grad_pieces, grad_output + offset(params.grad_output, unit.n, k, row, 0),
        params.grad_output.stride_n,  row_end - row,      (row_end - row) * shape.out_w};
  };

  int parity = 0;
  NchwUnit unit(shape, tiling, begin);
  rows_of_x(unit, parity).copy(unit.images);
  rows_of_grad(unit, parity).copy(unit.images);
  async_copy_commit();
  for (int64_t number = begin; number < end; ++number) {
    const NchwRows<Traits> raw = rows_of_x(unit, parity), grads = rows_of_grad(unit, parity);
    async_copy_wait<0>();
    if (Traits::kNormalised)
      raw.normalise_own(unit.images, shape.pre_activation, affine, active_slots);
    else if (shape.pre_activation != Activation::none)
      raw.activate_own(unit.images, shape.pre_activation, beside ? active_slots : raw.slots);
    __syncthreads();  // the unit is there

    NchwUnit coming = unit;
    coming.advance(shape, tiling);
    if (number + 1 < end) {
      rows_of_x(coming, 1 - parity).copy(coming.images);
      rows_of_grad(coming, 1 - parity).copy(coming.images);
    }
    async_copy_commit();

    // The gradients of x take the place of what was made of it, which has no other reader than their thread.
    NchwRows<Traits> active = raw;
    if (beside) active.slots = active_slots;
    const int padded_row = first_padded(unit), x_row = first_of_x(unit), grad_row = first_of_grad(unit);
    // The band's own rows of x, of the run.
    const int own_begin = clipped(padded_row - shape.pad_top, shape.H) - x_row;
    const int own_end = clipped(padded_row + tiling.rows - shape.pad_top, shape.H) - x_row;
    if (mid) {
      through_mid_activation(grads, active, planes, weights, bias, unit.images, grad_row, x_row);
      __syncthreads();
    }
    const int count = planes.items.over(unit.images, tiling.rows);
    for (int item = threadIdx.x; item < count; item += Traits::kThreads) {
      const auto [image, item_row, item_column] = planes.items.at(item, unit.images);
      const int row = padded_row + item_row, column = tiling.first_column + item_column;  // of x with its padding
      Scalar* pixels = active.slot(image);
      const Scalar* raw_pixels = raw.slot(image);
      const Scalar* gradients = grads.slot(image);
      const int first_h = row - shape.pad_top - x_row, first_w = column - shape.pad_left;
      const auto inside = [&](int r, int c) {
        return static_cast<uint32_t>(first_h + r * down.own - own_begin) < static_cast<uint32_t>(own_end - own_begin) &&
               static_cast<uint32_t>(first_w + c * across.own) < static_cast<uint32_t>(shape.W);
      };
      const auto own = [&](int r, int c) { return (first_h + r * down.own) * shape.W + first_w + c * across.own; };
      float values[kRows][kColumns], grad_x[kRows][kColumns];
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          values[r][c] = inside(r, c) ? convert<float>(pixels[own(r, c)]) : 0.0f;
          grad_x[r][c] = 0;
        }
      }
      FSC_UNROLL
      for (int a = 0; a < kWindowRows; ++a) {
        float window[kWindowColumns][1];
        read_window(gradients, grads.rows, shape.out_w, (row - reach_h) / kStride + a * down.own - grad_row,
                    (column - reach_w) / kStride, across.own, window);
        FSC_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int i = r + kReach - a * kStride;  // the tap under which output row a has x's row r
          if (i < 0 || i >= kKernel) continue;
          FSC_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            FSC_UNROLL
            for (int b = 0; b < kWindowColumns; ++b) {
              const int j = c + kReach - b * kStride;
              if (j < 0 || j >= kKernel) continue;
              grad_x[r][c] += weights[i * kKernel + j][0] * window[b][0];
              weight_sums[i * kKernel + j] += values[r][c] * window[b][0];
            }
          }
        }
        const int owner_row = a * kStride - kReach / 2;  // of the item, by which output row a is counted
        if (owner_row < 0 || owner_row >= kRows) continue;
        FSC_UNROLL
        for (int b = 0; b < kWindowColumns; ++b) {
          const int owner_column = b * kStride - kReach / 2;
          if (owner_column >= 0 && owner_column < kColumns) bias_sum[0] += window[b][0];
        }
      }
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          if (relu) grad_x[r][c] = differentiate(Activation::relu, grad_x[r][c], values[r][c]);
          if (Traits::kNormalised && relu)  // nothing outside the image, where the value is 0
            add_affine_sums(grad_x[r][c], inside(r, c) ? convert<float>(raw_pixels[own(r, c)]) : 0.0f);
          if (inside(r, c)) pixels[own(r, c)] = convert<Scalar>(grad_x[r][c]);
        }
      }
    }
    __syncthreads();
    if (params.grad_x.data != nullptr) {
      if (Traits::kNormalised ? !relu : beside) {
        const int own_count = (own_end - own_begin) * shape.W;
        FSC_ROLLED
        for (int i = threadIdx.x; i < unit.images * own_count; i += Traits::kThreads) {
          const int image = unit.images > 1 ? i / own_count : 0;
          const int element = own_begin * shape.W + i - image * own_count;
          Scalar* grad = active.slot(image) + element;
          const float at = convert<float>(raw.slot(image)[element]);
          const float dz = differentiate(shape.pre_activation, convert<float>(*grad),
                                         Traits::kNormalised ? affine.x * at + affine.y : at);
          if (Traits::kNormalised) add_affine_sums(dz, at);
          *grad = convert<Scalar>(dz);
        }
        __syncthreads();
      }
      Scalar* grad_x = static_cast<Scalar*>(params.grad_x.data) + offset(params.grad_x, unit.n, k, x_row, 0);
      // Which has x's strides, and like x begins at a multiple of 16. A thread stores the pieces that it makes active
      // in the next unit.
      active.store_all(unit.images, grad_x, own_begin * shape.W, own_end * shape.W);
    }
    unit = coming;
    parity = 1 - parity;
  }

  __syncthreads();  // the rows are read, and their memory is free
  float* sums = reinterpret_cast<float*>(shared);
  if (params.partial_weight != nullptr)
    sum_over_block(sums, weight_sums, [&](int tap, float total) {
      params.partial_weight[(part * shape.K + k) * Traits::kTaps + tap] = total;
    });
  if (params.partial_bias != nullptr)
    sum_over_block(sums, bias_sum, [&](int, float total) { params.partial_bias[part * shape.K + k] = total; });
  if (Traits::kNormalised)
    sum_over_block(sums, affine_sums,
                   [&](int i, float total) { params.partial_affine[(2 * part + i) * shape.C + k] = total; });
}

}  // namespace fused_sepconv
