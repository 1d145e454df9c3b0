// weight_tiles.cuh - how the tensor-core gradient of the pointwise weight cuts a problem: tiles of the output
// and of the weight, and what a block keeps in shared memory. Computed on the host once a launch, and read by the
// kernel from constant memory, so that it takes no register.
//
// Tiles of the output. The pixels are the sum's depth here, so that empty places of a tile cost as much as full ones. A
// phase of an image (phases.cuh) is cut into strips of `columns`, and a strip into cells of kCellRows x 4 pixels, which
// are what a lane convolves at a time. The cells of a strip are numbered row after row, and a tile takes the next
// `cells` of them, wherever in a row it begins: 19 x 19 pixels are 50 cells of 2 rows, or 13 tiles of 4 cells, of which
// 2 stay empty, where rectangles of 1 x 4 cells would need 20.
//
//     columns 20:    | 0 0 0 0 1 |     a tile spans at most 2 rows of cells, and reads their patch: 4 + 2 rows of
//                    | 1 1 1 2 2 |     20 + 2 columns
//                    | 2 2 ...
#pragma once

#include "../common/divisor.cuh"
#include "../common/phases.cuh"
#include "../params.h"
#include "../primitives/platform.h"

namespace fused_sepconv {

// kernel: taps a side, inner_stride: of a phase (phases.cuh); 0 for any, read from the shape.
template <class Scalar_, int kernel, int inner_stride, int cell_rows>
struct MmaWeightTraits {
  using Scalar = Scalar_;
  static constexpr int kKernel = kernel;
  static constexpr int kStride = inner_stride;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRun = 4;  // neighbouring output pixels of a row: the columns of a cell
  static constexpr int kCellRows = cell_rows;
  static constexpr int kWarpTile = 64;   // features and channels of a warp
  static constexpr int kMostStages = 4;  // tiles in shared memory

  // A slab is 128 bytes of a pixel's channels or features: 32 words, one a lane, that meet every bank once.
  static constexpr int kLine = 128;
  static constexpr int kChunks = kLine / 16;
  static constexpr int kPerWord = 4 / sizeof(Scalar);          // channels of a 32-bit word
  static constexpr int kVector = 16 / sizeof(Scalar);          // of 16 bytes
  static constexpr int kSlab = kLine / sizeof(Scalar);         // of a slab
  static constexpr int kSlabsOfWarp = kWarpTile / kSlab;       // 1, or 2 of float32
  static constexpr int kDepth = sizeof(Scalar) == 2 ? 16 : 8;  // pixels of an mma.sync
  static constexpr int kRunsAtOnce = 4;                        // that a warp convolves with the taps in registers

  static_assert(sizeof(Scalar) == 2 || sizeof(Scalar) == 4, "float16, bfloat16, or float32 as TF32");
  static_assert((kernel == 0) == (inner_stride == 0), "either both are known or neither");
  static_assert(kRunsAtOnce % cell_rows == 0, "whole cells");
};

// One tile of the output: where its first row of cells begins, in its strip and phase, and how many cells of that row
// are another tile's.
struct MmaWeightItem {
  int n;
  int row, column;  // of the output, in its phase
  int skipped;      // cells
  int phase_h, phase_w;
};

template <class Traits>
struct MmaWeightTiles {
  Phases vertical, horizontal;
  int columns;                       // output columns of a strip, in whole cells
  int across, cells;                 // cells of a strip's row, and of a tile
  int runs, log_runs;                // rows of all cells of a tile: a power of two
  int feature_warps, channel_warps;  // a block's warps side by side
  int pixel_warps;                   // its warps that share the pixels of a tile
  int stages;                        // tiles in shared memory
  int feature_tiles, channel_tiles;  // of the weight
  int phase_rows, phase_columns;     // outputs of the longest phase
  int down, strips;                  // tiles of a strip, strips of a phase
  int count;                         // tiles of the output; the plan refuses more than an int holds
  Divisor by_across;

  MmaWeightTiles(const ConvShape& shape, const MmaWeightTiling& tiling)
      : vertical(shape.stride_h, shape.dilation_h, shape.pad_top),
        horizontal(shape.stride_w, shape.dilation_w, shape.pad_left),
        columns(tiling.columns),
        across(columns / Traits::kRun),
        cells(tiling.cells),
        runs(cells * Traits::kCellRows),
        log_runs(0),
        feature_warps(tiling.feature_warps),
        channel_warps(tiling.channel_warps),
        pixel_warps(Traits::kWarps / (feature_warps * channel_warps)),
        stages(tiling.stages),
        feature_tiles(divide_up(shape.F, Traits::kWarpTile * feature_warps)),
        channel_tiles(divide_up(shape.K, Traits::kWarpTile * channel_warps)),
        phase_rows(vertical.longest(shape.out_h)),
        phase_columns(horizontal.longest(shape.out_w)),
        down(divide_up(divide_up(phase_rows, Traits::kCellRows) * across, cells)),
        strips(divide_up(phase_columns, columns)),
        count(static_cast<int>(shape.N) * vertical.count * horizontal.count * strips * down),
        by_across(across) {
    while (1 << log_runs < runs) ++log_runs;
  }

  static int divide_up(int value, int by) { return (value + by - 1) / by; }

  // Tile `index`: those of a strip follow one another, then those of the next strip, phase and image.
  FSC_DEVICE MmaWeightItem item(int index) const {
    MmaWeightItem item;
    int first = index % down * cells;
    index /= down;
    item.skipped = by_across.split(first), item.row = first * Traits::kCellRows;
    item.column = index % strips * columns, index /= strips;
    item.phase_w = index % horizontal.count, index /= horizontal.count;
    item.phase_h = index % vertical.count;
    item.n = index / vertical.count;
    return item;
  }

  // The tile after it.
  FSC_DEVICE MmaWeightItem next(MmaWeightItem item) const {
    item.row += cells / across * Traits::kCellRows;
    item.skipped += cells % across;
    if (item.skipped >= across) item.skipped -= across, item.row += Traits::kCellRows;
    if (item.row < phase_rows) return item;
    item.row = item.skipped = 0;
    if ((item.column += columns) < phase_columns) return item;
    item.column = 0;
    if (++item.phase_w < horizontal.count) return item;
    item.phase_w = 0;
    if (++item.phase_h < vertical.count) return item;
    item.phase_h = 0;
    ++item.n;
    return item;
  }
};

// Where things lie in a block's shared memory, in bytes. What the plan computes as `shared_bytes`.
template <class Traits>
struct MmaWeightLayout {
  int channels;                               // of a block
  int slabs, feature_slabs;                   // 128 bytes of a pixel's channels each: of x and of grad_z
  int pixels;                                 // of a tile
  int rows, columns;                          // of a patch: the input pixels of a tile, halo included
  int bias, items;                            // the taps lie at 0
  int sources, windows, grads;                // where a tile's copies come from, and where its runs read their patch
  int intermediate, intermediate_slab_bytes;  // two tiles of the depthwise result
  int stages, stage_bytes;                    // each the slabs of a patch, then those of grad_z
  int patch_slab_bytes;
  Divisor by_columns;

  static constexpr int kItems = 8;    // a ring: fewer tiles are known at once
  static constexpr int kSources = 2;  // of them, those whose patch is still to be copied

  explicit MmaWeightLayout(const ConvShape& shape, const MmaWeightTiles<Traits>& tiles)
      : channels(tiles.channel_warps * Traits::kWarpTile),
        slabs(tiles.channel_warps * Traits::kSlabsOfWarp),
        feature_slabs(tiles.feature_warps * Traits::kSlabsOfWarp),
        pixels(tiles.runs * Traits::kRun),
        columns((tiles.columns - 1) * tiles.horizontal.inner_stride + shape.kernel_w),
        by_columns(columns) {
    // A tile that begins with the last cell of a row spans most rows, where its cells are no whole rows.
    const int begins = tiles.cells % tiles.across == 0 ? 0 : tiles.across - 1;
    const int spanned = (begins + tiles.cells - 1) / tiles.across + 1;
    const int all = (tiles.phase_rows + Traits::kCellRows - 1) / Traits::kCellRows;
    rows = ((spanned < all ? spanned : all) * Traits::kCellRows - 1) * tiles.vertical.inner_stride + shape.kernel_h;
    bias = shape.kernel_h * shape.kernel_w * channels * 4;  // after the taps, (taps, channels) float32
    items = bias + channels * 4;                            // (channels) float32
    sources = items + kItems * static_cast<int>(sizeof(MmaWeightItem));
    windows = sources + kSources * rows * columns * 4;
    grads = windows + kItems * tiles.runs * 4;
    intermediate = align(grads + kItems * tiles.runs * 4);
    intermediate_slab_bytes = pixels * Traits::kLine;
    patch_slab_bytes = rows * columns * Traits::kLine;
    stages = intermediate + 2 * slabs * intermediate_slab_bytes;
    stage_bytes = slabs * patch_slab_bytes + feature_slabs * pixels * Traits::kLine;
  }

  int bytes(const MmaWeightTiles<Traits>& tiles) const {
    const int all = stages + tiles.stages * stage_bytes;
    // At the end, the sums of the warps that share pixels are added through it.
    const int sums = tiles.pixel_warps == 1 ? 0
                                            : Traits::kWarps / tiles.pixel_warps * Traits::kWarpTile *
                                                  Traits::kWarpTile * static_cast<int>(sizeof(float));
    return all > sums ? all : sums;
  }

 private:
  static int align(int value) { return (value + 127) / 128 * 128; }
};

// The launch's own params: computed once on the host, and read from constant memory.
template <class Traits>
struct MmaWeightParams {
  BackwardParams call;
  MmaWeightTiles<Traits> tiles;
  MmaWeightLayout<Traits> layout;

  explicit MmaWeightParams(const BackwardParams& params)
      : call(params), tiles(params.shape, params.mma_weight), layout(params.shape, tiles) {}
};

}  // namespace fused_sepconv
