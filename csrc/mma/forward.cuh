// forward.cuh - fused depthwise + pointwise convolution, forward, on the tensor cores (mma.sync, sm_80 and
// newer).
//
// float16 and bfloat16, and float32 as TF32; x and y in NHWC.
//
//   x (N, H, W, C), depthwise weight and bias                pointwise weight (F, K)
//      | cp.async, 16 bytes a copy                              | cp.async
//      v                                                        v
//   patch and taps of a slab of channels                     features[128 or 256][slab]            shared memory
//      | mma_depthwise.cuh: float32, + bias, mid_act         |
//      v                                                        |
//   v[pixels][slab]                                             |                                  shared memory
//      '---------------------------- ldmatrix ------------------+
//                                                               v
//                                     mma.sync, acc[pixels x features] in registers
//                                                               |  + bias + residual, act
//                                                               '---> y, 16 bytes a store
//
// Who owns what. A block takes a tile of the output: 128 pixels x 256 features, or 256 x 128 where the plan finds that
// faster. The depthwise work is done again for every tile along F: 256 features halve it where there are as many. A
// warp owns 64 pixels x 64 features: of all shapes with as many accumulators, the one that reads the least shared
// memory. Its pixels are a row of all 16 cells. Features are named so that a lane's results are 16 neighbouring bytes
// of y.
//
// Overlap. Slabs (64 or 128 bytes of channels of a tile) run through a ring of stages. In one iteration, between
// two barriers, all warps convolve slab i and multiply slab i - 1. Half of the warps, one on each of the SM's four
// schedulers, convolve first, the other half multiply first: so at any time one half keeps the tensor cores busy and
// the other the CUDA cores. A stage has a slab's patch and the features of the slab before, which are used in the same
// iteration. Blocks are persistent: a tile's epilogue runs while the next tile's slabs arrive.
//
// Why it is right. The pointwise convolution has no halo, so a tile needs the depthwise results of its own pixels only.
// A dilated convolution is several undilated ones (phases.cuh), so that a patch never has holes.
//
// Floor. Device bytes: x + y + weights (+ residual). A tile reads its patch once a slab: halo pixels and later tiles
// along F come from L2. What it takes in 16 bits for 3x3, 128 x 256 and 64 channels, as nvcc 13.0 compiles it for
// sm_90a: a warp issues 583 instructions to convolve (288 multiply-adds, 114 conversions), 180 to multiply (128 of
// mma.sync) and 275 to copy, 2,080 cycles of each scheduler; shared memory is busy for some 2,050; the matrix work
// takes 2,048 cycles on an A100, some 1,650 on a Hopper. The three overlap: none of them alone is the limit.
#pragma once

#include "../common/activation.cuh"
#include "../common/image.cuh"
#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/matrix.h"
#include "../primitives/vector.h"
#include "depthwise.cuh"

namespace fused_sepconv {

// Tiles of 32,768 sums: `pixels` by as many features.
template <class Scalar, int kernel, int inner_stride, int pixels, int slab_bytes>
struct MmaForwardTraits : MmaTraits<Scalar, kernel, inner_stride, pixels, slab_bytes> {
  static constexpr int kFeatures = 128 * 256 / pixels;
  static constexpr int kFeaturesBytes = kFeatures * MmaForwardTraits::kSlabBytes;  // of a slab
  static constexpr int kMostStages = 4;
};

// Where things lie in a block's shared memory, in bytes. What the plan computes as `shared_bytes`. A stage has the
// features first, then the slab.
template <class Traits>
struct MmaForwardLayout {
  int operands, stages, stage_bytes;  // two tiles of operand A; the places of the patch's pixels lie at 0
  int bytes;

  MmaForwardLayout(const MmaSlabLayout<Traits>& slab, const MmaTiling& tiling) {
    operands = align(slab.table_bytes);
    stages = operands + 2 * MmaDepthwise<Traits>::kOperandBytes;
    stage_bytes = Traits::kFeaturesBytes + align(slab.bytes);
    bytes = stages + tiling.stages * stage_bytes;
  }

 private:
  static int align(int value) { return (value + 127) / 128 * 128; }
};

// The launch's own params: computed once on the host, and read from constant memory.
template <class Traits>
struct MmaForwardParams {
  ForwardParams call;
  MmaDepthwiseParams<Traits> depthwise;
  MmaForwardLayout<Traits> layout;
  Divisor feature_tiles;  // along F: the fastest index of a tile, so that neighbouring blocks share x in L2
  int tiles;              // in all; the plan refuses more than an int holds

  explicit MmaForwardParams(const ForwardParams& params)
      : call(params),
        depthwise(params, params.tiling),
        layout(depthwise.layout, params.tiling),
        feature_tiles((params.shape.F + Traits::kFeatures - 1) / Traits::kFeatures),
        tiles(depthwise.tiles.count * ((params.shape.F + Traits::kFeatures - 1) / Traits::kFeatures)) {}
};

template <class Traits>
class MmaForward {
  using Scalar = typename Traits::Scalar;
  using Depthwise = MmaDepthwise<Traits>;

 public:
  FSC_DEVICE MmaForward(const MmaForwardParams<Traits>& params, unsigned char* shared)
      : params_(params),
        call_(params.call),
        shape_(params.call.shape),
        layout_(params.layout),
        shared_(shared),
        depthwise_(params.depthwise, shared) {
    // Lane 8m + r of an ldmatrix points at row r of matrix m. Operand A's four are 16 pixels by two chunks, a step in
    // depth; operand B's are eight features by four chunks, two steps.
    row_of_ = kept(Depthwise::v_offset(warp_row() * kWarpPixels + lane() % 16, lane() / 16));
    const int column = lane() % 8;
    const int feature = warp_column() * kWarpFeatures + column / 2 * Traits::kVector + column % 2;
    column_of_ = kept(features_offset(feature, lane() / 8));
  }

  FSC_DEVICE void run() {
    // Tiles blockIdx.x, blockIdx.x + gridDim.x, ...
    const int tiles = (params_.tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    const int slabs = params_.depthwise.layout.slabs;
    const int items = tiles * slabs;
    const int ahead = call_.tiling.stages - 1;
    const bool lags = threadIdx.x / 32 / 4 % 2 == 1;  // warps w and w + 4 share a scheduler

    Loader loader(*this, items);
    for (int i = 0; i < ahead; ++i) loader.load();

    unsigned char* stage = shared_ + layout_.stages;  // of slab `item`, and of the features of the one before
    int tile = blockIdx.x;                            // whose slabs are multiplied
    int slab = 0, convolved_slab = 0;                 // of a tile: the next to be multiplied and convolved
    int v = layout_.operands, v_before = v + Depthwise::kOperandBytes;  // what they convolve to, and multiply from
    begin(tile);
    for (int item = 0; item <= items; ++item) {
      wait_for_oldest();
      unsigned char* const brought = stage + Traits::kFeaturesBytes;
      if (item < items) depthwise_.arrived(convolved_slab, brought);
      // Slab `item` is there for all, the one before is convolved, and nobody reads what is overwritten from here on.
      __syncthreads();
      loader.load();
      if (lags && item > 0) multiply(shared_ + v_before, stage, slab);
      if (item < items) depthwise_.convolve(brought, shared_ + v);
      if (!lags && item > 0) multiply(shared_ + v_before, stage, slab);
      if (item > 0 && ++slab == slabs) {
        slab = 0;
        finish(tile);
        begin(tile += gridDim.x);
      }
      if (++convolved_slab == slabs) convolved_slab = 0;
      stage = next(stage);
      const int swapped = v;
      v = v_before, v_before = swapped;
    }
  }

 private:
  FSC_DEVICE unsigned char* next(unsigned char* stage) const {
    stage += layout_.stage_bytes;
    return stage == shared_ + layout_.bytes ? shared_ + layout_.stages : stage;
  }

  // All groups of copies but the newest `stages - 2`; how many those are must be known to the compiler.
  FSC_DEVICE void wait_for_oldest() const {
    static_assert(Traits::kMostStages == 4, "two to four stages");
    if (call_.tiling.stages == 2)
      async_copy_wait<0>();
    else if (call_.tiling.stages == 3)
      async_copy_wait<1>();
    else
      async_copy_wait<2>();
  }

  // Brings the slabs of this block's tiles, one after the other, and the features of each one slab later.
  class Loader {
   public:
    FSC_DEVICE Loader(MmaForward& kernel, int items)
        : k_(kernel), items_(items), item_(0), tile_(blockIdx.x), slab_(0), features_slab_(0) {
      stage_ = k_.shared_ + k_.layout_.stages;
      enter_features(tile_);
    }

    // Starts the copies of the next slab and of the features of the one before, if there are any; closes their group.
    FSC_DEVICE void load() {
      if (item_ > 0 && item_ <= items_) {
        load_features(shared_address(stage_));
        if (++features_slab_ == k_.params_.depthwise.layout.slabs) {
          features_slab_ = 0;
          enter_features(tile_);
        }
      }
      if (item_ < items_) {
        if (slab_ == 0) k_.depthwise_.enter(k_.params_.depthwise.tiles.tile(k_.params_.feature_tiles.quotient(tile_)));
        k_.depthwise_.load(slab_, stage_ + Traits::kFeaturesBytes);
        if (++slab_ == k_.params_.depthwise.layout.slabs) {
          slab_ = 0;
          tile_ += gridDim.x;
        }
      }
      async_copy_commit();
      ++item_;
      stage_ = k_.next(stage_);
    }

   private:
    FSC_DEVICE void enter_features(int tile) {
      chunk_ = threadIdx.x % Traits::kChunks;
      first_feature_ = k_.params_.feature_tiles.split(tile) * Traits::kFeatures + threadIdx.x / Traits::kChunks;
      FSC_UNROLL
      for (int i = 0; i < kFeaturesOfThread; ++i) {
        const int feature = first_feature_ + i * kFeaturesAtOnce;
        place_[i] = feature < k_.shape_.F ? static_cast<unsigned>(feature) * chunks() : 0;
      }
    }

    FSC_DEVICE int chunks() const { return k_.params_.depthwise.layout.chunks; }

    FSC_DEVICE void load_features(SharedAddress destination) {
      destination += features_offset(threadIdx.x / Traits::kChunks, threadIdx.x % Traits::kChunks);
      const bool real = chunk_ < chunks();
      const unsigned char* weight = static_cast<const unsigned char*>(k_.call_.pointwise_weight);
      weight += (real ? chunk_ : 0) * 16;
      FSC_UNROLL
      for (int i = 0; i < kFeaturesOfThread; ++i) {
        const bool inside = real && first_feature_ + i * kFeaturesAtOnce < k_.shape_.F;
        async_copy<16>(destination + i * kFeaturesAtOnce * Traits::kSlabBytes, vector_at(weight, place_[i]), inside);
      }
      chunk_ += Traits::kChunks;
    }

    static constexpr int kFeaturesAtOnce = Traits::kThreads / Traits::kChunks;
    static constexpr int kFeaturesOfThread = Traits::kFeatures / kFeaturesAtOnce;

    MmaForward& k_;
    const int items_;
    int item_;
    unsigned char* stage_;               // that it comes to
    int tile_, slab_;                    // whose patch comes next
    int features_slab_;                  // whose features
    int first_feature_;                  // that this thread brings of the tile's
    int chunk_;                          // of their weights
    unsigned place_[kFeaturesOfThread];  // where those begin, in chunks; the plan refuses more than 32 bits number
  };

  // Where a chunk of a feature's weights lies, so that ldmatrix finds the eight features of a tile in different banks.
  FSC_DEVICE static int features_offset(int row, int chunk) {
    const int exchange = row / Traits::kVector % 4;
    return row * Traits::kSlabBytes + (chunk ^ (Traits::kSlabBytes == 64 ? exchange : exchange * 2 + row % 2)) * 16;
  }

  // acc += v * b, 64 bytes of channels at a time, as far as there are any.
  FSC_DEVICE void multiply(const unsigned char* v, const unsigned char* features, int slab) {
    const SharedAddress rows = shared_address(v), columns = shared_address(features);
    FSC_UNROLL
    for (int part = 0; part < Traits::kSlabBytes / 64; ++part) {
      if (part > 0 && slab * Traits::kSlab + part * kPartChannels >= shape_.K) break;
      uint32_t a[2][kRowTiles][4];
      FSC_UNROLL
      for (int step = 0; step < 2; ++step) {
        FSC_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile)
          ldmatrix_x4(a[step][tile], rows + (row_of_ ^ (part * 64 + step * 32)) + tile * 16 * Traits::kSlabBytes);
      }
      // The features of its two or four neighbours in a tile have the same exchange of chunks.
      FSC_UNROLL
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        const int first = tile / kTilesOfVectors * kGroup + tile % kTilesOfVectors * 2;
        uint32_t b[4];
        ldmatrix_x4(b, columns + (column_of_ ^ (part * 64)) + first * Traits::kSlabBytes);
        if constexpr (sizeof(Scalar) == 4) {
          FSC_UNROLL
          for (int word = 0; word < 4; ++word) {
            float value;
            memcpy(&value, &b[word], sizeof value);
            b[word] = to_tf32(value);
          }
        }
        FSC_UNROLL
        for (int step = 0; step < 2; ++step) {
          FSC_UNROLL
          for (int row_tile = 0; row_tile < kRowTiles; ++row_tile)
            mma<Scalar>(acc_[row_tile][tile], a[step][row_tile], b[2 * step], b[2 * step + 1]);
        }
      }
    }
  }

  // The lane's first feature of a tile's; the others of its 16 bytes follow, and further groups kGroup apart.
  FSC_DEVICE int first_feature(int tile) const {
    return params_.feature_tiles.split(tile) * Traits::kFeatures + warp_column() * kWarpFeatures +
           lane() % 4 * Traits::kVector;
  }

  // The sums of a tile start from the bias. (From zeros, the compiler would keep a second copy of the loop's end for
  // constants, and spill a third of the accumulators.)
  FSC_DEVICE void begin(int tile) {
    const Scalar* bias = static_cast<const Scalar*>(call_.bias);
    const int first = first_feature(tile);
    FSC_UNROLL
    for (int group = 0; group < kWarpFeatures / kGroup; ++group) {
      const int f = first + group * kGroup;
      Vector<Scalar, Traits::kVector> vector{};
      if (bias != nullptr && f < shape_.F) vector = load_read_only<Traits::kVector>(bias + f);
      FSC_UNROLL
      for (int i = 0; i < Traits::kVector; ++i) {
        FSC_UNROLL
        for (int row = 0; row < 2 * kRowTiles; ++row)
          acc_[row / 2][group * kTilesOfVectors + i / 2][row % 2 * 2 + i % 2] = convert<float>(vector[i]);
      }
    }
  }

  FSC_DEVICE void finish(int tile) const {
    if (call_.residual.data == nullptr && shape_.activation == Activation::none)
      finish_as<true>(tile);
    else
      finish_as<false>(tile);
  }

  // y of the lane's pixels, a row of two cells, kVector neighbouring features at a time. kPlain: no residual and no
  // activation, a third of the instructions.
  template <bool kPlain>
  FSC_DEVICE void finish_as(int index) const {
    static_assert(kWarpPixels == Traits::kCells * Traits::kCellColumns, "a warp has one row of every cell");
    const MmaTiles<Traits>& tiles = params_.depthwise.tiles;
    const auto tile = tiles.tile(params_.feature_tiles.quotient(index));
    const int first = first_feature(index);
    const Image &y = call_.y, &residual = call_.residual;
    const int64_t step = tiles.horizontal.count * y.stride_w;
    const int64_t residual_step = tiles.horizontal.count * residual.stride_w;
    FSC_UNROLL
    for (int half = 0; half < 2; ++half) {
      int row, column;
      if (!depthwise_.place(warp_row() * kWarpPixels + half * 8 + lane() / 4, row, column)) continue;
      const Place place{tile.n, tiles.output_row(tile, row), tiles.output_column(tile, column)};
      if (place.oh >= shape_.out_h) continue;
      Scalar* to = static_cast<Scalar*>(y.data) + offset(y, place, first);
      const Scalar* from = nullptr;
      if (!kPlain && residual.data != nullptr)
        from = static_cast<const Scalar*>(residual.data) + offset(residual, place, first);
      FSC_UNROLL
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        if (place.ow + row_tile * tiles.horizontal.count < shape_.out_w) {
          FSC_UNROLL
          for (int group = 0; group < kWarpFeatures / kGroup; ++group) {
            if (first + group * kGroup >= shape_.F) continue;
            Values<Traits::kVector> z;
            FSC_UNROLL
            for (int i = 0; i < Traits::kVector; ++i)
              z[i] = acc_[row_tile][group * kTilesOfVectors + i / 2][half * 2 + i % 2];
            if constexpr (!kPlain) {
              if (from != nullptr) add(z, from + group * kGroup);
              activate_all(shape_.activation, z);
            }
            Vector<Scalar, Traits::kVector> vector;
            FSC_UNROLL
            for (int i = 0; i < Traits::kVector; ++i) vector[i] = convert<Scalar>(z[i]);
            store_global(to + group * kGroup, vector);
          }
        }
        to += step;
        if (!kPlain && from != nullptr) from += residual_step;
      }
    }
  }

  FSC_DEVICE static void add(Values<Traits::kVector>& z, const Scalar* source) {
    const Vector<Scalar, Traits::kVector> vector = load_read_only<Traits::kVector>(source);
    FSC_UNROLL
    for (int i = 0; i < Traits::kVector; ++i) z[i] += convert<float>(vector[i]);
  }

  static constexpr int kWarpPixels = 64, kWarpFeatures = 64;
  static constexpr int kWarpColumns = Traits::kFeatures / kWarpFeatures;
  static constexpr int kPartChannels = 64 / sizeof(Scalar);
  static constexpr int kRowTiles = kWarpPixels / 16;           // of mma.sync, 16 pixels high
  static constexpr int kColumnTiles = kWarpFeatures / 8;       // and 8 features wide
  static constexpr int kTilesOfVectors = Traits::kVector / 2;  // column tiles that share 4 vectors of features
  static constexpr int kGroup = 4 * Traits::kVector;           // features of those
  static_assert(kWarpPixels * kWarpFeatures * Traits::kWarps == Traits::kPixels * Traits::kFeatures, "a warp's part");

  FSC_DEVICE static int lane() { return threadIdx.x % 32; }
  FSC_DEVICE static int warp_row() { return threadIdx.x / 32 / kWarpColumns; }
  FSC_DEVICE static int warp_column() { return threadIdx.x / 32 % kWarpColumns; }

  // All in constant memory: none of it takes a register.
  const MmaForwardParams<Traits>& params_;
  const ForwardParams& call_;
  const ConvShape& shape_;
  const MmaForwardLayout<Traits>& layout_;

  unsigned char* const shared_;
  Depthwise depthwise_;
  int row_of_, column_of_;  // what the lane points ldmatrix at, of v and of the features
  float acc_[kRowTiles][kColumnTiles][4];
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, 1)
mma_forward(const FSC_CONST_PARAM MmaForwardParams<Traits> params) {
  FSC_SHARED_BYTES(shared);
  MmaForward<Traits>(params, shared).run();
}

}  // namespace fused_sepconv
