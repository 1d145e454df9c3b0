// nhwc_forward.cuh - a depthwise convolution by itself, NHWC, at the speed of memory.
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
// (NhwcTiling in params.h); a warp 4 neighbouring columns of a strip. While a group is computed, the rows that the
// next one adds are on their way, also where the next one begins another strip: the memory is never left waiting.
// Chunks are the fastest in the grid, so that neighbouring blocks read the same pixels.
//
// Why it is legal. Channels do not mix, so a chunk needs no other. With stride s and dilation d, g = gcd(s, d), outputs
// r, r + d/g, r + 2 d/g, ... of a phase r read rows s * r - pad + d * (s/g * q + i), i the tap: a convolution without
// dilation and with stride s/g on every d-th row. The same for columns.
//
// Normalised: act(scale * x + shift) takes the pre-activation's place. A thread makes it of the pieces that it has
// copied itself, before the barrier that shows them to others; what the image does not have stays zero.
//
// Floor. Device bytes: x + y, each once, and again the window's overlap (k - s rows or columns) where parts and tiles
// meet. Arithmetic: for 3x3 in bfloat16 about 19 instructions of a lane an element (9 of them multiply-adds), 21 with
// relu before it, where an H200's SMs can issue 27 in the time of the bytes; 7x7 is bound by its 49 multiply-adds.
#pragma once

#include "nhwc.cuh"

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
depthwise_nhwc_forward(const FSC_CONST_PARAM DepthwiseForwardParams params) {
  using Scalar = typename Traits::Scalar;
  using Word = typename Traits::Word;
  using Lane = typename Traits::Lane;
  using Window = DepthwiseForwardWindow<Traits>;
  constexpr int kKernel = Traits::kKernel, kStride = Traits::kStride, kRows = Traits::kRows;
  constexpr int kColumns = Traits::kColumns, kChannels = Traits::kChannels;
  FSC_SHARED_BYTES(shared);
  const ConvShape& shape = params.shape;
  const NhwcTiling& tiling = params.tiling;

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
  load_weights<Traits>(params.depthwise_weight, first_channel, shape.K, shared, weights);
  const bool exists = own_channel < shape.K;  // all of a lane's or none, as pixels are whole pieces
  FSC_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    const int k = exists ? own_channel + v : 0;
    const Scalar* biases = static_cast<const Scalar*>(params.depthwise_bias);
    bias[v] = biases == nullptr ? 0.0f : convert<float>(biases[k]);
    input_of[v] = exists ? k / shape.multiplier - first_input : 0;
  }

  const int warps = tiling.warps;
  const RowRing<Traits> ring(shared, Window::columns_of(warps), Window::kCapacity);
  Word* own_stage = reinterpret_cast<Word*>(shared + ring.size) + warp * kRows * kColumns * kWarpSize;
  const auto staged = [&](int row, int column) {
    return reinterpret_cast<unsigned char*>(own_stage + (row * kColumns + column) * kWarpSize);
  };

  const Prologue<Traits> prologue(params.affine, shape.pre_activation, first_channel, channels,
                                  shared + ring.size + warps * kRows * kColumns * Traits::kPixelBytes);
  DepthwiseGroup current(tiling, begin), coming = current;
  RowCopies<Traits> copies(params.x, params.x_steps, input_rows(shape, coming), input_columns(shape, coming),
                           first_input, inputs);
  RowStores<Traits> stores(params.y, params.y_steps, output_rows(shape, tiling, coming),
                           output_columns(shape, tiling, coming), first_channel, channels);
  const auto start_copies = [&] {
    const int column = coming.tile * tiling.tile_columns * kStride;
    copies.start(coming.n, input_rows(shape, coming), input_columns(shape, coming), coming.group * Window::kNewRows,
                 column, column + (tiling.tile_columns - 1) * kStride + kKernel);
  };
  const auto start_stores = [&] {
    const int column = coming.tile * tiling.tile_columns;
    stores.start(coming.n, output_rows(shape, tiling, coming), output_columns(shape, tiling, coming),
                 coming.group * kRows, column + warp * kColumns, column + tiling.tile_columns);
  };

  int top = 0;        // where the group's window begins
  bool whole = true;  // whether all its rows have come, or those that the group before did not have
  start_copies();
  start_stores();
  copies.bring_first(ring, top, Window::kRows);
  async_copy_commit();
  for (int32_t left = static_cast<int32_t>(end - begin); left > 0; --left) {
    async_copy_wait<0>();
    const int arrived = whole ? Window::kRows : Window::kNewRows;
    if (Traits::kNormalised) {
      prologue.apply(ring, ring.after(top, Window::kRows - arrived), arrived, input_rows(shape, current),
                     input_columns(shape, current), current.group * Window::kNewRows + Window::kRows - arrived,
                     current.tile * tiling.tile_columns * kStride, 0);
    } else if (shape.pre_activation != Activation::none) {
      ring.for_each_own_piece(ring.after(top, Window::kRows - arrived), arrived, [&](unsigned char* piece) {
        activate_piece<Traits>(shape.pre_activation, piece, piece);
      });
    }
    __syncthreads();  // the window is there, and the one before it is read

    // The next rows come below the window. All of one at a strip's start, and else those that it moves on by.
    const int bottom = ring.after(top, Window::kRows);
    whole = false;
    if (left > 1) {
      coming.advance(tiling);
      whole = coming.group == 0;
      if (whole) {
        start_copies();
        copies.bring_first(ring, bottom, Window::kRows);
      } else {
        copies.template bring<Window::kNewRows>(ring, bottom);
      }
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
      const unsigned char* pixels = ring.pixel(ring.after(top, a), warp * kColumns * kStride);
      if (Traits::kNormalised || shape.multiplier == 1) {
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

    const bool mid = !Traits::kNormalised && shape.mid_activation != Activation::none;
    const bool relu = mid && shape.mid_activation == Activation::relu && params.grad_output.data == nullptr;
    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        Word word = Lane::pack(sums[r][c]);
        if (relu) word = relu_word<Traits>(word);  // which rounding does not move across 0
        own_stage[(r * kColumns + c) * kWarpSize + lane] = word;
      }
    }
    if (mid && !relu) {
      const int first_row = current.group * kRows;
      const int first_column = current.tile * tiling.tile_columns + warp * kColumns;
      const int tile_end = (current.tile + 1) * tiling.tile_columns;
      const PhaseAxis vertical = output_rows(shape, tiling, current);
      const PhaseAxis horizontal = output_columns(shape, tiling, current);
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
    stores.store(staged);
    if (whole) start_stores();

    current = coming;
    top = whole ? bottom : ring.after(top, Window::kNewRows);
  }
}

}  // namespace fused_sepconv
