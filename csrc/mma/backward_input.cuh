// backward_input.cuh - from the gradient of the pointwise convolution's result to those of x and of the
// depthwise weight and bias, on the tensor cores (mma.sync, sm_80 and newer).
//
// float16 and bfloat16, 3x3, inner stride 1 (phases.cuh); all images in NHWC. The gradient dT of the depthwise result
// never leaves the SM.
//
//   grad_z (N, out_h, out_w, F)       pointwise weight (F, K)
//      | cp.async, 16 bytes a copy       | cp.async
//      v                                 v
//   grad_z[256 positions][16]         w[16 features][64 channels]        2 to 5 of them
//      | ldmatrix                        | ldmatrix, transposed
//      '--------------> mma.sync <-------'
//                          | acc[256 positions x 64 channels], registers
//                          v  rounded as the unfused kernels round it; stmatrix
//   x (N, H, W, C)      ring[the last positions][64 channels]            shared memory
//      | 4 bytes a lane    | windows of 3 x 3 positions
//      '--------.----------'
//               | registers, float32
//               |---- sum over taps of weight * window ---- * pre_act' ---> grad_x, 4 bytes a lane
//               '---- x * window ---> sums of each tap, at the end over the warps in their order
//                                     ---> partial_weight (parts, K, taps), partial_bias; then reduce_splits
//
// Who owns what. A block owns 64 channels and a part of the stream of positions (mma_stream.cuh). It goes down its
// part 256 positions of dT at a time, and keeps in the ring as many of the last ones as a window reaches back over: so
// a position is computed once but for those where parts (and strips) meet. In the matrix product a warp has 32
// positions and all channels; in the windows 32 positions and two channels a lane, a line of 128 bytes of x and grad_x
// a warp, which wider accesses would not make fewer.
//
// Overlap. Two blocks share an SM: one's matrix product runs beside the other's windows, which leave the tensor
// cores idle. The next slabs of grad_z are on their way during the windows, and x's pixels eight positions ahead.
//
// Why it is right. grad_x[h] gathers dT[h + pad - d * i] over the taps, and the weight's gradient sums x[h] times the
// same; each position is of one part, which adds its products. The bias's gradient adds dT where the position is its
// own. No mid-activation: its derivative would need the depthwise result.
//
// Floor. Device bytes: grad_z + x + grad_x, each once, where two kernels move dT out, and in again. grad_z is read once
// for each 64 channels, but for the first from L2. For 3x3 in bfloat16 a warp issues about 2100 instructions for 32
// positions' windows (36 multiply-adds among the 65 of a position), 80 for each 16 features (16 of mma.sync), and 500
// for the rest of a tile.
#pragma once

#include "../common/activation.cuh"
#include "../primitives/async_copy.h"
#include "../primitives/convert.h"
#include "../primitives/matrix.h"
#include "../primitives/opaque.h"
#include "../primitives/vector.h"
#include "../primitives/warp.h"
#include "stream.cuh"

namespace fused_sepconv {

template <class Traits>
class MmaBackwardInput {
  using Scalar = typename Traits::Scalar;
  using Word = uint32_t;                                      // two channels
  static constexpr int kColumnTiles = Traits::kChannels / 8;  // of mma.sync, 8 channels wide

 public:
  FSC_DEVICE MmaBackwardInput(const MmaInputLaunch<Traits>& launch, unsigned char* shared)
      : launch_(launch), call_(launch.call), shape_(launch.call.shape), stream_(launch.stream), shared_(shared) {
    part_ = blockIdx.x;
    first_channel_ = launch.by_chunks.split(part_) * Traits::kChannels;
  }

  FSC_DEVICE void run() {
    prepare();
    const int slabs = (shape_.F + Traits::kFeatures - 1) / Traits::kFeatures;
    const int tiles = (whole_count() + stream_.lag + Traits::kTile - 1) / Traits::kTile;
    Loader loader(*this, tiles, slabs);
    for (int i = 1; i < call_.tiling.stages; ++i) loader.load(threadIdx.x);

    int slot = 0;  // of the ring, where the tile goes
    FSC_ROLLED
    for (int tile = 0; tile < tiles; ++tile) {
      // Nothing that is made of the thread's number is kept from one tile to the next: the registers are full.
      const unsigned thread = opaque(threadIdx.x);
      loader.sit(thread);
      float acc[2][kColumnTiles][4] = {};
      FSC_ROLLED
      for (int slab = 0; slab < slabs; ++slab) {
        wait_for_slab();
        __syncthreads();  // the slab is there for all, and nobody reads the last tile's windows or what is overwritten
        loader.load(thread);
        multiply(thread, loader.oldest(), acc);
      }
      Seat seat(opaque(threadIdx.x));
      seat.warp = warp_shuffle(seat.warp, 0);  // which tells nvcc that it is the warp's, and so are branches on it
      keep(seat, acc, slot);
      const int own_first = tile * Traits::kTile - stream_.lag + seat.warp * Traits::kRun;
      const int own_slot = wrapped(wrapped(slot + Traits::kTile + seat.warp * Traits::kRun));
      const int from = own_first < 0 ? -own_first : 0;
      const int left = whole_count() - own_first;
      const int to = left < Traits::kRun ? left : Traits::kRun;
      __syncthreads();
      if (from < to) {
        if (shape_.pre_activation == Activation::none || shape_.pre_activation == Activation::relu)
          gather<Traits::kGroup, false>(seat, own_first, own_slot, from, to);
        else
          gather<1, true>(seat, own_first, own_slot, from, to);
      }
      slot = wrapped(slot + Traits::kTile);
    }
    finish();
  }

 private:
  // Where the thread is in the block.
  struct Seat {
    int warp, lane;

    FSC_DEVICE explicit Seat(unsigned thread) : warp(thread / kWarpSize), lane(thread % kWarpSize) {}
  };
  // The part's positions: its first, how many there are, and those of whole groups.
  FSC_DEVICE int begin() const { return part_ * stream_.part; }
  FSC_DEVICE int count() const {
    const int left = stream_.length - begin();
    return left < stream_.part ? left : stream_.part;
  }
  FSC_DEVICE int whole_count() const { return (count() + Traits::kGroup - 1) / Traits::kGroup * Traits::kGroup; }

  FSC_DEVICE int wrapped(int slot) const {
    return slot >= launch_.layout.capacity ? slot - launch_.layout.capacity : slot;
  }
  FSC_DEVICE unsigned char* ring(int slot) const { return shared_ + launch_.layout.ring + slot * Traits::kPitch; }
  FSC_DEVICE SharedAddress stage_address(int stage) const {
    return shared_address(shared_ + launch_.layout.stages) + stage * Traits::kStageBytes;
  }
  FSC_DEVICE bool has_channels(const Seat& seat) const { return first_channel_ + 2 * seat.lane < shape_.K; }

  // The weights of the block's channels as (taps, channels), zeros past the last channel.
  FSC_DEVICE void prepare() {
    const Scalar* weight = static_cast<const Scalar*>(call_.depthwise_weight);
    Scalar* resident = reinterpret_cast<Scalar*>(shared_);
    for (int i = threadIdx.x; i < Traits::kTaps * Traits::kChannels; i += Traits::kThreads) {
      const int64_t k = first_channel_ + i % Traits::kChannels;
      resident[i] = k < shape_.K ? weight[k * Traits::kTaps + i / Traits::kChannels] : convert<Scalar>(0.0f);
    }
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap) sums_[tap][0] = sums_[tap][1] = 0;
    store(bias_sums(), Vector<float, 2>{});
  }

  // Until at most all slabs but the oldest are on their way.
  FSC_DEVICE void wait_for_slab() const {
    const int stages = call_.tiling.stages;
    if (stages > 4) return async_copy_wait<3>();
    if (stages == 4) return async_copy_wait<2>();
    if (stages == 3) return async_copy_wait<1>();
    async_copy_wait<0>();
  }

  // Brings the slabs of the part's tiles, one after the other. Addresses are in units of 16 bytes: the registers are
  // full.
  class Loader {
   public:
    FSC_DEVICE Loader(MmaBackwardInput& kernel, int tiles, int slabs)
        : k_(kernel), slabs_(slabs), left_(tiles * slabs), stage_(0) {
      sit(threadIdx.x);
      enter(threadIdx.x, kernel.begin());
    }

    // The stage that was filled the longest ago.
    FSC_DEVICE int oldest() const { return stage_; }

    // Takes the thread's place among the copies: of a tile, so that nothing of it is kept during the windows.
    FSC_DEVICE void sit(unsigned thread) {
      grad_ = opaque(grad_offset(thread / 2, thread % 2));
      w_ = opaque(w_offset(thread / kWeightChunks, thread % kWeightChunks));
    }

    // Starts the copies of the next slab, if there is one, and closes their group.
    FSC_DEVICE void load(unsigned thread) {
      if (left_ > 0) {
        --left_;
        const SharedAddress stage = k_.stage_address(stage_);
        const SharedAddress grad_z = stage + grad_;
        const bool has_features =
            slab_ * Traits::kFeatures + static_cast<int>(thread % 2) * Traits::kVector < k_.shape_.F;
        FSC_UNROLL
        for (int half = 0; half < 2; ++half) {
          const bool inside = has_features && gradient_[half] < PixelOffsets::kNone;
          async_copy<16>(grad_z + half * (Traits::kGradBytes / 2),
                         at(k_.call_.grad_z.data, opaque(inside ? gradient_[half] : 0)), inside);
        }
        if (thread < Traits::kFeatures * kWeightChunks) load_weights(thread, stage + Traits::kGradBytes);
        gradient_[0] += Traits::kFeatures / Traits::kVector;
        gradient_[1] += Traits::kFeatures / Traits::kVector;
        if (++slab_ == slabs_) enter(thread, position_ + Traits::kTile);
      }
      if (++stage_ == k_.call_.tiling.stages) stage_ = 0;
      async_copy_commit();
    }

   private:
    static constexpr int kWeightChunks = Traits::kChannels / Traits::kVector;

    FSC_DEVICE static const unsigned char* at(const void* data, uint32_t offset) {
      return static_cast<const unsigned char*>(data) + static_cast<uint64_t>(offset) * 16;
    }
    FSC_DEVICE void load_weights(unsigned thread, SharedAddress w) const {
      const unsigned row = thread / kWeightChunks, chunk = thread % kWeightChunks;
      const unsigned f = slab_ * Traits::kFeatures + row, channel = k_.first_channel_ + chunk * Traits::kVector;
      const bool inside = f < static_cast<unsigned>(k_.shape_.F) && channel < static_cast<unsigned>(k_.shape_.K);
      const uint32_t offset = opaque(inside ? (f * k_.shape_.K + channel) / Traits::kVector : 0u);
      async_copy<16>(w + w_, at(k_.call_.pointwise_weight, offset), inside);
    }

    // A pair of threads copies the positions number pair and pair + 128 of a tile; each finds one of them.
    FSC_DEVICE void enter(unsigned thread, int position) {
      slab_ = 0;
      position_ = position;
      const int own = position + thread / 2 + thread % 2 * (Traits::kTile / 2);
      const auto place = k_.stream_.place(own);
      const StreamAxis &vertical = k_.stream_.vertical, &horizontal = k_.stream_.horizontal;
      uint32_t offset =
          k_.launch_.grad_z.of(place.n, vertical.output(place.phase_h, place.row),
                               horizontal.output(place.phase_w, place.column), vertical.outputs, horizontal.outputs);
      if (own >= k_.stream_.length) offset = PixelOffsets::kNone;
      FSC_UNROLL
      for (int half = 0; half < 2; ++half)
        gradient_[half] = warp_shuffle(offset, thread % kWarpSize / 2 * 2 + half) + thread % 2;
    }

    const MmaBackwardInput& k_;
    const int slabs_;
    int left_;  // slabs, of all tiles
    int position_, slab_, stage_;
    uint32_t grad_, w_;     // where the thread's chunks lie in a slab
    uint32_t gradient_[2];  // where this thread's next chunks are
  };

  // Where a slab's 16-byte chunks lie: 8 rows of one chunk, which ldmatrix reads at once, meet all banks.
  FSC_DEVICE static int grad_offset(int row, int chunk) { return row * 32 + (chunk ^ (row / 4 % 2)) * 16; }
  FSC_DEVICE static int w_offset(int row, int chunk) { return row * 128 + (chunk ^ (row % 8)) * 16; }

  // acc += grad_z * w, of the warp's 32 positions: two tiles of 16 rows.
  FSC_DEVICE void multiply(unsigned thread, int stage, float (&acc)[2][kColumnTiles][4]) const {
    const Seat seat(thread);
    const SharedAddress grad_z =
        stage_address(stage) + grad_offset(seat.warp * Traits::kRun + seat.lane % 16, seat.lane / 16);
    const SharedAddress w = stage_address(stage) + Traits::kGradBytes + w_offset(seat.lane % 16, seat.lane / 16);
    uint32_t a[2][4];
    FSC_UNROLL
    for (int half = 0; half < 2; ++half) ldmatrix_x4(a[half], grad_z + half * (16 * 32));
    FSC_UNROLL
    for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, w ^ (32 * pair));  // w_offset's chunk + 2 * pair, as stages begin at multiples of 128
      FSC_UNROLL
      for (int half = 0; half < 2; ++half) {
        mma<Scalar>(acc[half][2 * pair], a[half], b[0], b[1]);
        mma<Scalar>(acc[half][2 * pair + 1], a[half], b[2], b[3]);
      }
    }
  }

  // Puts the warp's positions of a tile into the ring, from the tile's slot on; its first 8 also past its end, so that
  // whoever reads 8 neighbours need not look where it ends.
  FSC_DEVICE void keep(const Seat& seat, const float (&acc)[2][kColumnTiles][4], int slot) const {
    FSC_UNROLL
    for (int eight = 0; eight < 4; ++eight) {
      const int first = wrapped(slot + seat.warp * Traits::kRun + eight * 8);
      const SharedAddress row = shared_address(ring(first + seat.lane % 8)) + seat.lane / 8 * 16;
      FSC_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
        FSC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&d)[4] = acc[eight / 2][half * 4 + i];
          words[i] = pack<Scalar>(d[eight % 2 * 2], d[eight % 2 * 2 + 1]);
        }
        stmatrix_x4(row + half * 64, words);
        if (first == 0) stmatrix_x4(row + half * 64 + launch_.layout.capacity * Traits::kPitch, words);
      }
    }
  }

  FSC_DEVICE static Word window_word(const Seat& seat, const unsigned char* position) {
    return load<1>(reinterpret_cast<const Word*>(position) + seat.lane)[0];
  }

  // The windows of positions [from, to) of the warp's run, the first of which is number `first` of the part and lies at
  // slot `slot` of the ring: gradients of x, and what they add to the sums. kCount positions at a time; kAny: with any
  // pre-activation, which would be too much code for several.
  template <int kCount, bool kAny>
  FSC_DEVICE void gather(const Seat& seat, int first, int slot, int from, int to) {
    // A lane finds the place of one position, x's pixel there and whether its dT is the run's own.
    uint32_t own;
    bool owned;
    {
      const auto place = stream_.place(begin() + first + seat.lane);
      const StreamAxis &vertical = stream_.vertical, &horizontal = stream_.horizontal;
      own = launch_.x.of(place.n, vertical.input(place.phase_h, place.row),
                         horizontal.input(place.phase_w, place.column), vertical.inputs, horizontal.inputs);
      owned = place.owned && first + seat.lane >= 0 && first + seat.lane < count();
      if (!owned) own = PixelOffsets::kNone;
    }
    if (call_.partial_bias != nullptr) add_bias(seat, slot, from, to, owned);

    float weight[Traits::kKernel][Traits::kKernel][2];  // [r][c]: of the window's row r and column c
    FSC_UNROLL
    for (int tap = 0; tap < Traits::kTaps; ++tap)
      unpack_word(
          load<1>(reinterpret_cast<const Word*>(shared_) + (Traits::kTaps - 1 - tap) * kWarpSize + seat.lane)[0],
          weight[tap / Traits::kKernel][tap % Traits::kKernel]);

    const bool is_relu = shape_.pre_activation == Activation::relu;
    const int64_t own_channels = (static_cast<int64_t>(first_channel_) + 2 * seat.lane) * sizeof(Scalar);
    const unsigned char* x = opaque_global(static_cast<const unsigned char*>(call_.x.data) + own_channels);
    unsigned char* grad_x = opaque_global(static_cast<unsigned char*>(call_.grad_x) + own_channels);
    const bool lane_reads = has_channels(seat);
    const bool lane_writes = lane_reads && call_.grad_x != nullptr;
    // For the position that lies so many after the group's first: own is passed on as groups are.
    const auto offset_of = [&](int index) { return warp_shuffle(own, index); };
    const auto read_x = [&](int index, bool is_one) {
      const uint32_t offset = offset_of(index);
      return load_word_or_zero(x + static_cast<uint64_t>(offset) * 16, is_one && offset < PixelOffsets::kNone);
    };
    own = warp_shuffle(own, (seat.lane + from) % kWarpSize);

    float window[Traits::kKernel][Traits::kKernel][2];
    FSC_UNROLL
    for (int r = 0; r < Traits::kKernel; ++r) {
      const unsigned char* position = ring(wrapped(wrapped(slot + from) + r * stream_.pitch));
      FSC_UNROLL
      for (int c = 1; c < Traits::kKernel; ++c)
        unpack_word(window_word(seat, position + (c - 1) * Traits::kPitch), window[r][c]);
    }
    Word x_words[kCount];
    FSC_UNROLL
    for (int j = 0; j < kCount; ++j) x_words[j] = read_x(j, lane_reads);
    FSC_ROLLED
    for (int group = from; group < to; group += kCount) {
      const unsigned char* rows[Traits::kKernel];  // of the window's last column
      FSC_UNROLL
      for (int r = 0; r < Traits::kKernel; ++r)
        rows[r] = ring(wrapped(wrapped(slot + group) + r * stream_.pitch + Traits::kKernel - 1));
      const bool reads_next = lane_reads && group + kCount < to;
      FSC_UNROLL
      for (int j = 0; j < kCount; ++j) {
        FSC_UNROLL
        for (int r = 0; r < Traits::kKernel; ++r) {
          FSC_UNROLL
          for (int c = 0; c + 1 < Traits::kKernel; ++c) {
            window[r][c][0] = window[r][c + 1][0];
            window[r][c][1] = window[r][c + 1][1];
          }
          unpack_word(window_word(seat, rows[r] + j * Traits::kPitch), window[r][Traits::kKernel - 1]);
        }
        float at[2], raw[2], grad[2] = {};
        unpack_word(!kAny && is_relu ? relu_packed<Scalar>(x_words[j]) : x_words[j], at);
        if constexpr (kAny) {
          FSC_UNROLL
          for (int v = 0; v < 2; ++v) {
            raw[v] = at[v];
            at[v] = activate(shape_.pre_activation, raw[v]);
          }
        }
        FSC_UNROLL
        for (int r = 0; r < Traits::kKernel; ++r) {
          FSC_UNROLL
          for (int c = 0; c < Traits::kKernel; ++c) {
            FSC_UNROLL
            for (int v = 0; v < 2; ++v) {
              grad[v] += weight[r][c][v] * window[r][c][v];
              sums_[r * Traits::kKernel + c][v] += at[v] * window[r][c][v];
            }
          }
        }
        if constexpr (kAny) {
          FSC_UNROLL
          for (int v = 0; v < 2; ++v) grad[v] = differentiate(shape_.pre_activation, grad[v], raw[v]);
        }
        Word word = pack<Scalar>(grad[0], grad[1]);
        if (!kAny && is_relu) word &= relu_mask<Scalar>(x_words[j]);
        const uint32_t offset = offset_of(j);
        if (lane_writes && offset < PixelOffsets::kNone)
          store(reinterpret_cast<Word*>(grad_x + static_cast<uint64_t>(offset) * 16), Vector<Word, 1>{{word}});
        x_words[j] = read_x(kCount + j, reads_next);
      }
      own = warp_shuffle(own, (seat.lane + kCount) % kWarpSize);
    }
  }

  // The lane's sums of dT: in shared memory, as few calls have the bias and the registers are full.
  FSC_DEVICE float* bias_sums() const {
    return reinterpret_cast<float*>(shared_ + launch_.layout.bias) + 2 * threadIdx.x;
  }

  // dT of the run's own positions, for the bias.
  FSC_DEVICE void add_bias(const Seat& seat, int slot, int from, int to, bool owned) const {
    auto sums = load<2>(bias_sums());
    FSC_ROLLED
    for (int i = from; i < to; ++i) {
      if (!warp_shuffle(static_cast<int>(owned), i)) continue;
      float values[2];
      unpack_word(window_word(seat, ring(wrapped(slot + i))), values);
      sums[0] += values[0];
      sums[1] += values[1];
    }
    store(bias_sums(), sums);
  }

  // Adds the warps' sums in their order, and gives them out as the part's.
  FSC_DEVICE void finish() {
    __syncthreads();  // the ring is read, and its memory is free
    const Seat seat(threadIdx.x);
    float* shared = reinterpret_cast<float*>(ring(0));
    FSC_UNROLL
    for (int i = 0; i < Traits::kTaps; ++i)
      store(shared + (seat.warp * Traits::kTaps + i) * Traits::kChannels + 2 * seat.lane,
            Vector<float, 2>{{sums_[i][0], sums_[i][1]}});
    __syncthreads();
    const int64_t row = static_cast<int64_t>(part_) * shape_.K + first_channel_;
    for (int index = threadIdx.x; index < Traits::kTaps * Traits::kChannels; index += Traits::kThreads) {
      const int channel = index % Traits::kChannels;
      if (first_channel_ + channel >= shape_.K || call_.partial_weight == nullptr) continue;
      call_.partial_weight[(row + channel) * Traits::kTaps + Traits::kTaps - 1 - index / Traits::kChannels] =
          over_warps(shared + index, Traits::kTaps * Traits::kChannels);
    }
    const int channel = threadIdx.x;
    if (channel < Traits::kChannels && first_channel_ + channel < shape_.K && call_.partial_bias != nullptr)
      call_.partial_bias[row + channel] =
          over_warps(reinterpret_cast<const float*>(shared_ + launch_.layout.bias) + channel, Traits::kChannels);
  }

  FSC_DEVICE static float over_warps(const float* first, int stride) {
    float total = 0;
    for (int w = 0; w < Traits::kWarps; ++w) total += first[w * stride];
    return total;
  }

  FSC_DEVICE static void unpack_word(Word word, float (&values)[2]) {
    const float2 pair = unpack<Scalar>(word);
    values[0] = pair.x;
    values[1] = pair.y;
  }

  // All in constant memory: none of it takes a register.
  const MmaInputLaunch<Traits>& launch_;
  const MmaInputParams& call_;
  const ConvShape& shape_;
  const MmaStream& stream_;

  unsigned char* const shared_;
  int first_channel_, part_;
  float sums_[Traits::kTaps][2];  // of the window's row and column: of the weight's tap from the end
};

template <class Traits>
FSC_KERNEL(Traits::kThreads, 2)
mma_backward_input(const FSC_CONST_PARAM MmaInputLaunch<Traits> launch) {
  FSC_SHARED_BYTES(shared);
  MmaBackwardInput<Traits>(launch, shared).run();
}

}  // namespace fused_sepconv
