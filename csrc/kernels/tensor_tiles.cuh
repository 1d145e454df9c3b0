// tensor_tiles.cuh - how the tensor-core forward cuts a problem: tiles of the output, and what a block keeps in shared
// memory. Computed on the host once a launch, and read by the kernel from constant memory, so that it takes no
// register.
#pragma once

#include "../params.h"
#include "../primitives/platform.h"
#include "phases.cuh"

namespace fused_sepconv {

// kernel: taps a side, inner_stride: of a phase (phases.cuh); 0 for any, read from the shape.
template <class Scalar_, int kernel, int inner_stride>
struct TensorForwardTraits {
  using Scalar = Scalar_;
  static constexpr int kKernel = kernel;
  static constexpr int kStride = inner_stride;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRun = 4;              // neighbouring output pixels of a lane
  static constexpr int kRuns = 8 * kWarps;    // of a tile
  static constexpr int kFeatures = 128;       // of a tile
  static constexpr int kStages = 4;           // slabs in shared memory
  static constexpr int kAhead = kStages - 2;  // of them on their way; two are in use, as half of the warps lag by one

  static constexpr int kWords = 4;  // 32-bit words of channels that a lane convolves: 16 bytes
  static constexpr int kPerWord = 4 / sizeof(Scalar);
  static constexpr int kVector = kWords * kPerWord;  // channels of a lane
  static constexpr int kChunks = 4;                  // 16-byte chunks of a slab: one for each lane of a run
  static constexpr int kSlab = kChunks * kVector;    // channels

  // Words that are convolved at once: the window of a larger row at 8 channels would not fit the registers.
  static constexpr int kWordsAtOnce = kernel > 3 || inner_stride == 2 ? 2 : 4;

  static_assert(sizeof(Scalar) == 2 || sizeof(Scalar) == 4, "float16, bfloat16, or float32 as TF32");
  static_assert((kernel == 0) == (inner_stride == 0), "either both are known or neither");
};

// The tiles of a problem, and where one lies. Slabs of features are the fastest index, so that neighbouring blocks
// share x in L2.
template <class Traits>
struct TensorForwardTiles {
  Phases vertical, horizontal;
  int tile_rows, tile_columns;
  int feature_slabs, down, across;  // tiles along F, and along a phase's rows and columns
  int count;                        // in all; the plan refuses more than an int holds

  TensorForwardTiles(const ConvShape& shape, const TensorTiling& tiling)
      : vertical(shape.stride_h, shape.dilation_h, shape.pad_top),
        horizontal(shape.stride_w, shape.dilation_w, shape.pad_left),
        tile_rows(tiling.rows),
        tile_columns(tiling.columns),
        feature_slabs((shape.F + Traits::kFeatures - 1) / Traits::kFeatures),
        down((vertical.longest(shape.out_h) + tile_rows - 1) / tile_rows),
        across((horizontal.longest(shape.out_w) + tile_columns - 1) / tile_columns),
        count(static_cast<int>(shape.N) * vertical.count * down * horizontal.count * across * feature_slabs) {}

  struct Tile {
    int n;
    int first_feature;
    int phase_h, phase_w;  // which phase of the image
    int row, column;       // its first output in that phase
  };
  FSC_DEVICE Tile tile(int index) const {
    Tile tile;
    tile.first_feature = index % feature_slabs * Traits::kFeatures, index /= feature_slabs;
    tile.column = index % across * tile_columns, index /= across;
    tile.phase_w = index % horizontal.count, index /= horizontal.count;
    tile.row = index % down * tile_rows, index /= down;
    tile.phase_h = index % vertical.count, index /= vertical.count;
    tile.n = index;
    return tile;
  }
};

// Where things lie in a block's shared memory, in bytes. What the plan computes as `shared_bytes`.
template <class Traits>
struct TensorForwardLayout {
  int rows, columns;                      // of a patch: the input pixels of a tile, halo included
  int slabs;                              // of channels, the last of which may be partly empty
  int channels;                           // in all slabs
  int bias, places, stages, stage_bytes;  // the taps lie at 0

  static constexpr int kFeaturesBytes = Traits::kFeatures * Traits::kChunks * 16;

  TensorForwardLayout(const ConvShape& shape, const TensorForwardTiles<Traits>& tiles) {
    rows = (tiles.tile_rows - 1) * tiles.vertical.inner_stride + shape.kernel_h;
    columns = (tiles.tile_columns - 1) * tiles.horizontal.inner_stride + shape.kernel_w;
    slabs = (shape.K + Traits::kSlab - 1) / Traits::kSlab;
    channels = slabs * Traits::kSlab;
    bias = shape.kernel_h * shape.kernel_w * channels * 4;  // after the taps, (taps, channels) float32
    places = bias + channels * 4;                           // (channels) float32
    stages = align(places + rows * columns * 4);            // a row and a column for each pixel of the patch
    // The swizzle exchanges a pair of neighbouring pixels' halves: the patch is whole pairs.
    stage_bytes = align(rows * columns * Traits::kChunks * 16) + kFeaturesBytes;
  }
  int bytes() const { return stages + Traits::kStages * stage_bytes; }

 private:
  static int align(int value) { return (value + 127) / 128 * 128; }
};

// What a launch adds to the call: computed once on the host, and read from constant memory.
template <class Traits>
struct TensorForwardParams {
  ForwardParams call;
  TensorForwardTiles<Traits> tiles;
  TensorForwardLayout<Traits> layout;

  explicit TensorForwardParams(const ForwardParams& params)
      : call(params), tiles(params.shape, params.tiling), layout(params.shape, tiles) {}
};

}  // namespace fused_sepconv
