// depthwise_backward.cuh - all gradients of a depthwise convolution in one pass over x and grad_t, NHWC.
//
//     grad_t (N, K, out_h, out_w) --- cp.async --->  ring of rows   x (N, C, H, W) --- cp.async --->  rows (pre_act
//     beside)
//                                                       | windows                                       | own columns
//                                                       '-----------------------.-----------------------'
//                                                                               v  registers, float32
//                              weights * window  --->  kRows x 4 of grad_x      |      x * window  --->  taps of
//                              grad_weight
//                                                       | * pre_act'            '      window      --->  grad_bias
//     grad_x (N, C, H, W)  <--- 16 bytes a lane --------'                                   | at the end, warp after
//     warp partial_weight (parts, K, taps), partial_bias (parts, K)  <---------------------------'  then reduce_splits
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
// Floor. Device bytes: x + grad_t + grad_x, each once, and grad_t's overlap where parts and tiles meet. Arithmetic: two
// multiply-adds a tap: for 3x3 in bfloat16 about 53 instructions of a lane an element (18 of them multiply-adds), where
// an H200's SMs can issue 41 in the time of the bytes.
#pragma once

#include "depthwise_strips.cuh"

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

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_backward(const FSC_CONST_PARAM DepthwiseBackwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  using Window = DepthwiseBackwardWindow<Traits>;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kRows = Traits::kRows;
  constexpr int kColumns = Traits::kColumns, kChannels = Traits::kChannels, kReach = Window::kReach;
  FSC_SHARED_BYTES(shared);
  const ConvShape& shape = params.shape;
  const DepthwiseTiling& tiling = params.tiling;

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
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    const int k = first_channel + lane * kChannels + v < shape.K ? first_channel + lane * kChannels + v : 0;
    const Scalar* weight =
        static_cast<const Scalar*>(params.depthwise_weight) + static_cast<int64_t>(k) * Traits::kTaps;
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap) weights[tap][v] = convert<float>(weight[tap]);
  }

  // Rows of grad_t; rows of x, two groups of them; and where there is a pre-activation, as many of what it makes of x.
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const bool activates = shape.pre_activation != Activation::none;
  const RowRing<Traits> ring{shared, Window::columns_of(warps), Window::kCapacity};
  const RowRing<Traits> raw{ring.pixel(Window::kCapacity, 0), warps * kColumns, 2 * kRows};
  const RowRing<Traits> active{activates ? raw.pixel(2 * kRows, 0) : raw.bytes, raw.columns, raw.capacity};

  // Brings the rows of x of a group, and those that it adds to grad_t's; at a strip's or part's start, all its window.
  const auto bring = [&](const DepthwiseGroup& group, bool whole, int slot, int x_slot) {
    const int row = tiling.first_row + group.group * kRows;
    const int column = tiling.first_column + group.tile * tiling.tile_columns;
    const PhaseAxis vertical{shape.stride_h * group.phase_h - shape.pad_top, shape.dilation_h, shape.H};
    const PhaseAxis horizontal{shape.stride_w * group.phase_w - shape.pad_left, shape.dilation_w, shape.W};
    copy_rows(raw, x_slot, kRows, params.x, group.n, first_channel, channels, vertical, horizontal, row, column,
              column + tiling.tile_columns);
    const PhaseAxis output_vertical{group.phase_h, tiling.phases_h, shape.out_h};
    const PhaseAxis output_horizontal{group.phase_w, tiling.phases_w, shape.out_w};
    const int rows = whole ? Window::kRows : Window::kNewRows;
    const int output_row = (row - kReach) / kStride + Window::kRows - rows;
    const int output_column = (column - kReach) / kStride;
    copy_rows(ring, slot, rows, params.grad_t, group.n, first_channel, channels, output_vertical, output_horizontal,
              output_row, output_column, output_column + ring.columns);
    return rows;
  };

  float weight_sums[kKernel][kKernel][kChannels], bias_sums[1][kChannels];
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    bias_sums[0][v] = 0;
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap) weight_sums[tap / kKernel][tap % kKernel][v] = 0;
  }

  DepthwiseGroup current(tiling, begin), coming = current;
  int slot = 0;      // where the current group's window of grad_t begins
  int arriving = 0;  // where the rows begin that were asked for last
  int x_slot = 0;    // where the current group's rows of x begin
  int rows = bring(coming, true, arriving, x_slot);
  async_copy_commit();
  for (int64_t number = begin; number < end; ++number) {
    async_copy_wait<0>();
    if (activates)
      raw.for_each_own_piece(x_slot, kRows, [&](int row, int column, int piece, unsigned char* from) {
        Word* to = reinterpret_cast<Word*>(active.pixel(x_slot + row, column) + piece * kPieceBytes);
        activate_words<Traits>(shape.pre_activation, reinterpret_cast<const Word*>(from), to,
                               kPieceBytes / sizeof(Word));
      });
    __syncthreads();  // the window is there, and the one before it is read

    int next_slot = 0;
    arriving = ring.wrapped(arriving + rows);
    if (number + 1 < end) {
      coming.advance(tiling);
      const bool whole = coming.group == 0;
      next_slot = whole ? arriving : ring.wrapped(slot + Window::kNewRows);
      rows = bring(coming, whole, arriving, kRows - x_slot);
    }
    async_copy_commit();

    float x[kRows][kColumns][kChannels], grad_x[kRows][kColumns][kChannels];
    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        Lane::unpack(reinterpret_cast<const Word*>(active.pixel(x_slot + r, warp * kColumns + c))[lane], x[r][c]);
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) grad_x[r][c][v] = 0;
      }
    }
    FSC_UNROLL
    for (int a = 0; a < Window::kRows; ++a) {
      const unsigned char* pixels = ring.pixel(ring.wrapped(slot + a), warp * kColumns / kStride);
      float window[Window::kColumns][kChannels];
      FSC_UNROLL
      for (int b = 0; b < Window::kColumns; ++b)
        Lane::unpack(reinterpret_cast<const Word*>(pixels + b * Traits::kPixelBytes)[lane], window[b]);
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
      // A thread's own words of x have no other reader: its gradients go out through their place.
      FSC_UNROLL
      for (int r = 0; r < kRows; ++r) {
        FSC_UNROLL
        for (int c = 0; c < kColumns; ++c)
          reinterpret_cast<Word*>(active.pixel(x_slot + r, warp * kColumns + c))[lane] = Lane::pack(grad_x[r][c]);
      }
      if (activates) {
        FSC_ROLLED
        for (int pixel = 0; pixel < kRows * kColumns; ++pixel) {
          const int row = x_slot + pixel / kColumns, column = warp * kColumns + pixel % kColumns;
          Word* word = reinterpret_cast<Word*>(active.pixel(row, column)) + lane;
          float grad[kChannels], at[kChannels];
          Lane::unpack(*word, grad);
          Lane::unpack(reinterpret_cast<const Word*>(raw.pixel(row, column))[lane], at);
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v) grad[v] = differentiate(shape.pre_activation, grad[v], at[v]);
          *word = Lane::pack(grad);
        }
      }
      __syncwarp();
      const int first_row = tiling.first_row + current.group * kRows;
      const int first_column = tiling.first_column + current.tile * tiling.tile_columns + warp * kColumns;
      const PhaseAxis vertical{shape.stride_h * current.phase_h - shape.pad_top, shape.dilation_h, shape.H};
      const PhaseAxis horizontal{shape.stride_w * current.phase_w - shape.pad_left, shape.dilation_w, shape.W};
      store_staged<Traits>([&](int row, int column) { return active.pixel(x_slot + row, warp * kColumns + column); },
                           params.grad_x, current.n, first_channel, channels, vertical, horizontal, first_row,
                           first_column, first_column + kColumns);
    }

    current = coming;
    slot = next_slot;
    x_slot = kRows - x_slot;
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
}

}  // namespace fused_sepconv
