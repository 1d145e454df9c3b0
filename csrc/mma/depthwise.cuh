// depthwise.cuh - the depthwise convolution of a tile, as an operand of a matrix product in shared memory.
//
// The depthwise part of the tensor-core kernels. x is in NHWC.
//
//   x (N, H, W, C)                   depthwise weight (K, taps), bias (K)
//      | cp.async, 16 bytes a copy      | cp.async
//      v                                v
//   patch[input pixel][slab]         taps[channel][tap], bias[channel]       a slab of channels, in shared memory
//      |                                |
//      '---- a word of a cell ----------'
//              | float32, + bias, mid_act
//              v
//   v[kPixels rows][slab]            as Scalar; float32 rounded to TF32      in shared memory
//
// A slab is 64 or 128 bytes of a pixel's channels: 16 or 32 words.
//
// Who owns what. A tile is 16 cells of 2 (128 pixels) or 4 (256 pixels) rows by 4 columns. A thread convolves one word
// of the slab's channels (two of 16 bits, or one float32) of one cell, or of two cells where a slab is 128 bytes, with
// the same taps. It reads each input pixel once for all outputs of the cell: 3 words a pixel of a 2x4 cell under 3x3,
// where a row of 4 takes 4.5. A warp reads a whole pixel of 128 bytes, all banks once. Of 64 bytes it reads two
// neighbouring cells, 4 * stride pixels apart, which is a multiple of the banks' 128 bytes. So every other 4 * stride
// columns of such a patch are exchanged with their neighbours, and the two read different banks.
//
// The rows of v. Pixel (r, c) of cell b is row (4r + c) * 16 + b, and the chunks of 16 bytes of a row are exchanged
// (v_offset), so that a warp's stores, and ldmatrix of 8 neighbouring rows, transposing or not, meet every bank once.
// Cells that a tile has not, and pixels past the image, hold nonsense, finite or not; with kZeroOutside they are zeros,
// for sums over pixels.
//
// The calls, and who sees what: enter() a tile; load() each of its slabs; arrived(), by the thread that loaded, once
// async_copy_wait has said that its copies are there; then a __syncthreads, and any thread may convolve(). What it has
// written others may read after another.
#pragma once

#include "../common/activation.cuh"
#include "../common/operand.cuh"
#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/vector.h"
#include "../primitives/warp.h"
#include "tiles.cuh"

namespace fused_sepconv {

// The params that a kernel's launch adds to its call.
template <class Traits>
struct MmaDepthwiseParams {
  ConvShape shape;
  Image x;
  const void* weight;  // (K, kernel_h, kernel_w), contiguous, aligned to 16 bytes
  const void* bias;    // (K) or null, aligned to 16 bytes
  MmaTiles<Traits> tiles;
  MmaSlabLayout<Traits> layout;

  // Call: ForwardParams, BackwardParams
  template <class Call>
  MmaDepthwiseParams(const Call& call, const MmaTiling& tiling)
      : shape(call.shape),
        x(call.x),
        weight(call.depthwise_weight),
        bias(call.depthwise_bias),
        tiles(call.shape, tiling),
        layout(call.shape, tiles) {}
};

template <class Traits>
class MmaDepthwise {
  using Scalar = typename Traits::Scalar;
  using Tile = typename MmaTiles<Traits>::Tile;

 public:
  // `table`: layout.table_bytes of shared memory that nothing else touches. `params` is read where it lies.
  FSC_DEVICE MmaDepthwise(const MmaDepthwiseParams<Traits>& params, unsigned char* table)
      : params_(params), shape_(params.shape), tiles_(params.tiles), layout_(params.layout) {
    table_ = reinterpret_cast<uint32_t*>(table);
    const int word = threadIdx.x % Traits::kWords;
    FSC_UNROLL
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
      int cell = threadIdx.x / Traits::kWords + pass * Traits::kCellsAtOnce;
      Cell& own = cells_[pass];
      own.column = tiles_.by_cells.split(cell) * Traits::kCellColumns;
      own.row = cell * Traits::kCellRows;
      // A cell past the tile's last repeats the first, so that it reads what is there.
      if (own.row >= tiles_.rows) own.row = kNowhere, own.column = 0;
      const int row = own.row == kNowhere ? 0 : own.row * stride_h();
      own.window = kept((row * layout_.columns + own.column * stride_w()) * Traits::kSlabBytes + word * 4);
    }
    out_ = kept(v_offset(threadIdx.x / Traits::kWords, word / 4) + word % 4 * 4);
  }

  // Where chunk `chunk` of a row of v lies, in bytes. The exchange of chunks is the same for rows 8 apart.
  FSC_DEVICE static int v_offset(int row, int chunk) {
    constexpr int kRows = 128 / Traits::kSlabBytes;  // that have all banks
    return row * Traits::kSlabBytes + (chunk ^ row / kRows % Traits::kChunks) * 16;
  }
  static constexpr int kOperandBytes = Traits::kPixels * Traits::kSlabBytes;  // of v

  // Where in a tile the pixel of a row of v lies; false: nowhere.
  FSC_DEVICE bool place(int t_row, int& row, int& column) const {
    const int pixel = t_row / Traits::kCells;
    int cell = t_row % Traits::kCells;
    column = tiles_.by_cells.split(cell) * Traits::kCellColumns + pixel % Traits::kCellColumns;
    row = cell * Traits::kCellRows + pixel / Traits::kCellColumns;
    return row < tiles_.rows;
  }

  // The tile whose slabs are loaded from now on. All lanes of a warp together.
  FSC_DEVICE void enter(const Tile& tile) {
    const Image& x = params_.x;
    image_ = static_cast<const unsigned char*>(x.data) + tile.n * x.stride_n * kScalarBytes;
    const int h0 = tiles_.vertical.input(tile.phase_h, tile.row);
    const int w0 = tiles_.horizontal.input(tile.phase_w, tile.column);
    __syncwarp();  // the places of the tile before are read
    // The threads that copy a pixel share the work of finding their pixels' places.
    const int chunk = threadIdx.x % Traits::kChunks;
    for (int pixel = threadIdx.x / Traits::kChunks + chunk * kPixelsAtOnce; pixel < layout_.copied_pixels;
         pixel += Traits::kChunks * kPixelsAtOnce) {
      int row = pixel;
      const int column = exchanged(layout_.by_columns.split(row));
      const int h = h0 + row * tiles_.vertical.pitch;
      const int w = w0 + column * tiles_.horizontal.pitch;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(shape_.H) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(shape_.W) && column < layout_.width &&
                          row < layout_.rows;
      const int64_t place = (h * x.stride_h + w * x.stride_w) / Traits::kVector;
      table_[pixel] = inside ? static_cast<uint32_t>(place) | kInside : 0;
    }
    __syncwarp();
  }

  // Starts the copies of a slab of the tile; the caller closes their group.
  FSC_DEVICE void load(int slab, unsigned char* stage) const {
    const int chunk = threadIdx.x % Traits::kChunks;
    const int channel = first_channel(slab) + chunk * Traits::kVector;
    const bool real = channel < shape_.C;
    const unsigned char* source = image_ + (real ? channel : 0) * kScalarBytes;
    const uint32_t* table = table_ + threadIdx.x / Traits::kChunks;
    SharedAddress destination = shared_address(stage) + threadIdx.x * 16;
    // The places are read before the copies begin: a copy orders all memory accesses for the compiler.
    FSC_ROLLED
    for (int left = layout_.copied_pixels; left > 0; left -= kUnrolled * kPixelsAtOnce) {
      uint32_t place[kUnrolled];
      FSC_UNROLL
      for (int i = 0; i < kUnrolled; ++i) {
        if (left > i * kPixelsAtOnce) place[i] = table[i * kPixelsAtOnce];
      }
      FSC_UNROLL
      for (int i = 0; i < kUnrolled; ++i) {
        if (left > i * kPixelsAtOnce)
          async_copy<16>(destination + i * kPixelsAtOnce * Traits::kSlabBytes, vector_at(source, place[i] & ~kInside),
                         (place[i] & kInside) != 0 && real);
      }
      table += kUnrolled * kPixelsAtOnce;
      destination += kUnrolled * kPixelsAtOnce * Traits::kSlabBytes;
    }
    // Weights and biases are numbered in pieces of 16 bytes.
    const int taps = shape_.kernel_h * shape_.kernel_w;
    const int weights = taps * Traits::kChunks;  // of the slab
    const SharedAddress behind = shared_address(stage + layout_.patch_bytes);
    FSC_ROLLED
    for (int piece = threadIdx.x; piece < weights; piece += Traits::kThreads) {
      const int index = slab * weights + piece;
      const bool inside = index < layout_.chunks * taps;
      async_copy<16>(behind + piece * 16, vector_at(params_.weight, inside ? index : 0), inside);
    }
    const int piece = Traits::kThreads - 1 - threadIdx.x;  // by the threads that have had the fewest copies
    if (params_.bias != nullptr && piece < Traits::kChunks) {
      const int index = slab * Traits::kChunks + piece;
      const bool inside = index < layout_.chunks;
      async_copy<16>(behind + (weights + piece) * 16, vector_at(params_.bias, inside ? index : 0), inside);
    }
  }

  // To be called where this thread's copies of a slab are there, before the barrier that shows them to the others:
  // repeats channels for a depth multiplier, and applies a pre-activation that is too long for an inner loop.
  FSC_DEVICE void arrived(int slab, unsigned char* stage) const {
    const bool activates = shape_.pre_activation != Activation::none && shape_.pre_activation != Activation::relu;
    if (!activates && shape_.multiplier == 1) return;
    const int chunk = threadIdx.x % Traits::kChunks;
    FSC_ROLLED
    for (int first = 0; first < pixels(); first += kPixelsAtOnce) {  // as often in all lanes
      const int pixel = first + threadIdx.x / Traits::kChunks;
      const bool is_one = pixel < pixels();
      Scalar* channels = reinterpret_cast<Scalar*>(stage + pixel * Traits::kSlabBytes);
      Values<Traits::kVector> values{};
      __syncwarp();  // the other chunks of the pixel are there too
      FSC_UNROLL
      for (int i = 0; i < Traits::kVector; ++i) {
        const int k = slab * Traits::kSlab + chunk * Traits::kVector + i;
        const int c = k / shape_.multiplier - first_channel(slab);
        if (is_one) values[i] = convert<float>(channels[c]);
      }
      __syncwarp();  // and read
      if (activates) activate_all(shape_.pre_activation, values);
      Vector<Scalar, Traits::kVector> vector;
      FSC_UNROLL
      for (int i = 0; i < Traits::kVector; ++i) vector[i] = convert<Scalar>(values[i]);
      if (is_one) store(channels + chunk * Traits::kVector, vector);
    }
  }

  // The depthwise results of a slab of the tile, to v.
  template <bool kZeroOutside = false>
  FSC_DEVICE void convolve(const unsigned char* stage, unsigned char* v, const Tile& tile = {}) const {
    const int taps = shape_.kernel_h * shape_.kernel_w;
    const int word = threadIdx.x % Traits::kWords;
    const unsigned char* const weights = stage + layout_.patch_bytes;
    const uint32_t* const biases = reinterpret_cast<const uint32_t*>(weights + taps * Traits::kSlabBytes);
    Sums bias{};
    if (params_.bias != nullptr) bias = floats_of<Scalar>(fused_sepconv::load<1>(biases + word)[0]);
    [[maybe_unused]] Sums weight[kTaps];
    if constexpr (kHoldsTaps) {
      FSC_UNROLL
      for (int i = 0; i < kTaps; ++i) weight[i] = tap(reinterpret_cast<const uint32_t*>(weights) + word * kTaps, i);
    }
    FSC_UNROLL
    for (int pass = 0; pass < Traits::kPasses; ++pass) {
      const Cell& own = cells_[pass];
      Sums sum[Traits::kCellPixels];
      FSC_UNROLL
      for (int p = 0; p < Traits::kCellPixels; ++p) sum[p] = bias;
      if constexpr (kHoldsTaps)
        add_window(stage, own, sum, [&](int index) { return weight[index]; });
      else if constexpr (Traits::kKernel != 0)
        add_window(stage, own, sum,
                   [&](int index) { return tap(reinterpret_cast<const uint32_t*>(weights) + word * kTaps, index); });
      else
        add_any_window(stage, own, reinterpret_cast<const Scalar*>(weights) + word * Traits::kPerWord * taps, sum);
      unsigned char* const out = v + out_ + pass * Traits::kCellsAtOnce * Traits::kSlabBytes;
      FSC_UNROLL
      for (int r = 0; r < Traits::kCellRows; ++r) {
        Values<Traits::kCellColumns * Traits::kPerWord> row;
        FSC_UNROLL
        for (int c = 0; c < Traits::kCellColumns; ++c) {
          FSC_UNROLL
          for (int e = 0; e < Traits::kPerWord; ++e)
            row[c * Traits::kPerWord + e] = sum[r * Traits::kCellColumns + c][e];
        }
        activate_all(shape_.mid_activation, row);
        FSC_UNROLL
        for (int c = 0; c < Traits::kCellColumns; ++c) {
          Vector<uint32_t, 1> value;
          value[0] = operand_of<Scalar>(&row[c * Traits::kPerWord]);
          if constexpr (kZeroOutside) {
            const bool inside = own.row != kNowhere && tiles_.output_row(tile, own.row + r) < shape_.out_h &&
                                tiles_.output_column(tile, own.column + c) < shape_.out_w;
            if (!inside) value[0] = 0;
          }
          constexpr int kPixelBytes = Traits::kCells * Traits::kSlabBytes;  // from a pixel of a cell to the next
          store(reinterpret_cast<uint32_t*>(out + (r * Traits::kCellColumns + c) * kPixelBytes), value);
        }
      }
    }
  }

 private:
  using Sums = WordOf<Scalar>;  // of a pixel

  static constexpr int kScalarBytes = sizeof(Scalar);
  static constexpr int kNowhere = -1;
  static constexpr uint32_t kInside = 0x80000000u;             // of a place in x
  static constexpr int kUnrolled = 3;                          // copies: a 3x3 patch takes one or two times as many
  static constexpr int kPixelsAtOnce = Traits::kPixelsAtOnce;  // that the block copies
  static constexpr int kTaps = Traits::kKernel == 0 ? 1 : Traits::kKernel * Traits::kKernel;
  static constexpr bool kHoldsTaps = Traits::kPasses > 1;  // in registers, from one cell to the next

  // Two cells that a warp reads at once are 4 * stride pixels apart: they would read the same banks.
  static constexpr bool kExchanges = Traits::kStride != 0 && Traits::kSlabBytes < 128;

  struct Cell {
    int row, column;  // where in the tile it is; row kNowhere: nowhere
    int window;       // the first word that the thread reads of a patch for it, in bytes
  };

  FSC_DEVICE int stride_h() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.vertical.inner_stride; }
  FSC_DEVICE int stride_w() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.horizontal.inner_stride; }
  FSC_DEVICE int pixels() const { return layout_.rows * layout_.columns; }

  // The first channel of x in a slab's patch: with a depth multiplier, the aligned one at or before its first.
  FSC_DEVICE int first_channel(int slab) const {
    if (shape_.multiplier == 1) return slab * Traits::kSlab;  // without the division
    return slab * Traits::kSlab / shape_.multiplier / Traits::kVector * Traits::kVector;
  }

  // Where a column of a patch lies, and which column lies there.
  FSC_DEVICE static int exchanged(int column) {
    if constexpr (!kExchanges)
      return column;
    else
      return column ^ column / (Traits::kCellColumns * Traits::kStride) % 2;
  }

  // The window of a cell, row after row, under a kernel whose size is known. Weight: a tap's from its number.
  template <class Weight>
  FSC_DEVICE void add_window(const unsigned char* patch, const Cell& own, Sums (&sum)[Traits::kCellPixels],
                             const Weight& weight_of) const {
    constexpr int kSide = Traits::kKernel, kStep = Traits::kStride;
    constexpr int kRows = (Traits::kCellRows - 1) * kStep + kSide;
    constexpr int kColumns = (Traits::kCellColumns - 1) * kStep + kSide;
    // The step from the place of an even and an odd column where columns are exchanged as the cell's first are;
    // where they are not, it is as for the other parity.
    const int exchange = kExchanges ? own.column / Traits::kCellColumns % 2 * Traits::kSlabBytes : 0;
    const unsigned char* even = patch + own.window + exchange;
    const unsigned char* odd = patch + own.window - exchange;
    Sums weight[kTaps];
    FSC_UNROLL
    for (int y = 0; y < kRows; ++y) {
      if (y < kSide) {
        FSC_UNROLL
        for (int j = 0; j < kSide; ++j) weight[y * kSide + j] = weight_of(y * kSide + j);
      }
      FSC_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const bool as_first = !kExchanges || column / (Traits::kCellColumns * kStep) % 2 == 0;
        const unsigned char* place = column % 2 == 0 ? (as_first ? even : odd + Traits::kSlabBytes)
                                                     : (as_first ? odd : even - Traits::kSlabBytes);
        const Sums x = input(place + column * Traits::kSlabBytes);
        FSC_UNROLL
        for (int r = 0; r < Traits::kCellRows; ++r) {
          FSC_UNROLL
          for (int c = 0; c < Traits::kCellColumns; ++c) {
            const int i = y - r * kStep, j = column - c * kStep;
            if (i < 0 || i >= kSide || j < 0 || j >= kSide) continue;
            FSC_UNROLL
            for (int e = 0; e < Traits::kPerWord; ++e)
              sum[r * Traits::kCellColumns + c][e] += weight[i * kSide + j][e] * x[e];
          }
        }
      }
      even += layout_.columns * Traits::kSlabBytes;
      odd += layout_.columns * Traits::kSlabBytes;
    }
  }

  // Tap `index` of a word's channels, whose weights lie one channel after the other.
  FSC_DEVICE static Sums tap(const uint32_t* taps, int index) {
    Sums weight;
    FSC_UNROLL
    for (int e = 0; e < Traits::kPerWord; ++e) {
      const int scalar = e * kTaps + index;
      weight[e] =
          floats_of<Scalar>(fused_sepconv::load<1>(taps + scalar / Traits::kPerWord)[0])[scalar % Traits::kPerWord];
    }
    return weight;
  }

  // The same for any kernel and stride, tap after tap.
  FSC_DEVICE void add_any_window(const unsigned char* patch, const Cell& own, const Scalar* taps,
                                 Sums (&sum)[Traits::kCellPixels]) const {
    const int area = shape_.kernel_h * shape_.kernel_w;
    FSC_ROLLED
    for (int i = 0; i < shape_.kernel_h; ++i) {
      FSC_ROLLED
      for (int j = 0; j < shape_.kernel_w; ++j) {
        Sums weight;
        FSC_UNROLL
        for (int e = 0; e < Traits::kPerWord; ++e)
          weight[e] = convert<float>(fused_sepconv::load<1>(taps + e * area + i * shape_.kernel_w + j)[0]);
        FSC_UNROLL
        for (int r = 0; r < Traits::kCellRows; ++r) {
          FSC_UNROLL
          for (int c = 0; c < Traits::kCellColumns; ++c) {
            const int pixel = (r * stride_h() + i) * layout_.columns + c * stride_w() + j;
            const Sums x = input(patch + own.window + pixel * Traits::kSlabBytes);
            FSC_UNROLL
            for (int e = 0; e < Traits::kPerWord; ++e) sum[r * Traits::kCellColumns + c][e] += weight[e] * x[e];
          }
        }
      }
    }
  }

  // The word of a pixel at `place`, with the pre-activation.
  FSC_DEVICE Sums input(const unsigned char* place) const {
    uint32_t word = fused_sepconv::load<1>(reinterpret_cast<const uint32_t*>(place))[0];
    if (shape_.pre_activation == Activation::relu) word = relu_packed<Scalar>(word);
    return floats_of<Scalar>(word);
  }

  // All in constant memory: none of it takes a register.
  const MmaDepthwiseParams<Traits>& params_;
  const ConvShape& shape_;
  const MmaTiles<Traits>& tiles_;
  const MmaSlabLayout<Traits>& layout_;

  uint32_t* table_;  // of each pixel of the patch: 16 bytes from its image's first, or 0; kInside if it is in the image
  const unsigned char* image_;  // of x: the tile's
  Cell cells_[Traits::kPasses];
  int out_;  // the first word that the thread writes of v, in bytes
};

}  // namespace fused_sepconv
