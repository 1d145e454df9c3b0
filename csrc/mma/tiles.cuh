// tiles.cuh - how the tensor-core kernels cut a problem into tiles of output pixels and slabs of depthwise
// channels, and how they lay out in shared memory what a slab brings. Computed on the host once a launch, and read by
// the kernels from constant memory, so that it takes no register.
#pragma once

#include "../common/divisor.cuh"
#include "../common/phases.cuh"
#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

// kernel: taps a side, inner_stride: of a phase (phases.cuh); 0 for any, read from the shape. pixels: of a tile.
// slab_bytes: of a pixel's channels that are convolved and multiplied at a time.
template <class Scalar_, int kernel, int inner_stride, int pixels, int slab_bytes = 64>
struct MmaTraits {
  using Scalar = Scalar_;
  static constexpr int kKernel = kernel;
  static constexpr int kStride = inner_stride;
  static constexpr int kPixels = pixels;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;

  static constexpr int kSlabBytes = slab_bytes;
  static constexpr int kWords = kSlabBytes / 4;
  static constexpr int kChunks = kSlabBytes / 16;
  static constexpr int kPerWord = 4 / sizeof(Scalar);  // channels
  static constexpr int kVector = 16 / sizeof(Scalar);  // channels of a chunk
  static constexpr int kSlab = kChunks * kVector;      // channels

  static constexpr int kPixelsAtOnce = kThreads / kChunks;  // that the block copies

  // A thread convolves one word of channels of a cell: neighbouring pixels, so that it reads each input pixel once for
  // all outputs that need it. Then it does the same for the other cells that are its own.
  static constexpr int kCells = 16;  // of a tile
  static constexpr int kCellPixels = kPixels / kCells;
  static constexpr int kCellColumns = 4;
  static constexpr int kCellRows = kCellPixels / kCellColumns;
  static constexpr int kCellsAtOnce = kThreads / kWords;
  static constexpr int kPasses = kCells / kCellsAtOnce;

  static_assert(sizeof(Scalar) == 2 || sizeof(Scalar) == 4, "float16, bfloat16, or float32 as TF32");
  static_assert((kernel == 0) == (inner_stride == 0), "either both are known or neither");
  static_assert(kSlabBytes == 64 || kSlabBytes == 128, "half of the banks, or all of them");
  static_assert(kPasses * kCellsAtOnce == kCells, "as many cells for every thread");
  static_assert(kCellRows > 0 && kCells * kCellRows * kCellColumns == kPixels, "whole cells");
};

// The tiles of a problem, and where one lies.
template <class Traits>
struct MmaTiles {
  Phases vertical, horizontal;
  int rows, columns;  // outputs of a tile: whole cells, at most kCells of them
  int down, across;   // tiles along a phase's rows and columns
  int count;          // in all; the plan refuses more than an int holds
  Divisor by_across, by_phases_w, by_down, by_phases_h;
  Divisor by_cells;  // of a tile's row

  MmaTiles(const ConvShape& shape, const MmaTiling& tiling)
      : vertical(shape.stride_h, shape.dilation_h, shape.pad_top),
        horizontal(shape.stride_w, shape.dilation_w, shape.pad_left),
        rows(tiling.rows),
        columns(tiling.columns),
        down((vertical.longest(shape.out_h) + rows - 1) / rows),
        across((horizontal.longest(shape.out_w) + columns - 1) / columns),
        count(static_cast<int>(shape.N) * vertical.count * down * horizontal.count * across),
        by_across(across),
        by_phases_w(horizontal.count),
        by_down(down),
        by_phases_h(vertical.count),
        by_cells(columns / Traits::kCellColumns) {}

  struct Tile {
    int n;
    int phase_h, phase_w;  // which phase of the image
    int row, column;       // its first output in that phase
  };
  FSC_DEVICE Tile tile(int index) const {
    Tile tile;
    tile.column = by_across.split(index) * columns;
    tile.phase_w = by_phases_w.split(index);
    tile.row = by_down.split(index) * rows;
    tile.phase_h = by_phases_h.split(index);
    tile.n = index;
    return tile;
  }
  FSC_DEVICE int output_row(const Tile& tile, int row) const { return vertical.output(tile.phase_h, tile.row + row); }
  FSC_DEVICE int output_column(const Tile& tile, int column) const {
    return horizontal.output(tile.phase_w, tile.column + column);
  }
};

// Bytes that a slab of a tile brings to shared memory:
//
//   0            the patch: the tile's input pixels, halo included, kSlabBytes each
//   patch_bytes  the slab's depthwise weights, (channels, taps) as they lie in global memory
//                its depthwise biases, kSlabBytes
template <class Traits>
struct MmaSlabLayout {
  int slabs;          // of depthwise channels, the last of which may be partly empty
  int chunks;         // of 16 bytes, of all channels
  int rows, width;    // of a patch
  int columns;        // what a row of it takes: even, for the swizzle exchanges neighbours
  int copied_pixels;  // as all threads copy as many: a multiple of kPixelsAtOnce
  int patch_bytes;
  int bytes;        // of a slab: a multiple of 64
  int table_bytes;  // where a patch's pixels are in x, beside all slabs (MmaDepthwise)
  Divisor by_columns{1};

  MmaSlabLayout(const ConvShape& shape, const MmaTiles<Traits>& tiles) {
    slabs = (shape.K + Traits::kSlab - 1) / Traits::kSlab;
    chunks = shape.K / Traits::kVector;
    rows = (tiles.rows - 1) * tiles.vertical.inner_stride + shape.kernel_h;
    width = (tiles.columns - 1) * tiles.horizontal.inner_stride + shape.kernel_w;
    columns = (width + 1) / 2 * 2;
    copied_pixels = (rows * columns + Traits::kPixelsAtOnce - 1) / Traits::kPixelsAtOnce * Traits::kPixelsAtOnce;
    patch_bytes = copied_pixels * Traits::kSlabBytes;
    bytes = patch_bytes + (shape.kernel_h * shape.kernel_w + 1) * Traits::kSlabBytes;
    by_columns = Divisor(columns);
    table_bytes = copied_pixels * static_cast<int>(sizeof(uint32_t));
  }
};

}  // namespace fused_sepconv
