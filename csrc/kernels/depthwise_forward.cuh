// depthwise_forward.cuh - a depthwise convolution by itself, NHWC, at the speed of memory.
//
//     x (N, C, H, W) --- cp.async, 16 bytes --->  ring of rows in shared memory (pre_act in place, once an element)
//                                                    | a word a lane: windows of a thread's 4 columns
//                                                    v
//                        weights in registers --->  taps: kRows x 4 outputs a thread, float32
//                                                    | + bias; staged in shared memory, mid_act
//                                                    v
//     y (N, K, out_h, out_w)  <--- 16 bytes a lane --'
//
// Who owns what. A block owns a chunk of channels (a lane one or two of them) and a part of the groups of rows
// (DepthwiseTiling in params.h); a warp 4 neighbouring columns of a strip. While a group is computed, the rows that the
// next one adds are on their way, also where the next one begins another strip: the memory is never left waiting.
// Chunks are the fastest in the grid, so that neighbouring blocks read the same pixels.
//
// Why it is legal. Channels do not mix, so a chunk needs no other. With stride s and dilation d, g = gcd(s, d), outputs
// r, r + d/g, r + 2 d/g, ... of a phase r read rows s * r - pad + d * (s/g * q + i), i the tap: a convolution without
// dilation and with stride s/g on every d-th row. The same for columns.
//
// Floor. Device bytes: x + y, each once, and again the window's overlap (k - s rows or columns) where parts and tiles
// meet. Arithmetic: for 3x3 in bfloat16 about 27 instructions of a lane an element (9 of them multiply-adds), about
// what an H200's SMs can issue in the time of the bytes; 7x7 is bound by its 49 multiply-adds.
#pragma once

#include "depthwise_strips.cuh"

namespace fused_sepconv {

// Rows of the window of a group, and of the ring: one group's and the next one's, which may lie in another strip.
template <class Traits>
struct DepthwiseForwardWindow {
  static constexpr int kRows = (Traits::kRows - 1) * Traits::kStride + Traits::kKernel;
  static constexpr int kColumns = (Traits::kColumns - 1) * Traits::kStride + Traits::kKernel;
  static constexpr int kNewRows = Traits::kRows * Traits::kStride;  // that the next group of a strip adds
  static constexpr int kCapacity = 2 * kRows;
  static FSC_HOST_DEVICE int columns_of(int warps) {
    return (warps * Traits::kColumns - 1) * Traits::kStride + Traits::kKernel;
  }
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, Traits::kBlocksPerSm)
depthwise_forward(const FSC_CONST_PARAM DepthwiseForwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  using Window = DepthwiseForwardWindow<Traits>;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kRows = Traits::kRows;
  constexpr int kColumns = Traits::kColumns, kChannels = Traits::kChannels;
  FSC_SHARED_BYTES(shared);
  const ConvShape& shape = params.shape;
  const DepthwiseTiling& tiling = params.tiling;

  const int chunks = (shape.K + Traits::kChunk - 1) / Traits::kChunk;
  const int first_channel = static_cast<int>(blockIdx.x % chunks) * Traits::kChunk;
  const int64_t begin = static_cast<int64_t>(blockIdx.x / chunks) * tiling.groups_per_part;
  const int64_t groups = depthwise_groups(shape, tiling);
  const int64_t end = begin + tiling.groups_per_part < groups ? begin + tiling.groups_per_part : groups;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int own_channel = first_channel + lane * kChannels;
  const int channels = shape.K - first_channel;  // from the chunk's first on

  // The input channels under the chunk, from an aligned one on.
  const int first_input = first_channel / shape.multiplier / Traits::kPieceChannels * Traits::kPieceChannels;
  const int last_channel = first_channel + Traits::kChunk < shape.K ? first_channel + Traits::kChunk : shape.K;
  const int inputs = (last_channel - 1) / shape.multiplier + 1 - first_input;

  float weights[Traits::kTaps][kChannels], bias[kChannels];
  int input_of[kChannels];  // where the lane's channels find their input
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    const bool exists = own_channel + v < shape.K;
    const int k = exists ? own_channel + v : 0;
    const Scalar* weight =
        static_cast<const Scalar*>(params.depthwise_weight) + static_cast<int64_t>(k) * Traits::kTaps;
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap) weights[tap][v] = convert<float>(weight[tap]);
    const Scalar* biases = static_cast<const Scalar*>(params.depthwise_bias);
    bias[v] = biases == nullptr ? 0.0f : convert<float>(biases[k]);
    input_of[v] = exists ? k / shape.multiplier - first_input : 0;
  }

  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const RowRing<Traits> ring{shared, Window::columns_of(warps), Window::kCapacity};
  Word* own_stage = reinterpret_cast<Word*>(ring.pixel(Window::kCapacity, 0)) + warp * kRows * kColumns * kWarpSize;
  const auto staged = [&](int row, int column) {
    return reinterpret_cast<unsigned char*>(own_stage + (row * kColumns + column) * kWarpSize);
  };

  // Brings the rows that a group adds to those of the one before it; all of its window at a strip's or part's start.
  const auto bring = [&](const DepthwiseGroup& group, bool whole, int slot) {
    const PhaseAxis vertical{shape.stride_h * group.phase_h - shape.pad_top, shape.dilation_h, shape.H};
    const PhaseAxis horizontal{shape.stride_w * group.phase_w - shape.pad_left, shape.dilation_w, shape.W};
    const int rows = whole ? Window::kRows : Window::kNewRows;
    const int row = group.group * Window::kNewRows + Window::kRows - rows;
    const int column = group.tile * tiling.tile_columns * kStride;
    copy_rows(ring, slot, rows, params.x, group.n, first_input, inputs, vertical, horizontal, row, column,
              column + (tiling.tile_columns - 1) * kStride + kKernel);
    return rows;
  };

  DepthwiseGroup current(tiling, begin), coming = current;
  int slot = 0;      // where the current group's window begins
  int arriving = 0;  // where the rows begin that were asked for last
  int rows = begin < end ? bring(coming, true, arriving) : 0;
  async_copy_commit();
  for (int64_t number = begin; number < end; ++number) {
    async_copy_wait<0>();
    if (shape.pre_activation != Activation::none)
      ring.for_each_own_piece(arriving, rows, [&](int, int, int, unsigned char* piece) {
        Word* words = reinterpret_cast<Word*>(piece);
        activate_words<Traits>(shape.pre_activation, words, words, kPieceBytes / sizeof(Word));
      });
    __syncthreads();  // the window is there, and the one before it is read

    int next_slot = 0;
    arriving = ring.wrapped(arriving + rows);
    if (number + 1 < end) {
      coming.advance(tiling);
      const bool whole = coming.group == 0;
      next_slot = whole ? arriving : ring.wrapped(slot + Window::kNewRows);
      rows = bring(coming, whole, arriving);
    }
    async_copy_commit();

    float sums[kRows][kColumns][kChannels];
    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) sums[r][c][v] = bias[v];
      }
    }
    add_taps<kKernel, kStride>(sums, weights, [&](int a, float (&window)[Window::kColumns][kChannels]) {
      const unsigned char* pixels = ring.pixel(ring.wrapped(slot + a), warp * kColumns * kStride);
      if (shape.multiplier == 1) {
        FSC_UNROLL
        for (int b = 0; b < Window::kColumns; ++b)
          Lane::unpack(reinterpret_cast<const Word*>(pixels + b * Traits::kPixelBytes)[lane], window[b]);
      } else {
        FSC_UNROLL
        for (int b = 0; b < Window::kColumns; ++b) {
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v)
            window[b][v] =
                convert<float>(reinterpret_cast<const Scalar*>(pixels + b * Traits::kPixelBytes)[input_of[v]]);
        }
      }
    });

    const int first_row = current.group * kRows;
    const int first_column = current.tile * tiling.tile_columns + warp * kColumns;
    const int tile_end = (current.tile + 1) * tiling.tile_columns;
    const PhaseAxis vertical{current.phase_h, tiling.phases_h, shape.out_h};
    const PhaseAxis horizontal{current.phase_w, tiling.phases_w, shape.out_w};

    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) own_stage[(r * kColumns + c) * kWarpSize + lane] = Lane::pack(sums[r][c]);
    }
    if (shape.mid_activation != Activation::none) {
      FSC_ROLLED
      for (int pixel = 0; pixel < kRows * kColumns; ++pixel) {
        Word* word = own_stage + pixel * kWarpSize + lane;
        if (params.grad_output.data == nullptr) {
          activate_words<Traits>(shape.mid_activation, word, word, 1);
          continue;
        }
        const int q = first_row + pixel / kColumns, p = first_column + pixel % kColumns;
        if (p >= tile_end || !vertical.inside(q) || !horizontal.inside(p) || own_channel >= shape.K) continue;
        const Scalar* grad = static_cast<const Scalar*>(params.grad_output.data) +
                             offset(params.grad_output, current.n, own_channel, vertical.at(q), horizontal.at(p));
        float t[kChannels], g[kChannels];
        Lane::unpack(*word, t);
        Lane::unpack(*reinterpret_cast<const Word*>(grad), g);
        FSC_UNROLL
        for (int v = 0; v < kChannels; ++v) g[v] = differentiate(shape.mid_activation, g[v], t[v]);
        *word = Lane::pack(g);
      }
    }
    __syncwarp();
    store_staged<Traits>(staged, params.y, current.n, first_channel, channels, vertical, horizontal, first_row,
                         first_column, tile_end);

    current = coming;
    slot = next_slot;
  }
}

}  // namespace fused_sepconv
