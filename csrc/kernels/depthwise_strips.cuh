// depthwise_strips.cuh - what the depthwise kernels for NHWC share: channels of a lane, strips, rows on their way in.
//
// A block owns a chunk of channels and walks down strips. A pixel's chunk is 128 bytes (or 64), a word a lane: a warp
// that reads a pixel reads all banks once. Rows come by cp.async in pieces of 16 bytes into a ring of rows in shared
// memory, a group of rows ahead of the arithmetic.
#pragma once

#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/vector.h"
#include "../primitives/warp.h"
#include "activation.cuh"
#include "image.cuh"

namespace fused_sepconv {

constexpr int kDepthwiseColumns = 4;  // neighbouring columns that a thread owns
constexpr int kPieceBytes = 16;       // what a copy moves

// A lane's channels of a pixel as one word of shared memory.
template <class Scalar, int channels>
struct LaneWord;

template <>
struct LaneWord<float, 1> {
  using Word = float;
  static FSC_DEVICE void unpack(Word word, float (&values)[1]) { values[0] = word; }
  static FSC_DEVICE Word pack(const float (&values)[1]) { return values[0]; }
};

template <class Scalar>
struct LaneWord<Scalar, 1> {
  using Word = Scalar;
  static FSC_DEVICE void unpack(Word word, float (&values)[1]) { values[0] = convert<float>(word); }
  static FSC_DEVICE Word pack(const float (&values)[1]) { return convert<Scalar>(values[0]); }
};

template <class Scalar>
struct LaneWord<Scalar, 2> {
  using Word = uint32_t;
  static FSC_DEVICE void unpack(Word word, float (&values)[2]) {
    const float2 pair = fused_sepconv::unpack<Scalar>(word);
    values[0] = pair.x, values[1] = pair.y;
  }
  static FSC_DEVICE Word pack(const float (&values)[2]) { return fused_sepconv::pack<Scalar>(values[0], values[1]); }
};

// What is fixed when a depthwise kernel is compiled. kRows: rows that a thread computes at a time; more of them read
// each row of the window less often, and take more registers.
template <class Scalar_, int kernel, int stride, int rows, int channels, int max_warps, int blocks_per_sm>
struct DepthwiseTraits {
  using Scalar = Scalar_;
  using Lane = LaneWord<Scalar, channels>;
  using Word = typename Lane::Word;
  static constexpr int kKernel = kernel;
  static constexpr int kTaps = kernel * kernel;
  static constexpr int kStride = stride;
  static constexpr int kRows = rows;
  static constexpr int kColumns = kDepthwiseColumns;
  static constexpr int kChannels = channels;            // of a lane
  static constexpr int kChunk = kWarpSize * kChannels;  // channels of a block
  static constexpr int kPixelBytes = kChunk * sizeof(Scalar);
  static constexpr int kPieces = kPixelBytes / kPieceBytes;  // of a pixel
  static constexpr int kPieceChannels = kPieceBytes / sizeof(Scalar);
  static constexpr int kMaxWarps = max_warps;
  static constexpr int kThreads = kWarpSize * kMaxWarps;
  static constexpr int kBlocksPerSm = blocks_per_sm;  // of so many threads

  static_assert(kKernel % 2 == 1 && (kStride == 1 || kStride == 2), "what the windows are computed for");
  static_assert(kRows % kStride == 0 && kColumns % kStride == 0, "groups and threads begin in the same phase");
  static_assert(sizeof(Word) == kChannels * sizeof(Scalar), "a word is a lane's channels");
  static_assert(kWarpSize % kPieces == 0, "a warp copies whole pixels");
};

// A group of rows: which image, phase and tile of columns it is in. Where the strips end, the next one begins.
struct DepthwiseGroup {
  int64_t n;
  int32_t phase_h, phase_w, tile, group;

  FSC_DEVICE DepthwiseGroup(const DepthwiseTiling& tiling, int64_t number) {
    const int64_t strip = number / tiling.groups;
    group = static_cast<int32_t>(number - strip * tiling.groups);
    const int64_t row_of_strips = strip / tiling.column_tiles;
    tile = static_cast<int32_t>(strip - row_of_strips * tiling.column_tiles);
    const int64_t phase = row_of_strips / tiling.phases_w;
    phase_w = static_cast<int32_t>(row_of_strips - phase * tiling.phases_w);
    n = phase / tiling.phases_h;
    phase_h = static_cast<int32_t>(phase - n * tiling.phases_h);
  }

  FSC_DEVICE void advance(const DepthwiseTiling& tiling) {
    if (++group < tiling.groups) return;
    group = 0;
    if (++tile < tiling.column_tiles) return;
    tile = 0;
    if (++phase_w < tiling.phases_w) return;
    phase_w = 0;
    if (++phase_h < tiling.phases_h) return;
    phase_h = 0;
    ++n;
  }
};

FSC_DEVICE int64_t depthwise_groups(const ConvShape& shape, const DepthwiseTiling& tiling) {
  return shape.N * tiling.phases_h * tiling.phases_w * tiling.column_tiles * tiling.groups;
}

// Rows and columns of one phase of an image: index i of the phase is row origin + i * pitch of the image.
struct PhaseAxis {
  int32_t origin, pitch, size;  // size: of the image

  FSC_DEVICE int32_t at(int32_t i) const { return origin + i * pitch; }
  FSC_DEVICE bool inside(int32_t i) const { return static_cast<uint32_t>(at(i)) < static_cast<uint32_t>(size); }
};

// Rows of pixels in shared memory: `capacity` slots, used one after the other and round again.
template <class Traits>
struct RowRing {
  unsigned char* bytes;
  int32_t columns;   // of a slot
  int32_t capacity;  // slots

  FSC_DEVICE int32_t wrapped(int32_t slot) const { return slot >= capacity ? slot - capacity : slot; }
  FSC_DEVICE unsigned char* pixel(int32_t slot, int32_t column) const {
    return bytes + (slot * columns + column) * Traits::kPixelBytes;
  }
  // A thread's pieces are those of every step-th column, in all rows; copying and whatever a thread does to its own
  // pieces agree.
  FSC_DEVICE int32_t own_column() const { return threadIdx.x / Traits::kPieces; }
  FSC_DEVICE int32_t own_step() const { return blockDim.x / Traits::kPieces; }
  FSC_DEVICE unsigned char* own_piece(int32_t slot, int32_t column) const {
    return pixel(slot, column) + threadIdx.x % Traits::kPieces * kPieceBytes;
  }
  template <class Body>
  FSC_DEVICE void for_each_own_piece(int32_t slot, int32_t rows, const Body& body) const {
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t column = own_column(); column < columns; column += own_step())
        body(row, column, threadIdx.x % Traits::kPieces, own_piece(slot, column));
      slot = wrapped(slot + 1);
    }
  }
};

// Starts the copies of `rows` rows of an image's phase, from row `row` and column `column` of the phase on, into the
// ring. Zeros stand for what is outside the image, for columns from `column_end` on, and for channels past `channels`.
template <class Traits>
FSC_DEVICE void copy_rows(const RowRing<Traits>& ring, int32_t slot, int32_t rows, const Image& image, int64_t n,
                          int32_t first_channel, int32_t channels, const PhaseAxis& vertical,
                          const PhaseAxis& horizontal, int32_t row, int32_t column, int32_t column_end) {
  using Scalar = typename Traits::Scalar;
  const Scalar* data = static_cast<const Scalar*>(image.data);
  const Scalar* first = data + n * image.stride_n + first_channel + vertical.at(row) * image.stride_h;
  const int64_t row_step = vertical.pitch * image.stride_h;
  const int32_t channel = threadIdx.x % Traits::kPieces * Traits::kPieceChannels;
  // Rows are the inner loop: a step down is an addition, where a step across needs products of 64 bits.
  for (int32_t j = ring.own_column(); j < ring.columns; j += ring.own_step()) {
    const bool column_inside = channel < channels && column + j < column_end && horizontal.inside(column + j);
    const Scalar* source = first + horizontal.at(column + j) * image.stride_w + channel;
    int32_t at = slot;
    FSC_ROLLED
    for (int32_t i = 0; i < rows; ++i) {
      const bool inside = column_inside && vertical.inside(row + i);
      async_copy<kPieceBytes>(shared_address(ring.own_piece(at, j)), inside ? source : data, inside);
      source += row_step;
      at = ring.wrapped(at + 1);
    }
  }
}

// Adds the taps of neighbouring outputs to their sums: read(a, window) gives row a of the window that they share.
template <int kKernel, int kStride, int kRows, int kColumns, int kChannels, class Read>
FSC_DEVICE void add_taps(float (&sums)[kRows][kColumns][kChannels],
                         const float (&weights)[kKernel * kKernel][kChannels], const Read& read) {
  FSC_UNROLL
  for (int a = 0; a < (kRows - 1) * kStride + kKernel; ++a) {
    float window[(kColumns - 1) * kStride + kKernel][kChannels];
    read(a, window);
    FSC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int i = a - r * kStride;  // the tap that lies on this row
      if (i < 0 || i >= kKernel) continue;
      FSC_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FSC_UNROLL
        for (int j = 0; j < kKernel; ++j) {
          FSC_UNROLL
          for (int v = 0; v < kChannels; ++v) sums[r][c][v] += weights[i * kKernel + j][v] * window[c * kStride + j][v];
        }
      }
    }
  }
}

// Applies an activation to `count` words, `stride` words apart. Rolled: a kernel has it once.
template <class Traits>
FSC_DEVICE void activate_words(Activation activation, const typename Traits::Word* from, typename Traits::Word* to,
                               int count) {
  FSC_ROLLED
  for (int i = 0; i < count; ++i) {
    float values[Traits::kChannels];
    Traits::Lane::unpack(from[i], values);
    FSC_UNROLL
    for (int v = 0; v < Traits::kChannels; ++v) values[v] = activate(activation, values[v]);
    to[i] = Traits::Lane::pack(values);
  }
}

// Stores a warp's words of kRows x kColumns pixels, which its lanes have left in shared memory, 16 bytes a lane, to an
// image's phase from row `row` and column `column` of the phase on; not past the image, `column_end` or `channels`.
template <class Traits, class Staged>
FSC_DEVICE void store_staged(const Staged& staged, const Image& image, int64_t n, int32_t first_channel,
                             int32_t channels, const PhaseAxis& vertical, const PhaseAxis& horizontal, int32_t row,
                             int32_t column, int32_t column_end) {
  using Scalar = typename Traits::Scalar;
  constexpr int kPixels = kWarpSize / Traits::kPieces;  // of one instruction
  constexpr int kRows = kPixels / Traits::kColumns;
  static_assert(kPixels % Traits::kColumns == 0 && Traits::kRows % kRows == 0, "a lane keeps to its column");
  const int lane = threadIdx.x % kWarpSize;
  const int channel = lane % Traits::kPieces * Traits::kPieceChannels;
  const int own_column = lane / Traits::kPieces % Traits::kColumns;
  const int own_row = lane / Traits::kPieces / Traits::kColumns;
  column += own_column;
  row += own_row;
  if (channel >= channels || column >= column_end || !horizontal.inside(column)) return;
  Scalar* destination = static_cast<Scalar*>(image.data) +
                        offset(image, n, first_channel + channel, vertical.at(row), horizontal.at(column));
  const int64_t step = kRows * vertical.pitch * image.stride_h;
  FSC_UNROLL
  for (int i = 0; i < Traits::kRows; i += kRows) {
    const Scalar* source = reinterpret_cast<const Scalar*>(staged(own_row + i, own_column)) + channel;
    if (vertical.inside(row + i)) store(destination, load<Traits::kPieceChannels>(source));
    destination += step;
  }
}

}  // namespace fused_sepconv
