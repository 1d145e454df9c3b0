// tensor_forward.cuh - fused depthwise + pointwise convolution, forward, on the tensor cores (mma.sync, sm_80 and
// newer).
//
// float16 and bfloat16, and float32 as TF32; x and y in NHWC. The depthwise result is computed in the very registers in
// which mma.sync wants its operand A: it never goes through any memory.
//
//   x (N, H, W, C)                              pointwise weight (F, K)       depthwise weight (K, taps)
//      | cp.async, 16 bytes a copy                  | cp.async                    | once a block, as float32
//      v                                            v                             v
//   patch[pixel + halo][64 bytes of channels]    b[128 features][64 bytes]     taps[tap][K]      shared memory
//      |                                            |                             |
//      '---- window of 4 pixels x 16 bytes a lane --+-----------------------------'
//                 | taps in float32, mid_act        |
//                 v                                 v
//              a: operand A, registers ---> mma.sync, acc[256 pixels x 128 features] in registers
//                                                   |  + bias + residual, act
//                                                   '---> y, 16 bytes a store
//
// Who owns what. A block takes a tile of the output: up to 64 runs of 4 neighbouring pixels, and 128 features. A warp
// owns 8 runs and all 128 features. Lane 4g + t of a warp convolves the 4 pixels of run g at the t-th 16 bytes of the
// slab's channels (8 of 16 bits, 4 of float32). To mma.sync these are rows g and g + 8 of two 16-row tiles, and of the
// columns of two steps in depth those that lane (g, t) must hold: which pixel is called which row, and which channel
// which column, is ours to choose, so long as operand B and the epilogue call them alike. Features are named so
// that a lane's results are 16 neighbouring bytes of y.
//
// What overlaps. Slabs (64 bytes of channels of a tile) run through a ring of kStages, kAhead of them in flight. Half
// of the warps, two on each of the SM's four schedulers with the other two, convolve slab i and then multiply it; the
// other half multiply slab i - 1 first: so at any time one half keeps the tensor cores busy and the other the
// CUDA cores. Blocks are persistent: a tile's epilogue runs while the next tile's slabs arrive.
//
// Why it is legal. The pointwise convolution has no halo, so a tile needs the depthwise results of its own pixels only.
// A dilated convolution is several undilated ones (phases.cuh), so that a patch never has holes.
//
// Floor. Device bytes: x + y + weights (+ residual). A tile reads its patch once a slab of 128 features: halo pixels
// and later slabs of F come from L2. The depthwise work is done again for each of them. For 3x3 in 16 bits, a warp
// issues about 1150 instructions a slab, twice the time of the matrix work that they overlap with: 730 to convolve (288
// multiply-adds and 144 conversions among them), 113 to multiply (64 of mma.sync), the rest to copy.
#pragma once

#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/matrix.h"
#include "../primitives/vector.h"
#include "activation.cuh"
#include "image.cuh"
#include "tensor_tiles.cuh"

namespace fused_sepconv {

template <class Traits>
class TensorForward {
  using Scalar = typename Traits::Scalar;
  using Words = Vector<uint32_t, Traits::kWords>;

 public:
  FSC_DEVICE TensorForward(const TensorForwardParams<Traits>& params, unsigned char* shared)
      : params_(params.call), shape_(params.call.shape), tiles_(params.tiles), layout_(params.layout), shared_(shared) {
    const int lane = threadIdx.x % 32;
    chunk_ = lane % 4;
    const int run = threadIdx.x / 32 * 8 + lane / 4;
    const int runs_across = tiles_.tile_columns / Traits::kRun;
    run_row_ = run / runs_across;
    run_column_ = run % runs_across * Traits::kRun;
    // A run past the tile's last repeats the first, so that it reads what is there; it stores nothing.
    const bool real = run_row_ < tiles_.tile_rows;
    first_pixel_ = real ? run_row_ * stride_h() * layout_.columns + run_column_ * stride_w() : 0;
    if (!real) run_row_ = -1;
  }

  FSC_DEVICE void run() {
    prepare();
    // Tiles blockIdx.x, blockIdx.x + gridDim.x, ...
    const int tiles = (tiles_.count - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    const int items = tiles * layout_.slabs;
    const bool lags = threadIdx.x / 32 / 4 % 2 == 1;  // warps w and w + 4 share a scheduler

    Loader loader(*this);
    for (int i = 0; i < Traits::kAhead; ++i) loader.load(i < items, i);

    int tile = blockIdx.x;              // whose slabs are multiplied
    int convolved = 0, multiplied = 0;  // slabs, of all tiles
    int convolved_slab = 0, multiplied_slab = 0;
    begin(tile);
    for (int item = 0; item <= items; ++item) {
      if (item < items) {
        async_copy_wait<Traits::kAhead - 1>();
        if (shape_.pre_activation != Activation::none && shape_.pre_activation != Activation::relu)
          loader.activate_arrived(item % Traits::kStages);
        __syncthreads();  // slab `item` is there for all, and nobody reads what the next copies overwrite
        loader.load(item + Traits::kAhead < items, (item + Traits::kAhead) % Traits::kStages);
      }
      FSC_ROLLED
      for (int half = 0; half < 2; ++half) {
        if ((half == 0) != lags) {
          if (convolved == items) continue;
          convolve(stage(convolved++), convolved_slab);
          if (++convolved_slab == layout_.slabs) convolved_slab = 0;
        } else if (multiplied < convolved) {
          multiply(stage(multiplied++));
          if (++multiplied_slab < layout_.slabs) continue;
          multiplied_slab = 0;
          finish(tiles_.tile(tile));
          begin(tile += gridDim.x);
        }
      }
    }
  }

 private:
  FSC_DEVICE int stride_h() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.vertical.inner_stride; }
  FSC_DEVICE int stride_w() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.horizontal.inner_stride; }
  FSC_DEVICE int kernel_h() const { return Traits::kKernel != 0 ? Traits::kKernel : shape_.kernel_h; }
  FSC_DEVICE int kernel_w() const { return Traits::kKernel != 0 ? Traits::kKernel : shape_.kernel_w; }

  FSC_DEVICE unsigned char* stage(int item) const {
    return shared_ + layout_.stages + item % Traits::kStages * layout_.stage_bytes;
  }

  // Where a 16-byte chunk of a patch's pixel lies. Neighbouring runs start 4 * stride pixels apart, which is a multiple
  // of the banks' 128 bytes: every other 4 * stride pixels are exchanged with their neighbours, so that the 8 lanes
  // that one access serves meet all banks.
  FSC_DEVICE static unsigned chunk_offset(unsigned pixel, unsigned chunk) {  // unsigned: division by a shift alone
    constexpr unsigned kPeriod = Traits::kRun * (Traits::kStride == 2 ? 2 : 1);
    return ((pixel * Traits::kChunks + chunk) ^ (pixel / kPeriod % 2 * Traits::kChunks)) * 16;
  }

  // What is the same for all tiles: the depthwise weights and biases as float32, and the places of a patch's pixels.
  FSC_DEVICE void prepare() {
    const Scalar* weight = static_cast<const Scalar*>(params_.depthwise_weight);
    const Scalar* bias = static_cast<const Scalar*>(params_.depthwise_bias);
    const int taps = kernel_h() * kernel_w();
    float* resident = reinterpret_cast<float*>(shared_);
    for (int k = threadIdx.x; k < layout_.channels; k += Traits::kThreads) {
      for (int tap = 0; tap < taps; ++tap)
        resident[tap * layout_.channels + k] =
            k < shape_.K ? convert<float>(weight[static_cast<int64_t>(k) * taps + tap]) : 0.0f;
      resident[taps * layout_.channels + k] = bias != nullptr && k < shape_.K ? convert<float>(bias[k]) : 0.0f;
    }
    uint32_t* places = reinterpret_cast<uint32_t*>(shared_ + layout_.places);
    for (int pixel = threadIdx.x; pixel < layout_.rows * layout_.columns; pixel += Traits::kThreads)
      places[pixel] = static_cast<uint32_t>(pixel / layout_.columns) << 16 | pixel % layout_.columns;
    __syncthreads();
  }

  // Brings the slabs of this block's tiles, one after the other.
  class Loader {
   public:
    FSC_DEVICE explicit Loader(TensorForward& kernel) : k_(kernel), index_(blockIdx.x), slab_(0) { enter(); }

    // Starts the copies of the next slab, if there is one, and closes their group.
    FSC_DEVICE void load(bool is_one, int stage_index) {
      if (is_one) {
        unsigned char* stage = k_.stage(stage_index);
        load_patch(shared_address(stage));
        load_weights(shared_address(stage + k_.layout_.stage_bytes - TensorForwardLayout<Traits>::kFeaturesBytes));
        if (++slab_ == k_.layout_.slabs) {
          slab_ = 0;
          index_ += gridDim.x;
          enter();
        }
      }
      async_copy_commit();
    }

    // Applies a pre-activation that is too long for the convolution's inner loop to what this thread's copies brought.
    FSC_DEVICE void activate_arrived(int stage_index) const {
      unsigned char* stage = k_.stage(stage_index);
      for (int pixel = threadIdx.x / Traits::kChunks; pixel < k_.layout_.rows * k_.layout_.columns;
           pixel += Traits::kThreads / Traits::kChunks) {
        Scalar* chunk = reinterpret_cast<Scalar*>(stage + chunk_offset(pixel, threadIdx.x % Traits::kChunks));
        for (int i = 0; i < Traits::kVector; ++i)
          chunk[i] = convert<Scalar>(activate(k_.shape_.pre_activation, convert<float>(chunk[i])));
      }
    }

   private:
    FSC_DEVICE void enter() {
      const auto tile = k_.tiles_.tile(index_);
      first_feature_ = tile.first_feature;
      h_ = k_.tiles_.vertical.input(tile.phase_h, tile.row);
      w_ = k_.tiles_.horizontal.input(tile.phase_w, tile.column);
      const Image& x = k_.params_.x;
      corner_ = static_cast<const Scalar*>(x.data) + tile.n * x.stride_n + h_ * x.stride_h + w_ * x.stride_w;
    }

    FSC_DEVICE void load_patch(SharedAddress stage) const {
      const ConvShape& shape = k_.shape_;
      const int chunk = threadIdx.x % Traits::kChunks;
      const int c = k_.first_channel(slab_) + chunk * Traits::kVector;
      const int pitch_h = k_.tiles_.vertical.pitch, pitch_w = k_.tiles_.horizontal.pitch;
      const int64_t down = pitch_h * k_.params_.x.stride_h, across = pitch_w * k_.params_.x.stride_w;
      const uint32_t* places = reinterpret_cast<const uint32_t*>(k_.shared_ + k_.layout_.places);
      for (int pixel = threadIdx.x / Traits::kChunks; pixel < k_.layout_.rows * k_.layout_.columns;
           pixel += Traits::kThreads / Traits::kChunks) {
        const uint32_t row = places[pixel] >> 16, column = places[pixel] & 0xffff;
        const int h = h_ + static_cast<int>(row) * pitch_h;
        const int w = w_ + static_cast<int>(column) * pitch_w;
        const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(shape.H) &&
                            static_cast<unsigned>(w) < static_cast<unsigned>(shape.W) && c < shape.C;
        const Scalar* source = corner_ + row * down + column * across + c;
        if (!inside) source = static_cast<const Scalar*>(k_.params_.x.data);
        async_copy<16>(stage + chunk_offset(pixel, chunk), source, inside);
      }
    }

    FSC_DEVICE void load_weights(SharedAddress features) const {
      const ConvShape& shape = k_.shape_;
      const Scalar* weight = static_cast<const Scalar*>(k_.params_.pointwise_weight);
      const int chunk = threadIdx.x % Traits::kChunks;
      const int channel = slab_ * Traits::kSlab + chunk * Traits::kVector;
      FSC_UNROLL
      for (int i = 0; i < Traits::kFeatures * Traits::kChunks / Traits::kThreads; ++i) {
        const int row = threadIdx.x / Traits::kChunks + i * (Traits::kThreads / Traits::kChunks);
        const int f = first_feature_ + row;
        const bool inside = f < shape.F && channel < shape.K;
        const Scalar* source = inside ? weight + static_cast<int64_t>(f) * shape.K + channel : weight;
        async_copy<16>(features + (row * Traits::kChunks + chunk) * 16, source, inside);
      }
    }

    TensorForward& k_;
    int index_;  // of the tile whose slabs are being loaded
    int slab_;   // the next of them
    int first_feature_, h_, w_;
    const Scalar* corner_;  // the patch's first pixel, where there is one
  };

  // The first channel of x in a slab's patch: with a depth multiplier, the aligned one at or before its first.
  FSC_DEVICE int first_channel(int slab) const {
    return slab * Traits::kSlab / shape_.multiplier / Traits::kVector * Traits::kVector;
  }

  // What the lane reads of kPixels pixels of the patch, `step` apart: kCount words of the depthwise channels' inputs,
  // from word `first` on, with the pre-activation.
  template <int kPixels, int kCount>
  FSC_DEVICE void read_window(const unsigned char* patch, int pixel, int step, int slab, int first,
                              Vector<uint32_t, kCount> (&window)[kPixels]) const {
    if (shape_.multiplier == 1) {
      FSC_UNROLL
      for (int i = 0; i < kPixels; ++i)
        window[i] =
            load<kCount>(reinterpret_cast<const uint32_t*>(patch + chunk_offset(pixel + i * step, chunk_)) + first);
    } else {
      const int channel = slab * Traits::kSlab + chunk_ * Traits::kVector + first * Traits::kPerWord;
      int c = channel / shape_.multiplier - first_channel(slab);
      int rest = channel % shape_.multiplier;
      FSC_UNROLL
      for (int word = 0; word < kCount; ++word) {
        Scalar scalars[kPixels][Traits::kPerWord];
        FSC_UNROLL
        for (int j = 0; j < Traits::kPerWord; ++j) {
          FSC_UNROLL
          for (int i = 0; i < kPixels; ++i) {
            const unsigned char* chunk = patch + chunk_offset(pixel + i * step, c / Traits::kVector);
            scalars[i][j] = reinterpret_cast<const Scalar*>(chunk)[c % Traits::kVector];
          }
          if (++rest == shape_.multiplier) rest = 0, ++c;
        }
        FSC_UNROLL
        for (int i = 0; i < kPixels; ++i) memcpy(&window[i][word], scalars[i], sizeof(uint32_t));
      }
    }
    if (shape_.pre_activation == Activation::relu) {
      FSC_UNROLL
      for (int i = 0; i < kPixels; ++i) {
        FSC_UNROLL
        for (int word = 0; word < kCount; ++word) window[i][word] = relu_packed<Scalar>(window[i][word]);
      }
    }
  }

  // The depthwise results of the lane's run at its channels of a slab, as operand A.
  FSC_DEVICE void convolve(const unsigned char* patch, int slab) {
    constexpr int kCount = Traits::kWordsAtOnce;
    constexpr int kChannels = kCount * Traits::kPerWord;
    FSC_UNROLL
    for (int first = 0; first < Traits::kWords; first += kCount) {
      const float* taps = reinterpret_cast<const float*>(shared_) + slab * Traits::kSlab + chunk_ * Traits::kVector +
                          first * Traits::kPerWord;
      Values<kChannels> sum[Traits::kRun];
      {
        float bias[kChannels];
        read(taps + layout_.bias / 4, bias);
        FSC_UNROLL
        for (int j = 0; j < Traits::kRun; ++j) {
          FSC_UNROLL
          for (int c = 0; c < kChannels; ++c) sum[j][c] = bias[c];
        }
      }
      FSC_ROLLED
      for (int i = 0; i < kernel_h(); ++i) {
        const int row = first_pixel_ + i * layout_.columns;
        if constexpr (Traits::kKernel != 0) {
          float weight[Traits::kKernel][kChannels];
          FSC_UNROLL
          for (int j = 0; j < Traits::kKernel; ++j)
            read(taps + (i * Traits::kKernel + j) * layout_.channels, weight[j]);
          constexpr int kColumns = (Traits::kRun - 1) * Traits::kStride + Traits::kKernel;
          Vector<uint32_t, kCount> window[kColumns];
          read_window(patch, row, 1, slab, first, window);
          FSC_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            float x[kChannels];
            as_float(window[column], x);
            FSC_UNROLL
            for (int j = 0; j < Traits::kKernel; ++j) {
              const int distance = column - j;
              if (distance < 0 || distance % Traits::kStride != 0 || distance / Traits::kStride >= Traits::kRun)
                continue;
              FSC_UNROLL
              for (int c = 0; c < kChannels; ++c) sum[distance / Traits::kStride][c] += weight[j][c] * x[c];
            }
          }
        } else {
          FSC_ROLLED
          for (int j = 0; j < kernel_w(); ++j) {
            float weight[kChannels];
            read(taps + (i * kernel_w() + j) * layout_.channels, weight);
            Vector<uint32_t, kCount> window[Traits::kRun];
            read_window(patch, row + j, stride_w(), slab, first, window);
            FSC_UNROLL
            for (int p = 0; p < Traits::kRun; ++p) {
              float x[kChannels];
              as_float(window[p], x);
              FSC_UNROLL
              for (int c = 0; c < kChannels; ++c) sum[p][c] += weight[c] * x[c];
            }
          }
        }
      }
      FSC_UNROLL
      for (int p = 0; p < Traits::kRun; ++p) {
        activate_all(shape_.mid_activation, sum[p]);
        FSC_UNROLL
        for (int w = 0; w < kCount; ++w) {
          const int word = first + w;
          a_[p / 2][word / 2][word % 2 * 2 + p % 2] = operand(&sum[p][w * Traits::kPerWord]);
        }
      }
    }
  }

  // acc += a * b: operand B comes straight from the rows of the pointwise weight.
  FSC_DEVICE void multiply(const unsigned char* stage) {
    const unsigned char* features = stage + layout_.stage_bytes - TensorForwardLayout<Traits>::kFeaturesBytes;
    const int column = threadIdx.x % 32 / 4;
    FSC_UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int row =
          tile / kTilesOfVectors * kGroup + column / 2 * Traits::kVector + tile % kTilesOfVectors * 2 + column % 2;
      Words b =
          load<Traits::kWords>(reinterpret_cast<const uint32_t*>(features + (row * Traits::kChunks + chunk_) * 16));
      if constexpr (sizeof(Scalar) == 4) {
        FSC_UNROLL
        for (int word = 0; word < Traits::kWords; ++word) {
          float value;
          memcpy(&value, &b[word], sizeof value);
          b[word] = operand(&value);
        }
      }
      FSC_UNROLL
      for (int step = 0; step < 2; ++step) {
        FSC_UNROLL
        for (int half = 0; half < 2; ++half)
          mma<Scalar>(acc_[half][tile], a_[half][step], b[2 * step], b[2 * step + 1]);
      }
    }
  }

  // The sums of a tile start from the bias. (From zeros, the compiler would keep a second copy of the loop's end for
  // constants, and spill a third of the accumulators.)
  FSC_DEVICE void begin(int tile) {
    const Scalar* bias = static_cast<const Scalar*>(params_.bias);
    const int first = tile % tiles_.feature_slabs * Traits::kFeatures + chunk_ * Traits::kVector;
    FSC_UNROLL
    for (int group = 0; group < Traits::kFeatures / kGroup; ++group) {
      const int f = first + group * kGroup;
      Vector<Scalar, Traits::kVector> vector{};
      if (bias != nullptr && f < shape_.F) vector = load_read_only<Traits::kVector>(bias + f);
      FSC_UNROLL
      for (int i = 0; i < Traits::kVector; ++i) {
        FSC_UNROLL
        for (int p = 0; p < Traits::kRun; ++p)
          acc_[p / 2][group * kTilesOfVectors + i / 2][p % 2 * 2 + i % 2] = convert<float>(vector[i]);
      }
    }
  }

  // y of the lane's run: kVector neighbouring features at a time.
  FSC_DEVICE void finish(const typename TensorForwardTiles<Traits>::Tile& tile) const {
    if (run_row_ < 0) return;
    const int oh = tiles_.vertical.output(tile.phase_h, tile.row + run_row_);
    if (oh >= shape_.out_h) return;
    const int first = tile.first_feature + chunk_ * Traits::kVector;
    FSC_UNROLL
    for (int p = 0; p < Traits::kRun; ++p) {
      const int ow = tiles_.horizontal.output(tile.phase_w, tile.column + run_column_ + p);
      if (ow >= shape_.out_w) continue;
      const Place place{tile.n, oh, ow};
      const Scalar* residual = static_cast<const Scalar*>(params_.residual.data);
      if (residual != nullptr) residual += offset(params_.residual, place, first);
      Scalar* y = static_cast<Scalar*>(params_.y.data) + offset(params_.y, place, first);
      FSC_UNROLL
      for (int group = 0; group < Traits::kFeatures / kGroup; ++group) {
        if (first + group * kGroup >= shape_.F) continue;
        Values<Traits::kVector> z;
        FSC_UNROLL
        for (int i = 0; i < Traits::kVector; ++i)
          z[i] = acc_[p / 2][group * kTilesOfVectors + i / 2][p % 2 * 2 + i % 2];
        if (residual != nullptr) add(z, residual + group * kGroup);
        activate_all(shape_.activation, z);
        Vector<Scalar, Traits::kVector> vector;
        FSC_UNROLL
        for (int i = 0; i < Traits::kVector; ++i) vector[i] = convert<Scalar>(z[i]);
        store(y + group * kGroup, vector);
      }
    }
  }

  FSC_DEVICE static void add(Values<Traits::kVector>& z, const Scalar* source) {
    const Vector<Scalar, Traits::kVector> vector = load_read_only<Traits::kVector>(source);
    FSC_UNROLL
    for (int i = 0; i < Traits::kVector; ++i) z[i] += convert<float>(vector[i]);
  }

  template <int kCount>
  FSC_DEVICE static void read(const float* source, float (&values)[kCount]) {
    constexpr int kAtOnce = kCount < 4 ? kCount : 4;
    FSC_UNROLL
    for (int i = 0; i < kCount; i += kAtOnce) {
      const auto vector = load<kAtOnce>(source + i);
      FSC_UNROLL
      for (int j = 0; j < kAtOnce; ++j) values[i + j] = vector[j];
    }
  }

  template <int kCount>
  FSC_DEVICE static void as_float(const Vector<uint32_t, kCount>& words, float (&values)[kCount * Traits::kPerWord]) {
    FSC_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(Scalar) == 4) {
        memcpy(&values[i], &words[i], sizeof(float));
      } else {
        const float2 pair = unpack<Scalar>(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

  // A word of an operand: two 16-bit values, or one of TF32.
  FSC_DEVICE static uint32_t operand(const float* values) {
    if constexpr (sizeof(Scalar) == 4)
      return to_tf32(values[0]);
    else
      return pack<Scalar>(values[0], values[1]);
  }

  static constexpr int kColumnTiles = Traits::kFeatures / 8;   // of mma.sync, 8 features wide
  static constexpr int kTilesOfVectors = Traits::kVector / 2;  // tiles that share 4 vectors of features
  static constexpr int kGroup = 4 * Traits::kVector;           // features of those

  // All in constant memory: none of it takes a register.
  const ForwardParams& params_;
  const ConvShape& shape_;
  const TensorForwardTiles<Traits>& tiles_;
  const TensorForwardLayout<Traits>& layout_;

  unsigned char* const shared_;
  int chunk_;                 // which 16 bytes of a slab are the lane's
  int run_row_, run_column_;  // where in the tile its run is; row -1: nowhere
  int first_pixel_;           // of the run's window in the patch
  uint32_t a_[2][2][4];       // operand A: two tiles of 16 pixels, two steps in depth
  float acc_[2][kColumnTiles][4];
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, 1)
tensor_forward(const FSC_CONST_PARAM TensorForwardParams<Traits> params) {
  FSC_SHARED_BYTES(shared);
  TensorForward<Traits>(params, shared).run();
}

}  // namespace fused_sepconv
