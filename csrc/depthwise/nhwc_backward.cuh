// nhwc_backward.cuh - all gradients of a depthwise convolution in one pass over x and grad_output, NHWC.
//
//     grad_output --- cp.async --->  ring of rows          x --- cp.async --->  ring of rows (pre_act beside)
//                                       | * mid_act', in place             |
//                                       | windows                          | own columns
//                                       '----------------.-----------------'
//                                                        v  registers, float32
//        weights * window  --->  kRows x 4 of grad_x     |      x * window  --->  taps of grad_weight
//                                   | * pre_act'         '      window      --->  grad_bias
//     grad_x  <--- 16 bytes a lane -'                                | at the end, warp after warp
//     partial_weight (parts, K, taps), partial_bias (parts, K)  <----'  then reduce_splits
//
// The forward's twin: the same chunks, strips, groups, parts and ring, with rows and columns of x in the place of the
// output's. A thread owns 4 columns x kRows rows of x; every grad_t value that it reads serves both sums.
//
// Why it is legal. grad_x[h] gathers the outputs oh with s * oh - pad + d * i = h, grad_weight[i] sums x[h] *
// grad_t[oh] over the same pairs, and each pair has one h: whoever owns that pixel of x adds it, so no two threads
// write one sum. In phase r of d, row rho of x is h = s * r - pad + d * rho, and output q = (rho - i) / s. The bias's
// gradient is added where s * q + (k - 1) / 2 is an owned row: strips begin and end where both the image and these
// owners do. Stride and dilation without a common factor put every row of x in one phase.
//
// Where there is a mid-activation, grad_t = grad_output * mid_act'(t) is made of each row of grad_output as it arrives,
// with t = depthwise(pre_act(x)) + bias computed again: the ring of x then has all rows under the window of grad_t.
//
// Normalised: z = scale * x + shift, and the ring beside x's has act(z), from which grad_weight is summed, 0 outside
// the image. What goes out is dz = grad of act(z) * act'(z), and its sums, of dz and of dz * (x - mean), are a thread's
// like those of the taps: the same partial sums in the same order. x - mean is taken first: x may lie far from zero.
//
// Floor. Device bytes: x + grad_output + grad_x, each once, and the windows' overlap where parts and tiles meet.
// Arithmetic: two multiply-adds a tap: for 3x3 in bfloat16 about 36 instructions of a lane an element (18 of them
// multiply-adds), 40 with relu before it, where an H200's SMs can issue 41 in the time of the bytes.
#pragma once

#include "nhwc.cuh"

namespace fused_sepconv {

// The window of grad_t that lies under a group, in rows of grad_t; what the next group adds; slots of the ring.
template <class Traits>
struct DepthwiseBackwardWindow {
  static constexpr int kReach = Traits::kKernel - 1;
  static constexpr int kRows = (Traits::kRows - 1 + kReach) / Traits::kStride + 1;
  static constexpr int kColumns = (Traits::kColumns - 1 + kReach) / Traits::kStride + 1;
  static constexpr int kNewRows = Traits::kRows / Traits::kStride;
  static constexpr int kCapacity = 2 * kRows;
  static FSC_HOST_DEVICE int columns_of(int warps) {
    return (warps * Traits::kColumns - 1 + kReach) / Traits::kStride + 1;
  }
  // Rows and columns of x under it, of which the mid-activation's argument is made; without one, the group's own.
  static FSC_HOST_DEVICE int x_rows(bool mid) {
    return mid ? (kRows - 1) * Traits::kStride + Traits::kKernel : Traits::kRows;
  }
  static FSC_HOST_DEVICE int x_columns(int warps, bool mid) {
    return mid ? (columns_of(warps) - 1) * Traits::kStride + Traits::kKernel : warps * Traits::kColumns;
  }
};

// Adds a block's sums, one a thread and index, over its warps in their order: out(index, channel) takes the total. The
// block's shared memory holds them meanwhile.
template <class Traits, int count, class Out>
FSC_DEVICE void sum_over_warps(float* shared, const float (&sums)[count][Traits::kChannels], const Out& out) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  FSC_UNROLL
  for (int i = 0; i < count; ++i) {
    FSC_UNROLL
    for (int v = 0; v < Traits::kChannels; ++v)
      shared[((warp * count + i) * Traits::kChannels + v) * kWarpSize + lane] = sums[i][v];
  }
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  for (int index = threadIdx.x; index < count * Traits::kChunk; index += blockDim.x) {
    float total = 0;
    for (int w = 0; w < warps; ++w) total += shared[w * count * Traits::kChunk + index];
    const int v = index / kWarpSize % Traits::kChannels;
    out(index / Traits::kChunk, index % kWarpSize * Traits::kChannels + v, total);
  }
  __syncthreads();
}

// Adds to the sums of dz, and of dz * (x - mean).
template <int kChannels>
FSC_DEVICE void add_affine_sums(float (&sums)[2][kChannels], const float (&dz)[kChannels], const float (&x)[kChannels],
                                const float (&mean)[kChannels]) {
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    sums[0][v] += dz[v];
    sums[1][v] += dz[v] * (x[v] - mean[v]);
  }
}

// Which pixels of kRows x kColumns from a row and column on are in the image, row after row: a bit each.
template <int kRows, int kColumns>
FSC_DEVICE uint32_t pixels_inside(const PhaseAxis& vertical, const PhaseAxis& horizontal, int32_t row, int32_t column) {
  static_assert(kRows * kColumns <= 32, "bits of a word");
  uint32_t bits = 0;
  FSC_UNROLL
  for (int i = 0; i < kRows * kColumns; ++i) {
    const bool inside = vertical.inside(row + i / kColumns) && horizontal.inside(column + i % kColumns);
    bits |= inside ? 1u << i : 0u;
  }
  return bits;
}

// Makes grad_t of the rows of grad_output that have arrived: grad_output * mid_act'(t), in place, with t from the
// window of x under them, rounded as the forward rounds it. Warps take columns in turn. Past the ends of the output
// zeros stay.
template <class Traits>
FSC_DEVICE void through_mid_activation(const RowRing<Traits>& ring, const RowRing<Traits>& x,
                                       const DepthwiseBackwardParams& params,
                                       const float (&weights)[Traits::kTaps][Traits::kChannels], int first_channel,
                                       const DepthwiseGroup& group, int top, int x_top, int arrived) {
  using Scalar = typename Traits::Scalar;
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  using Window = DepthwiseBackwardWindow<Traits>;
  constexpr int kChannels = Traits::kChannels, kStride = Traits::kStride;
  constexpr int kRows = 2 / kStride;  // at a time: of the window's rows and of what a group adds, a divisor
  static_assert(Window::kRows % kRows == 0 && Window::kNewRows % kRows == 0, "whole turns");
  const ConvShape& shape = params.shape;
  const NhwcTiling& tiling = params.tiling;
  const int lane = threadIdx.x % kWarpSize;
  const PhaseAxis vertical = output_rows(shape, tiling, group), horizontal = output_columns(shape, tiling, group);
  const int first_row = (tiling.first_row + group.group * Traits::kRows - Window::kReach) / kStride;
  const int first_column = (tiling.first_column + group.tile * tiling.tile_columns - Window::kReach) / kStride;

  float bias[kChannels];
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    const int k = first_channel + lane * kChannels + v;
    const Scalar* biases = static_cast<const Scalar*>(params.depthwise_bias);
    bias[v] = biases == nullptr || k >= shape.K ? 0.0f : convert<float>(biases[k]);
  }
  FSC_ROLLED
  for (int a = Window::kRows - arrived; a < Window::kRows; a += kRows) {
    FSC_ROLLED
    for (int b = threadIdx.x / kWarpSize; b < ring.columns; b += blockDim.x / kWarpSize) {
      if (!horizontal.inside(first_column + b)) continue;
      float t[kRows][1][kChannels];
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) t[r][0][v] = bias[v];
      }
      add_taps<Traits::kKernel, kStride>(t, weights, [&](int row, float (&window)[Traits::kKernel][kChannels]) {
        const unsigned char* pixels = x.pixel(x.after(x_top, a * kStride + row), b * kStride);
        FSC_UNROLL
        for (int j = 0; j < Traits::kKernel; ++j)
          Lane::unpack(reinterpret_cast<const Word*>(pixels + j * Traits::kPixelBytes)[lane], window[j]);
      });
      Values<kRows * kChannels> grad, at;
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float values[kChannels];
        Lane::unpack(reinterpret_cast<const Word*>(ring.pixel(ring.after(top, a + r), b))[lane], values);
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) {
          grad[r * kChannels + v] = values[v];
          at[r * kChannels + v] = convert<float>(convert<Scalar>(t[r][0][v]));
        }
      }
      differentiate_all(shape.mid_activation, grad, at);
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (!vertical.inside(first_row + a + r)) continue;
        float values[kChannels];
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) values[v] = grad[r * kChannels + v];
        reinterpret_cast<Word*>(ring.pixel(ring.after(top, a + r), b))[lane] = Lane::pack(values);
      }
    }
  }
}

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_nhwc_backward(const FSC_CONST_PARAM DepthwiseBackwardParams params) {
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  using Window = DepthwiseBackwardWindow<Traits>;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kRows = Traits::kRows;
  constexpr int kColumns = Traits::kColumns, kChannels = Traits::kChannels, kReach = Window::kReach;
  FSC_SHARED_BYTES(shared);
  const ConvShape& shape = params.shape;
  const NhwcTiling& tiling = params.tiling;

  const int chunks = (shape.K + Traits::kChunk - 1) / Traits::kChunk;
  const int first_channel = static_cast<int>(blockIdx.x % chunks) * Traits::kChunk;
  const int64_t part = blockIdx.x / chunks;
  const int64_t begin = part * tiling.groups_per_part;
  const int64_t groups = depthwise_groups(shape, tiling);
  const int64_t end = begin + tiling.groups_per_part < groups ? begin + tiling.groups_per_part : groups;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int channels = shape.K - first_channel;  // from the chunk's first on

  float weights[Traits::kTaps][kChannels];
  load_weights<Traits>(params.depthwise_weight, first_channel, shape.K, shared, weights);

  // Rows of grad_output; rows of x, two windows of them, and as many of what the pre-activation makes of them: relu's
  // result shows its derivative, and takes their place.
  const int warps = tiling.warps;
  const bool relu = shape.pre_activation == Activation::relu;
  const bool beside = Traits::kNormalised || (shape.pre_activation != Activation::none && !relu);
  const bool mid = !Traits::kNormalised && shape.mid_activation != Activation::none;
  const int x_window = Window::x_rows(mid);  // rows of x
  const int before = mid ? kReach : 0;       // of them, those before the group's own; columns likewise
  const RowRing<Traits> ring(shared, Window::columns_of(warps), Window::kCapacity);
  const RowRing<Traits> raw(shared + ring.size, Window::x_columns(warps, mid), 2 * x_window);
  const RowRing<Traits> active(beside ? raw.bytes + raw.size : raw.bytes, raw.columns, 2 * x_window);

  const Prologue<Traits> prologue(params.affine, shape.pre_activation, first_channel, channels,
                                  active.bytes + active.size);
  float mean[kChannels];
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v)
    mean[v] =
        Traits::kNormalised && lane * kChannels < channels ? params.mean[first_channel + lane * kChannels + v] : 0;

  DepthwiseGroup group(tiling, begin);
  RowCopies<Traits> grads(params.grad_output, params.grad_output_steps, output_rows(shape, tiling, group),
                          output_columns(shape, tiling, group), first_channel, channels);
  RowCopies<Traits> inputs(params.x, params.x_steps, input_rows(shape, group), input_columns(shape, group),
                           first_channel, channels);
  RowStores<Traits> outputs(params.grad_x, params.grad_x_steps, input_rows(shape, group), input_columns(shape, group),
                            first_channel, channels);
  const auto first_row = [&] { return tiling.first_row + group.group * kRows; };
  const auto first_column = [&] { return tiling.first_column + group.tile * tiling.tile_columns; };
  const auto start_copies = [&] {
    const int output_column = (first_column() - kReach) / kStride, column = first_column() - before;
    grads.start(group.n, output_rows(shape, tiling, group), output_columns(shape, tiling, group),
                (first_row() - kReach) / kStride, output_column, output_column + ring.columns);
    inputs.start(group.n, input_rows(shape, group), input_columns(shape, group), first_row() - before, column,
                 column + raw.columns);
  };
  const auto start_stores = [&] {
    const int column = first_column() + warp * kColumns;
    outputs.start(group.n, input_rows(shape, group), input_columns(shape, group), first_row(), column,
                  column + kColumns);
  };

  float weight_sums[kKernel][kKernel][kChannels], bias_sums[1][kChannels];
  float affine_sums[2][kChannels];  // of dz, and of dz * (x - mean)
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    bias_sums[0][v] = affine_sums[0][v] = affine_sums[1][v] = 0;
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap) weight_sums[tap / kKernel][tap % kKernel][v] = 0;
  }

  int top = 0, x_top = 0;  // where the group's windows of grad_output and x begin
  bool whole = true;       // whether all their rows have come, or those that the group before did not have
  start_copies();
  start_stores();
  grads.bring_first(ring, top, Window::kRows);
  inputs.bring_first(raw, x_top, x_window);
  async_copy_commit();
  for (int32_t left = static_cast<int32_t>(end - begin); left > 0; --left) {
    async_copy_wait<0>();
    uint32_t own_inside = 0;  // of the thread's pixels, a bit each
    if (Traits::kNormalised) {
      const PhaseAxis vertical = input_rows(shape, group), horizontal = input_columns(shape, group);
      prologue.apply(raw, x_top, kRows, vertical, horizontal, first_row(), first_column(),
                     static_cast<int32_t>(active.bytes - raw.bytes));
      if (!relu)
        own_inside =
            pixels_inside<kRows, kColumns>(vertical, horizontal, first_row(), first_column() + warp * kColumns);
    } else if (shape.pre_activation != Activation::none) {
      const int arrived = whole ? x_window : kRows;
      raw.for_each_own_piece(raw.after(x_top, x_window - arrived), arrived, [&](unsigned char* from) {
        activate_piece<Traits>(shape.pre_activation, from, active.bytes + (from - raw.bytes));
      });
    }
    __syncthreads();  // the windows are there, and the ones before them are read
    if (mid) {
      through_mid_activation(ring, active, params, weights, first_channel, group, top, x_top,
                             whole ? Window::kRows : Window::kNewRows);
      __syncthreads();
    }

    // The next rows come below the windows. All of a window's at a strip's start, and else those that it moves on by.
    const int bottom = ring.after(top, Window::kRows), x_bottom = raw.after(x_top, x_window);
    whole = false;
    if (left > 1) {
      group.advance(tiling);
      whole = group.group == 0;
      if (whole) {
        start_copies();
        grads.bring_first(ring, bottom, Window::kRows);
        inputs.bring_first(raw, x_bottom, x_window);
      } else {
        grads.template bring<Window::kNewRows>(ring, bottom);
        inputs.template bring<kRows>(raw, x_bottom);
      }
    }
    async_copy_commit();

    const auto own_words = [&](const RowRing<Traits>& of, int row, int column) {
      return reinterpret_cast<Word*>(of.pixel(of.after(x_top, before + row), before + warp * kColumns + column));
    };
    float x[kRows][kColumns][kChannels], grad_x[kRows][kColumns][kChannels];
    FSC_UNROLL
    for (int a = 0; a < Window::kRows; ++a) {
      const unsigned char* pixels = ring.pixel(ring.after(top, a), warp * kColumns / kStride);
      float window[Window::kColumns][kChannels];
      FSC_UNROLL
      for (int b = 0; b < Window::kColumns; ++b)
        Lane::unpack(reinterpret_cast<const Word*>(pixels + b * Traits::kPixelBytes)[lane], window[b]);
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if ((r + kStride - 1) / kStride != a) continue;  // the first output row that has x's row r
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          Lane::unpack(own_words(active, r, c)[lane], x[r][c]);
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v) grad_x[r][c][v] = 0;
        }
      }
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int i = r + kReach - a * kStride;  // the tap under which output row a has x's row r
        if (i < 0 || i >= kKernel) continue;
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          FSC_UNROLL
          for (int b = 0; b < Window::kColumns; ++b) {
            const int j = c + kReach - b * kStride;
            if (j < 0 || j >= kKernel) continue;
            FSC_UNROLL
            for (int v = 0; v < kChannels; ++v) {
              grad_x[r][c][v] += weights[i * kKernel + j][v] * window[b][v];
              weight_sums[i][j][v] += x[r][c][v] * window[b][v];
            }
          }
        }
      }
      // A thread's own words of x have no other reader: its gradients go out through their place.
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if ((r + kReach) / kStride != a) continue;  // the last output row that has it
        if (relu) {
          FSC_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            FSC_UNROLL
            for (int v = 0; v < kChannels; ++v)
              grad_x[r][c][v] = differentiate(Activation::relu, grad_x[r][c][v], x[r][c][v]);
            if (!Traits::kNormalised) continue;
            float at[kChannels];
            Lane::unpack(own_words(raw, r, c)[lane], at);
            add_affine_sums(affine_sums, grad_x[r][c], at, mean);  // nothing outside the image, where x[r][c] is 0
          }
        }
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c) own_words(active, r, c)[lane] = Lane::pack(grad_x[r][c]);
      }
      const int owner_row = a * kStride - kReach / 2;  // of the group, by which output row a is counted
      if (owner_row < 0 || owner_row >= kRows) continue;
      if (params.partial_bias == nullptr) continue;
      FSC_UNROLL
      for (int b = 0; b < Window::kColumns; ++b) {
        const int owner_column = b * kStride - kReach / 2;
        if (owner_column < 0 || owner_column >= kColumns) continue;
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) bias_sums[0][v] += window[b][v];
      }
    }

    if (params.grad_x.data != nullptr) {
      if (Traits::kNormalised ? !relu : beside) {
        FSC_ROLLED
        for (int pixel = 0; pixel < kRows * kColumns; ++pixel) {
          Word* word = own_words(active, pixel / kColumns, pixel % kColumns) + lane;
          float grad[kChannels], at[kChannels];
          Lane::unpack(*word, grad);
          Lane::unpack(own_words(raw, pixel / kColumns, pixel % kColumns)[lane], at);
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v) {
            const float z = Traits::kNormalised ? prologue.argument(lane * kChannels + v, at[v]) : at[v];
            grad[v] = differentiate(shape.pre_activation, grad[v], z);
          }
          if (own_inside >> pixel & 1) add_affine_sums(affine_sums, grad, at, mean);
          *word = Lane::pack(grad);
        }
      }
      __syncwarp();
      outputs.store([&](int row, int column) { return own_words(active, row, column); });
    }
    if (whole) start_stores();
    top = whole ? bottom : ring.after(top, Window::kNewRows);
    x_top = whole ? x_bottom : raw.after(x_top, kRows);
  }

  __syncthreads();  // the rows are read, and their memory is free
  float* sums = reinterpret_cast<float*>(shared);
  if (params.partial_weight != nullptr) {
    FSC_UNROLL
    for (int i = 0; i < kKernel; ++i)
      sum_over_warps<Traits>(sums, weight_sums[i], [&](int j, int channel, float total) {
        if (channel < channels)
          params.partial_weight[(part * shape.K + first_channel + channel) * Traits::kTaps + i * kKernel + j] = total;
      });
  }
  if (params.partial_bias != nullptr)
    sum_over_warps<Traits>(sums, bias_sums, [&](int, int channel, float total) {
      if (channel < channels) params.partial_bias[part * shape.K + first_channel + channel] = total;
    });
  if (Traits::kNormalised)
    sum_over_warps<Traits>(sums, affine_sums, [&](int i, int channel, float total) {
      if (channel < channels) params.partial_affine[(2 * part + i) * shape.C + first_channel + channel] = total;
    });
}

}  // namespace fused_sepconv
