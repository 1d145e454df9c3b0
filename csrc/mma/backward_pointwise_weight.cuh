// backward_pointwise_weight.cuh - the gradients of the pointwise weight and of the last bias, on the tensor
// cores (mma.sync, sm_80 and newer).
//
// float16 and bfloat16, and float32 as TF32; x and grad_z in NHWC. The depthwise result is computed again, as an
// operand: nothing of it was saved by the forward, and none of it goes to device memory here.
//
//   x (N, H, W, C)                     depthwise weight      grad_z (N, out_h, out_w, F)
//      | cp.async, 16 bytes a copy        | once a block         | cp.async
//      v                                  v                      v
//   patch[slab][pixel + halo][128 B]   taps[tap][channel]     grad_z[slab][pixel][128 B]        shared memory
//      |                                  |                      |
//      '---- a word of channels a lane ---'                      |
//                 | taps in float32, + bias, mid_act             |
//                 v                                              |
//   v[slab][pixel][128 B], two tiles                             |                              shared memory
//                 | ldmatrix, transposing: operand B             | the same: operand A
//                 '--------> mma.sync over the pixels <----------'
//                               |  acc[feature][channel] in registers, over all tiles of the part
//                               v
//   partial_weight (parts, F, K), partial_bias (parts, F)  --- reduce_splits, in order --->  the gradients
//
// Who owns what. A block owns a tile of the weight, 64 features x feature_warps by 64 channels x channel_warps, and one
// part of the tiles of pixels (mma_weight_tiles.cuh), which it takes one after the other. A warp multiplies 64
// features by 64 channels: with 8 of them 256 x 128, for which a pixel's 384 channels and features are loaded. Where
// the weight has fewer, the warps left over share the pixels of a tile, and their sums are added at the end, in order.
// Lane w of a warp convolves word w of a slab (two channels of 16 bits, or one of float32) at 4 runs of 4 pixels: the
// taps stay in its registers meanwhile, and all lanes together read 128 bytes of a pixel.
//
// The order of the pixels in the product is ours to choose, so long as v and grad_z agree: both are laid out pixel
// after pixel. In 16 bits, chunk c of pixel p lies at chunk c ^ (p % 8) of its line, so that the 8 rows that ldmatrix
// reads at once meet all banks. TF32 has no transposing load: lane (g, q) reads pixels q and q + 4 by itself, and as
// chunk c lies at c ^ 2 * (p % 4), the lanes of one access meet all banks too.
//
// Overlap. Tiles run through a ring of 2 to 4 stages; all but one of them are on their way. Half of the warps,
// two on each of the SM's four schedulers with the other two, convolve tile i and then multiply tile i - 1; the other
// half multiply first: so at any time one half keeps the tensor cores busy and the other the CUDA cores. One barrier a
// tile: v has two buffers, and grad_z of a tile is loaded one tile after its patch, as it is needed.
//
// Why it is right. The pointwise convolution has no halo: a tile's products need the depthwise results of its own
// pixels only. Pixels that a tile has past its image count as zero in both operands: NaN times zero would be NaN.
//
// Floor. Device bytes: x + grad_z + the parts, written and read. The blocks of one part are neighbours: they read the
// same tiles at about the same time, so that all but the first take them from L2. The depthwise work is done again for
// each 256 features: it is what the kernel's time goes to. For 3x3 in 16 bits and 256 x 128, a warp issues about 1100
// instructions for a tile of 64 pixels: 530 to convolve (288 multiply-adds and 72 conversions among them), 220 to
// multiply (128 of mma.sync), 250 to copy, and the rest to find places and to go round.
#pragma once

#include "../common/activation.cuh"
#include "../common/operand.cuh"
#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/matrix.h"
#include "../primitives/vector.h"
#include "../primitives/warp.h"
#include "weight_tiles.cuh"

namespace fused_sepconv {

template <class Traits>
class MmaBackwardPointwiseWeight {
  using Scalar = typename Traits::Scalar;
  using Item = MmaWeightItem;

 public:
  FSC_DEVICE MmaBackwardPointwiseWeight(const MmaWeightParams<Traits>& params, unsigned char* shared)
      : params_(params.call), shape_(params.call.shape), tiles_(params.tiles), layout_(params.layout), shared_(shared) {
    int block = blockIdx.x;
    first_feature_ = block % tiles_.feature_tiles * Traits::kWarpTile * tiles_.feature_warps;
    block /= tiles_.feature_tiles;
    first_channel_ = block % tiles_.channel_tiles * Traits::kWarpTile * tiles_.channel_warps;
    part_ = block / tiles_.channel_tiles;
    const int warp = threadIdx.x / 32;
    feature_warp_ = warp % tiles_.feature_warps;
    channel_warp_ = warp / tiles_.feature_warps % tiles_.channel_warps;
    pixel_warp_ = warp / tiles_.feature_warps / tiles_.channel_warps;
  }

  FSC_DEVICE void run() {
    const int begin = static_cast<int>(static_cast<int64_t>(tiles_.count) * part_ / params_.splits);
    const int end = static_cast<int>(static_cast<int64_t>(tiles_.count) * (part_ + 1) / params_.splits);
    const int items = end - begin;
    const int ahead = tiles_.stages - 1;
    const bool lags = threadIdx.x / 32 / 4 % 2 == 1;  // warps w and w + 4 share a scheduler
    prepare(begin);

    // Group i of copies: the patch of tile i + ahead, and grad_z of the tile before it. What they need to know of a
    // tile is found one iteration earlier.
    int loaded = 0;  // the stage of the next patch
    for (int i = -ahead; i < 0; ++i) {
      loaded = load(i + ahead, items, loaded);
      describe(i + ahead + 1);
      __syncthreads();
    }

    clear();
    float bias_sum[Traits::kPerWord] = {};
    int convolved = 0, multiplied = 0;  // their stages
    for (int i = 0; i <= items; ++i) {
      wait(ahead);
      if (i < items && shape_.pre_activation != Activation::none && shape_.pre_activation != Activation::relu)
        activate_arrived(convolved);
      __syncthreads();  // tile i is there for all, v of the tile before too, and nobody reads what is written next
      loaded = load(i + ahead, items, loaded);
      describe(i + ahead + 1);
      FSC_ROLLED
      for (int half = 0; half < 2; ++half) {
        if ((half == 0) != lags) {
          if (i < items) convolve(stage(convolved), intermediate(i), windows(i));
        } else if (i > 0) {
          const unsigned char* grad_z = stage(multiplied) + layout_.slabs * layout_.patch_slab_bytes;
          multiply(grad_z, intermediate(i - 1));
          if (params_.partial_bias != nullptr && first_channel_ == 0) add_to_bias(grad_z, bias_sum);
        }
      }
      multiplied = convolved;
      convolved = after(convolved);
    }
    add_over_warps();
    if (pixel_warp_ == 0) finish();
    if (params_.partial_bias != nullptr && first_channel_ == 0) finish_bias(bias_sum);
  }

 private:
  FSC_DEVICE int stride_h() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.vertical.inner_stride; }
  FSC_DEVICE int stride_w() const { return Traits::kStride != 0 ? Traits::kStride : tiles_.horizontal.inner_stride; }
  FSC_DEVICE int kernel_h() const { return Traits::kKernel != 0 ? Traits::kKernel : shape_.kernel_h; }
  FSC_DEVICE int kernel_w() const { return Traits::kKernel != 0 ? Traits::kKernel : shape_.kernel_w; }

  FSC_DEVICE unsigned char* stage(int index) const { return shared_ + layout_.stages + index * layout_.stage_bytes; }
  FSC_DEVICE int after(int stage) const { return stage + 1 == tiles_.stages ? 0 : stage + 1; }
  FSC_DEVICE unsigned char* intermediate(int i) const {
    return shared_ + layout_.intermediate + i % 2 * layout_.slabs * layout_.intermediate_slab_bytes;
  }
  FSC_DEVICE Item& item(int i) const {
    return reinterpret_cast<Item*>(shared_ + layout_.items)[i % MmaWeightLayout<Traits>::kItems];
  }
  // For each pixel of a tile's patch: where it is in its image of x, in units of 16 bytes, or kOutside.
  FSC_DEVICE int32_t* sources(int i) const {
    constexpr int kSources = MmaWeightLayout<Traits>::kSources;
    return reinterpret_cast<int32_t*>(shared_ + layout_.sources) + i % kSources * layout_.rows * layout_.columns;
  }
  // For each run of a tile: the first pixel of its patch that it reads, and how many of its pixels the image has.
  FSC_DEVICE uint32_t* windows(int i) const {
    return reinterpret_cast<uint32_t*>(shared_ + layout_.windows) + i % MmaWeightLayout<Traits>::kItems * tiles_.runs;
  }
  // For each run of a tile: where it is in its image of grad_z, in units of 16 bytes.
  FSC_DEVICE int32_t* grads(int i) const {
    return reinterpret_cast<int32_t*>(shared_ + layout_.grads) + i % MmaWeightLayout<Traits>::kItems * tiles_.runs;
  }
  static constexpr int32_t kOutside = -1;
  static constexpr unsigned kInsideBits = 3;  // of a window: 0 to 4 pixels

  // A place in a pixel's line is exchanged with another one's.
  FSC_DEVICE static unsigned swizzle(unsigned pixel) { return sizeof(Scalar) == 2 ? pixel % 8 * 16 : pixel % 4 * 32; }

  // The word of a line of v that holds word `word` of a slab's channels. Pairs of channels of 16 are dealt out to two
  // products: lane (g, q) of the warp gets columns 2q and 2q + 1 of each, and with them 4 neighbouring channels, which
  // it stores at once.
  FSC_DEVICE static unsigned place_in_line(unsigned word) {
    return sizeof(Scalar) == 2 ? word / 8 * 8 + word % 2 * 4 + word / 2 % 4
                               : word / 16 * 16 + word / 2 % 2 * 8 + word % 16 / 4 * 2 + word % 2;
  }

  // Same for all tiles: the depthwise weights and biases as float32; and the first tile.
  FSC_DEVICE void prepare(int begin) {
    const Scalar* weight = static_cast<const Scalar*>(params_.depthwise_weight);
    const Scalar* bias = static_cast<const Scalar*>(params_.depthwise_bias);
    const int taps = kernel_h() * kernel_w();
    float* resident = reinterpret_cast<float*>(shared_);
    for (int channel = threadIdx.x; channel < layout_.channels; channel += Traits::kThreads) {
      const int k = first_channel_ + channel;
      for (int tap = 0; tap < taps; ++tap)
        resident[tap * layout_.channels + channel] =
            k < shape_.K ? convert<float>(weight[static_cast<int64_t>(k) * taps + tap]) : 0.0f;
      resident[taps * layout_.channels + channel] = bias != nullptr && k < shape_.K ? convert<float>(bias[k]) : 0.0f;
    }
    if (threadIdx.x == 0) item(0) = tiles_.item(begin);
    __syncthreads();
    describe(0);
    __syncthreads();
  }

  // Finds what copies and windows need to know of tile i, and which tile is the next.
  FSC_DEVICE void describe(int i) const {
    const Item tile = item(i);
    if (threadIdx.x == 0) item(i + 1) = tiles_.next(tile);
    const int h0 = tiles_.vertical.input(tile.phase_h, tile.row);
    const int w0 = tiles_.horizontal.input(tile.phase_w, tile.column);
    for (int pixel = threadIdx.x; pixel < layout_.rows * layout_.columns; pixel += Traits::kThreads) {
      int row = pixel;
      const int column = layout_.by_columns.split(row);
      const int h = h0 + row * tiles_.vertical.pitch;
      const int w = w0 + column * tiles_.horizontal.pitch;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(shape_.H) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(shape_.W);
      sources(i)[pixel] = inside ? units(h * params_.x.stride_h + w * params_.x.stride_w) : kOutside;
    }
    const int run = static_cast<int>(threadIdx.x) - (Traits::kThreads - 32);  // the last warp has no pixel, or few
    if (run >= 0 && run < tiles_.runs) {
      int row = tile.skipped + run / Traits::kCellRows;  // a cell
      const int column = tiles_.by_across.split(row) * Traits::kRun;
      row = row * Traits::kCellRows + run % Traits::kCellRows;
      const int oh = tiles_.vertical.output(tile.phase_h, tile.row + row);
      const int ow = tiles_.horizontal.output(tile.phase_w, tile.column + column);
      int inside = 0;
      if (oh < shape_.out_h) {
        FSC_UNROLL
        for (int p = 0; p < Traits::kRun; ++p) inside += ow + p * tiles_.horizontal.count < shape_.out_w;
      }
      // A cell past the image's end reads what the first one reads, which is there.
      const int window = inside > 0 ? row * stride_h() * layout_.columns + column * stride_w() : 0;
      windows(i)[run] = static_cast<uint32_t>(window) << kInsideBits | inside;
      grads(i)[run] = inside > 0 ? units(oh * params_.grad_z.stride_h + ow * params_.grad_z.stride_w) : 0;
    }
  }

  // A distance in x or grad_z, whose pixels are aligned, in units of 16 bytes.
  FSC_DEVICE static int32_t units(int64_t elements) { return static_cast<int32_t>(elements / Traits::kVector); }

  FSC_DEVICE static void wait(int ahead) {
    if (ahead == 1)
      async_copy_wait<0>();
    else if (ahead == 2)
      async_copy_wait<1>();
    else
      async_copy_wait<2>();
  }

  // Starts the copies of the patch of tile i, to stage `patch`, and of grad_z of the tile before, and closes their
  // group. Returns the next stage.
  FSC_DEVICE int load(int i, int items, int patch) const {
    if (i < items) load_patch(i, stage(patch));
    const int before = (patch == 0 ? tiles_.stages : patch) - 1;
    if (i > 0 && i <= items) load_grad(i - 1, stage(before) + layout_.slabs * layout_.patch_slab_bytes);
    async_copy_commit();
    return after(patch);
  }

  // The first channel of x in a slab's patch: with a depth multiplier, the aligned one at or before its first.
  FSC_DEVICE int first_of_slab(int slab) const {
    const int channel = first_channel_ + slab * Traits::kSlab;
    return shape_.multiplier == 1 ? channel : channel / shape_.multiplier / Traits::kVector * Traits::kVector;
  }

  FSC_DEVICE void load_patch(int i, unsigned char* stage) const {
    constexpr int kAtOnce = Traits::kThreads / Traits::kChunks, kUnrolled = 4;
    const int chunk = threadIdx.x % Traits::kChunks, first = threadIdx.x / Traits::kChunks;
    const Scalar* image = static_cast<const Scalar*>(params_.x.data) + item(i).n * params_.x.stride_n;
    FSC_ROLLED
    for (int slab = 0; slab < layout_.slabs; ++slab) {
      const int c = first_of_slab(slab) + chunk * Traits::kVector;
      const bool real = c < shape_.C;
      const uint64_t source = kept(reinterpret_cast<uint64_t>(image + (real ? c : 0)));
      const int32_t* places = sources(i) + first;
      SharedAddress line = shared_address(stage) + slab * layout_.patch_slab_bytes + threadIdx.x * 16;
      FSC_ROLLED
      for (int left = layout_.rows * layout_.columns - first; left > 0; left -= kUnrolled * kAtOnce) {
        // Read before the copies begin: a copy orders all memory accesses for the compiler.
        int32_t place[kUnrolled];
        FSC_UNROLL
        for (int j = 0; j < kUnrolled; ++j) place[j] = left > j * kAtOnce ? places[j * kAtOnce] : kOutside;
        FSC_UNROLL
        for (int j = 0; j < kUnrolled; ++j) {
          if (left > j * kAtOnce)
            async_copy<16>(line + j * kAtOnce * Traits::kLine, at(source, place[j] > 0 ? place[j] : 0),
                           place[j] >= 0 && real);
        }
        places += kUnrolled * kAtOnce;
        line += kUnrolled * kAtOnce * Traits::kLine;
      }
    }
  }

  // grad_z at a tile's pixels, zeros where the image has none.
  FSC_DEVICE void load_grad(int i, unsigned char* destination) const {
    const Image& grad_z = params_.grad_z;
    const unsigned chunk = threadIdx.x % Traits::kChunks;
    const Scalar* image = static_cast<const Scalar*>(grad_z.data) + item(i).n * grad_z.stride_n;
    const int32_t across = units(tiles_.horizontal.count * grad_z.stride_w);
    FSC_ROLLED
    for (int unit = threadIdx.x / Traits::kChunks; unit < layout_.feature_slabs << tiles_.log_runs;
         unit += Traits::kThreads / Traits::kChunks) {
      const unsigned run = unit & (tiles_.runs - 1);
      const int f = first_feature_ + (unit >> tiles_.log_runs) * Traits::kSlab + chunk * Traits::kVector;
      const bool real = f < shape_.F;
      const int inside = real ? windows(i)[run] & ((1u << kInsideBits) - 1) : 0;
      const uint64_t source = kept(reinterpret_cast<uint64_t>(image + (real ? f : 0)));
      const int32_t first = grads(i)[run];
      const SharedAddress line = shared_address(destination) + unit * Traits::kRun * Traits::kLine;
      const unsigned place = chunk * 16 ^ swizzle(run * Traits::kRun);
      FSC_UNROLL
      for (unsigned p = 0; p < Traits::kRun; ++p) {
        const bool there = static_cast<int>(p) < inside;
        async_copy<16>(line + p * Traits::kLine + (place ^ swizzle(p)),
                       at(source, there ? first + static_cast<int>(p) * across : 0), there);
      }
    }
  }

  FSC_DEVICE static const void* at(uint64_t base, int32_t units) {
    return reinterpret_cast<const void*>(base + static_cast<uint64_t>(static_cast<uint32_t>(units)) * 16);
  }

  // Applies a pre-activation that is too long for the convolution's inner loop to what this thread's copies brought.
  FSC_DEVICE void activate_arrived(int index) const {
    for (int slab = 0; slab < layout_.slabs; ++slab) {
      unsigned char* line = stage(index) + slab * layout_.patch_slab_bytes + threadIdx.x * 16;
      for (int pixel = threadIdx.x / Traits::kChunks; pixel < layout_.rows * layout_.columns;
           pixel += Traits::kThreads / Traits::kChunks, line += Traits::kThreads * 16) {
        Scalar* chunk = reinterpret_cast<Scalar*>(line);
        for (int i = 0; i < Traits::kVector; ++i)
          chunk[i] = convert<Scalar>(activate(shape_.pre_activation, convert<float>(chunk[i])));
      }
    }
  }

  // The depthwise results of a tile, to v. A warp takes some of the runs of one slab, then some of another.
  FSC_DEVICE void convolve(const unsigned char* stage, unsigned char* v, const uint32_t* windows) const {
    const int groups = tiles_.runs / Traits::kRunsAtOnce;
    FSC_ROLLED
    for (int unit = threadIdx.x / 32; unit < layout_.slabs * groups; unit += Traits::kWarps) {
      const int slab = unit * Traits::kRunsAtOnce >> tiles_.log_runs;
      const int run = unit * Traits::kRunsAtOnce & (tiles_.runs - 1);
      const unsigned char* patch = stage + slab * layout_.patch_slab_bytes;
      unsigned char* line = v + slab * layout_.intermediate_slab_bytes + run * Traits::kRun * Traits::kLine;
      if (shape_.pre_activation == Activation::relu)
        convolve_runs<true>(patch, line, windows + run, slab);
      else
        convolve_runs<false>(patch, line, windows + run, slab);
    }
  }

  template <bool kRelu>
  FSC_DEVICE void convolve_runs(const unsigned char* patch, unsigned char* v, const uint32_t* windows, int slab) const {
    const unsigned word = threadIdx.x % 32;
    const float* taps = reinterpret_cast<const float*>(shared_) + slab * Traits::kSlab + word * Traits::kPerWord;
    constexpr int kResident = Traits::kKernel * Traits::kKernel;
    PerWord weight[kResident == 0 ? 1 : kResident];
    FSC_UNROLL
    for (int tap = 0; tap < kResident; ++tap) weight[tap] = read(taps + tap * layout_.channels);
    const PerWord bias = read(taps + layout_.bias / 4);
    FSC_ROLLED
    for (unsigned run = 0; run < Traits::kRunsAtOnce; run += Traits::kCellRows) {
      const unsigned char* window = patch + (windows[run] >> kInsideBits) * Traits::kLine;
      PerWord sum[Traits::kCellRows][Traits::kRun];
      FSC_UNROLL
      for (int r = 0; r < Traits::kCellRows; ++r) {
        FSC_UNROLL
        for (int p = 0; p < Traits::kRun; ++p) sum[r][p] = bias;
      }
      if constexpr (Traits::kKernel != 0)
        add_window<kRelu>(window + word * 4, weight, sum);
      else
        add_any_window<kRelu>(window, slab, word, taps, sum);
      FSC_UNROLL
      for (unsigned r = 0; r < Traits::kCellRows; ++r) {
        Values<Traits::kRun * Traits::kPerWord> results;
        FSC_UNROLL
        for (int i = 0; i < Traits::kRun * Traits::kPerWord; ++i)
          results[i] = sum[r][i / Traits::kPerWord][i % Traits::kPerWord];
        activate_all(shape_.mid_activation, results);
        const int inside = windows[run + r] & ((1u << kInsideBits) - 1);
        if (inside < Traits::kRun) {
          FSC_UNROLL
          for (int i = 0; i < Traits::kRun * Traits::kPerWord; ++i)
            if (i / Traits::kPerWord >= inside) results[i] = 0.0f;
        }
        const unsigned place = place_in_line(word) * 4 ^ swizzle((run + r) * Traits::kRun);
        FSC_UNROLL
        for (unsigned p = 0; p < Traits::kRun; ++p) {
          Vector<uint32_t, 1> out;
          out[0] = operand_of<Scalar>(&results[p * Traits::kPerWord]);
          store(reinterpret_cast<uint32_t*>(v + (place ^ swizzle(p)) + (r * Traits::kRun + p) * Traits::kLine), out);
        }
      }
      v += Traits::kCellRows * Traits::kRun * Traits::kLine;
    }
  }

  using PerWord = WordOf<Scalar>;  // of each channel of a word

  using Sums = PerWord[Traits::kCellRows][Traits::kRun];  // of a cell

  // The taps of a kernel whose size is known, on a cell's window: each word is read once.
  template <bool kRelu>
  FSC_DEVICE void add_window(const unsigned char* window, const PerWord* weight, Sums& sum) const {
    constexpr int kRows = (Traits::kCellRows - 1) * Traits::kStride + Traits::kKernel;
    constexpr int kColumns = (Traits::kRun - 1) * Traits::kStride + Traits::kKernel;
    FSC_UNROLL
    for (int row = 0; row < kRows; ++row, window += layout_.columns * Traits::kLine) {
      FSC_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const PerWord x = floats_of<Scalar>(load_word<kRelu>(window + column * Traits::kLine));
        FSC_UNROLL
        for (int r = 0; r < Traits::kCellRows; ++r) {
          FSC_UNROLL
          for (int p = 0; p < Traits::kRun; ++p) {
            const int i = row - r * Traits::kStride, j = column - p * Traits::kStride;
            if (i < 0 || i >= Traits::kKernel || j < 0 || j >= Traits::kKernel) continue;
            FSC_UNROLL
            for (int e = 0; e < Traits::kPerWord; ++e) sum[r][p][e] += weight[i * Traits::kKernel + j][e] * x[e];
          }
        }
      }
    }
  }

  // The same for any kernel, stride and depth multiplier, tap after tap.
  template <bool kRelu>
  FSC_DEVICE void add_any_window(const unsigned char* window, int slab, int word, const float* taps, Sums& sum) const {
    FSC_ROLLED
    for (int i = 0; i < kernel_h(); ++i) {
      FSC_ROLLED
      for (int j = 0; j < kernel_w(); ++j) {
        const PerWord weight = read(taps + (i * kernel_w() + j) * layout_.channels);
        FSC_UNROLL
        for (int r = 0; r < Traits::kCellRows; ++r) {
          FSC_UNROLL
          for (int p = 0; p < Traits::kRun; ++p) {
            const int pixel = (i + r * stride_h()) * layout_.columns + j + p * stride_w();
            const unsigned char* line = window + pixel * Traits::kLine;
            const PerWord x = floats_of<Scalar>(shape_.multiplier == 1 ? load_word<kRelu>(line + word * 4)
                                                                       : repeated<kRelu>(line, slab, word));
            FSC_UNROLL
            for (int e = 0; e < Traits::kPerWord; ++e) sum[r][p][e] += weight[e] * x[e];
          }
        }
      }
    }
  }

  template <bool kRelu>
  FSC_DEVICE static uint32_t load_word(const unsigned char* place) {
    const uint32_t word = fused_sepconv::load<1>(reinterpret_cast<const uint32_t*>(place))[0];
    return kRelu ? relu_packed<Scalar>(word) : word;
  }

  // The inputs of a word of depthwise channels, with a depth multiplier.
  template <bool kRelu>
  FSC_DEVICE uint32_t repeated(const unsigned char* line, int slab, int word) const {
    Scalar scalars[Traits::kPerWord];
    FSC_UNROLL
    for (int e = 0; e < Traits::kPerWord; ++e) {
      const int k = first_channel_ + slab * Traits::kSlab + word * Traits::kPerWord + e;
      scalars[e] = reinterpret_cast<const Scalar*>(line)[k / shape_.multiplier - first_of_slab(slab)];
    }
    uint32_t bits;
    memcpy(&bits, scalars, sizeof bits);
    return kRelu ? relu_packed<Scalar>(bits) : bits;
  }

  // acc += grad_z^T * v over the pixels of a tile, or the warp's share of them.
  FSC_DEVICE void multiply(const unsigned char* grad_z, const unsigned char* v) {
    const int slab_bytes = layout_.intermediate_slab_bytes;  // of grad_z too
    grad_z += feature_warp_ * Traits::kSlabsOfWarp * slab_bytes;
    v += channel_warp_ * Traits::kSlabsOfWarp * slab_bytes;
    const int step_bytes = Traits::kDepth * Traits::kLine;
    FSC_ROLLED
    for (int offset = pixel_warp_ * step_bytes; offset < slab_bytes; offset += tiles_.pixel_warps * step_bytes) {
      if constexpr (sizeof(Scalar) == 2)
        multiply_halves(shared_address(grad_z) + offset, shared_address(v) + offset);
      else
        multiply_tf32(grad_z + offset, v + offset, slab_bytes);
    }
  }

  // 16 pixels in 16 bits.
  FSC_DEVICE void multiply_halves(SharedAddress grad_z, SharedAddress v) {
    const unsigned matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
    uint32_t a[kRowTiles][4];
    const SharedAddress grad_line = grad_z + (matrix / 2 * 8 + row) * Traits::kLine;
    FSC_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile)
      ldmatrix_x4_trans(a[tile], grad_line + ((tile * 2 + matrix % 2) * 16 ^ swizzle(row)));
    const SharedAddress v_line = v + (matrix % 2 * 8 + row) * Traits::kLine;
    FSC_UNROLL
    for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v_line + ((pair * 2 + matrix / 2) * 16 ^ swizzle(row)));
      FSC_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        mma<Scalar>(acc_[tile][2 * pair], a[tile], b[0], b[1]);
        mma<Scalar>(acc_[tile][2 * pair + 1], a[tile], b[2], b[3]);
      }
    }
  }

  // 8 pixels in TF32: lane (g, q) reads features 2g and 2g + 1 of 16, and channel g of 8, at pixels q and q + 4: the
  // operands then lie in registers as mma.sync wants them.
  FSC_DEVICE void multiply_tf32(const unsigned char* grad_z, const unsigned char* v, int slab_bytes) {
    const unsigned column = threadIdx.x % 32 / 4, pixel = threadIdx.x % 4;
    uint32_t a[kRowTiles][4];
    FSC_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const unsigned place = (tile % 2 * 64 + column * 8) ^ swizzle(pixel);
      FSC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto values = fused_sepconv::load<2>(reinterpret_cast<const float*>(
            grad_z + tile / 2 * slab_bytes + (pixel + half * 4) * Traits::kLine + place));
        a[tile][half * 2] = to_tf32(values[0]);
        a[tile][half * 2 + 1] = to_tf32(values[1]);
      }
    }
    FSC_UNROLL
    for (int i = 0; i < kColumnTiles; ++i) {
      const unsigned place = (i % 4 * 32 + column * 4) ^ swizzle(pixel);
      uint32_t b[2];
      FSC_UNROLL
      for (int half = 0; half < 2; ++half)
        b[half] = fused_sepconv::load<1>(
            reinterpret_cast<const uint32_t*>(v + i / 4 * slab_bytes + (pixel + half * 4) * Traits::kLine + place))[0];
      FSC_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) mma<Scalar>(acc_[tile][i], a[tile], b[0], b[1]);
    }
  }

  FSC_DEVICE void clear() {
    FSC_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      FSC_UNROLL
      for (int column = 0; column < kColumnTiles; ++column) {
        FSC_UNROLL
        for (int i = 0; i < 4; ++i) acc_[tile][column][i] = 0.0f;
      }
    }
  }

  // Adds the sums of the warps that share pixels to those of the first, in their order, through shared memory.
  FSC_DEVICE void add_over_warps() {
    float* sums = reinterpret_cast<float*>(shared_) +
                  (feature_warp_ + channel_warp_ * tiles_.feature_warps) * (Traits::kWarpTile * Traits::kWarpTile) +
                  threadIdx.x % 32;
    FSC_ROLLED
    for (int from = 1; from < tiles_.pixel_warps; ++from) {
      __syncthreads();  // what was there is read
      if (pixel_warp_ == from) {
        FSC_UNROLL
        for (int i = 0; i < kSums; ++i) sums[i * 32] = acc_[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4];
      }
      __syncthreads();
      if (pixel_warp_ == 0) {
        FSC_UNROLL
        for (int i = 0; i < kSums; ++i) acc_[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] += sums[i * 32];
      }
    }
  }

  // The warp's 64 x 64 of partial_weight.
  FSC_DEVICE void finish() const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const int first_f = first_feature_ + feature_warp_ * Traits::kWarpTile;
    const int first_k = first_channel_ + channel_warp_ * Traits::kWarpTile;
    float* partial = static_cast<float*>(params_.partial_weight) + part_ * static_cast<int64_t>(shape_.F) * shape_.K;
    FSC_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      FSC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int f = first_f + tile * 16 + (sizeof(Scalar) == 2 ? half * 8 + g : 2 * g + half);
        if (f >= shape_.F) continue;
        float* row = partial + static_cast<int64_t>(f) * shape_.K;
        FSC_UNROLL
        for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
          const int k = first_k + pair * 16 + 4 * q;
          Vector<float, 4> vector;
          FSC_UNROLL
          for (int j = 0; j < 4; ++j) vector[j] = acc_[tile][2 * pair + j / 2][half * 2 + j % 2];
          if (k < shape_.K) store(row + k, vector);
        }
      }
    }
  }

  // The threads of a block share the words of grad_z's pixels in a tile: with fewer words than threads, every so many
  // pixels are one thread's.
  FSC_DEVICE int words() const { return layout_.feature_slabs * 32; }

  // A tile is summed by itself first: of very many pixels, the running sum would else lose the small ones.
  FSC_DEVICE void add_to_bias(const unsigned char* grad_z, float (&sum)[Traits::kPerWord]) const {
    const unsigned word = threadIdx.x & (words() - 1), of_line = word % 32;
    grad_z += word / 32 * layout_.intermediate_slab_bytes;
    PerWord tile = {};
    for (int pixel = threadIdx.x / words(); pixel < layout_.pixels; pixel += Traits::kThreads / words()) {
      const unsigned char* place = grad_z + pixel * Traits::kLine + (of_line * 4 ^ swizzle(pixel));
      const PerWord values = floats_of<Scalar>(fused_sepconv::load<1>(reinterpret_cast<const uint32_t*>(place))[0]);
      FSC_UNROLL
      for (int e = 0; e < Traits::kPerWord; ++e) tile[e] += values[e];
    }
    FSC_UNROLL
    for (int e = 0; e < Traits::kPerWord; ++e) sum[e] += tile[e];
  }

  FSC_DEVICE void finish_bias(const float (&sum)[Traits::kPerWord]) const {
    float* sums = reinterpret_cast<float*>(shared_);
    __syncthreads();
    FSC_UNROLL
    for (int e = 0; e < Traits::kPerWord; ++e) sums[threadIdx.x * Traits::kPerWord + e] = sum[e];
    __syncthreads();
    const int features = words() * Traits::kPerWord;
    float* partial = static_cast<float*>(params_.partial_bias) + part_ * static_cast<int64_t>(shape_.F);
    for (int feature = threadIdx.x; feature < features; feature += Traits::kThreads) {
      float total = 0.0f;
      for (int i = feature; i < Traits::kThreads * Traits::kPerWord; i += features) total += sums[i];
      if (first_feature_ + feature < shape_.F) partial[first_feature_ + feature] = total;
    }
  }

  FSC_DEVICE static PerWord read(const float* source) {
    const auto vector = fused_sepconv::load<Traits::kPerWord>(source);
    PerWord values;
    FSC_UNROLL
    for (int e = 0; e < Traits::kPerWord; ++e) values[e] = vector[e];
    return values;
  }

  static constexpr int kRowTiles = Traits::kWarpTile / 16;
  static constexpr int kColumnTiles = Traits::kWarpTile / 8;
  static constexpr int kSums = kRowTiles * kColumnTiles * 4;

  // All in constant memory: none of it takes a register.
  const BackwardParams& params_;
  const ConvShape& shape_;
  const MmaWeightTiles<Traits>& tiles_;
  const MmaWeightLayout<Traits>& layout_;

  unsigned char* const shared_;
  int first_feature_, first_channel_, part_;      // of the block
  int feature_warp_, channel_warp_, pixel_warp_;  // where in the block's tile the warp is
  float acc_[kRowTiles][kColumnTiles][4];
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, 1)
mma_backward_pointwise_weight(const FSC_CONST_PARAM MmaWeightParams<Traits> params) {
  FSC_SHARED_BYTES(shared);
  MmaBackwardPointwiseWeight<Traits>(params, shared).run();
}

}  // namespace fused_sepconv
